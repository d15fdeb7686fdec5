import pytest
import torch

from student_teacher.runtime.running_moments import Moments


def test_equals_the_library_on_all_values_at_once():
    values = torch.randn(1000, 3, dtype=torch.float64) * torch.tensor([1.0, 5, 0.1]) + torch.tensor([0.0, -3, 10])
    found = Moments()
    for part in values.split([1, 499, 300, 200]):
        found.update(part)
    assert found.count == 1000
    assert torch.allclose(found.mean, values.mean(0), rtol=1e-12)
    assert torch.allclose(found.deviation, values.std(0, correction=0), rtol=1e-12)


def test_a_large_mean_costs_no_digits():
    values = torch.tensor([[1e9 + 1], [1e9 + 2], [1e9 + 3], [1e9 + 6]], dtype=torch.float64)
    found = Moments()
    for value in values:
        found.update(value[None])
    assert found.deviation.item() == pytest.approx(3.5**0.5, rel=1e-9)


def test_merging_equals_updating():
    values = torch.randn(60, 2, dtype=torch.float64)
    whole, parts = Moments(), Moments()
    whole.update(values)
    for part in values.split(20):
        parts.merge(20, part.mean(0), (part - part.mean(0)).square().sum(0))
    assert torch.allclose(whole.deviation, parts.deviation)


def test_what_never_varies_is_left_in_its_unit():
    found = Moments()
    found.update(torch.tensor([[2.0, 1.0], [2.0, 3.0]]))
    assert found.deviation.tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="no observation"):
        Moments().deviation  # noqa: B018
