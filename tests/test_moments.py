import pytest
import torch

from student_teacher.runtime.running_moments import RunningMoments


def test_equals_the_library_on_all_values_at_once():
    values = torch.randn(1000, 3, dtype=torch.float64) * torch.tensor([1.0, 5, 0.1]) + torch.tensor([0.0, -3, 10])
    found = RunningMoments()
    for part in values.split([1, 499, 300, 200]):
        found.update(part)
    assert found.count == 1000
    assert torch.allclose(found.mean, values.mean(0), rtol=1e-12)
    assert torch.allclose(found.std, values.std(0, correction=0), rtol=1e-12)


def test_a_large_mean_causes_no_cancellation():
    values = torch.tensor([[1e9 + 1], [1e9 + 2], [1e9 + 3], [1e9 + 6]], dtype=torch.float64)
    found = RunningMoments()
    for value in values:
        found.update(value[None])
    assert found.std.item() == pytest.approx(3.5**0.5, rel=1e-9)


def test_merging_equals_updating():
    values = torch.randn(60, 2, dtype=torch.float64)
    whole, parts = RunningMoments(), RunningMoments()
    whole.update(values)
    for part in values.split(20):
        parts.merge(20, part.mean(0), (part - part.mean(0)).square().sum(0))
    assert torch.allclose(whole.std, parts.std)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_no_rows_change_nothing(place):
    values = torch.randn(20, 2, dtype=torch.float64)
    parts = [values[:10], values[10:]]
    parts.insert(place, values[:0])
    found = RunningMoments()
    for part in parts:
        found.update(part)
        found.merge(0, values[:0].mean(0), values[:0].mean(0))
    assert found.count == 20
    assert torch.allclose(found.mean, values.mean(0), rtol=1e-12)
    assert torch.allclose(found.std, values.std(0, correction=0), rtol=1e-12)


def test_a_constant_channel_has_a_std_of_1():
    found = RunningMoments()
    found.update(torch.tensor([[2.0, 1.0], [2.0, 3.0]]))
    assert found.std.tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="no observations"):
        RunningMoments().std  # noqa: B018
