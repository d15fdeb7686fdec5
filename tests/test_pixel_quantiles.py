import numpy as np
import pytest
import torch

from student_teacher.detection import PixelQuantiles as module
from student_teacher.detection.PixelQuantiles import PixelQuantiles
from student_teacher.runtime import distributed


def maps(number=7, seed=0):
    """Maps of different sizes, with equal pixels, zeros of both signs and large ones among them."""
    random = np.random.default_rng(seed)
    for count in range(number):
        pixels = (random.standard_normal((1, 5 + count, 9)) * 10.0 ** random.integers(-3, 4)).astype(np.float32)
        pixels[0, :2] = random.integers(-2, 3, (2, 9))
        pixels[0, 2, :2] = -0.0, 3e38
        yield torch.from_numpy(pixels)


def quantiles_of(found, fractions, shared=False):
    quantiles = PixelQuantiles(shared)
    for each in found:
        quantiles.update(each)
    return quantiles.at(fractions)


@pytest.mark.parametrize("chunk", [1, 100, 10**9])
def test_quantiles_are_numpys_on_all_pixels_at_once(monkeypatch, chunk):
    monkeypatch.setattr(module, "CHUNK", chunk)
    pixels = np.sort(np.concatenate([each.numpy().ravel() for each in maps()]))
    quantiles = PixelQuantiles()
    for each in maps():
        quantiles.update(each)
    quantiles.at(np.array([0.5]))
    np.testing.assert_array_equal(quantiles._at_rank(np.arange(len(pixels))), pixels)
    fractions = np.linspace(0, 1, 2001)
    expected = np.quantile(pixels.astype(np.float64), fractions)
    np.testing.assert_allclose(quantiles_of(maps(), fractions), expected, rtol=1e-12)


def test_one_pixel_and_equal_pixels():
    assert quantiles_of([torch.tensor([-2.5])], np.array([0, 0.3, 1])).tolist() == [-2.5] * 3
    assert quantiles_of([torch.zeros(3, 4)] * 2, np.array([0, 0.3, 1])).tolist() == [0.0] * 3


def test_processes_count_together_and_keep_their_own_maps(monkeypatch):
    everything = list(maps())
    fractions = np.linspace(0, 1, 11)
    others = PixelQuantiles()
    for each in everything[1::2]:
        others.update(each)
    others._sort_pending()
    asked = []

    def added(counts):  # by the process that has the others
        if len(counts) == 1:
            return counts + sum(map(len, others._chunks))
        return counts + np.searchsorted(others._chunks[0], asked[-1], side="right")

    value = module._value
    monkeypatch.setattr(module, "_value", lambda order: asked.append(value(order)) or asked[-1])
    monkeypatch.setattr(distributed, "all_reduce", lambda counts: torch.from_numpy(added(counts.numpy())))
    found = quantiles_of(everything[::2], fractions, shared=True)
    monkeypatch.undo()
    np.testing.assert_array_equal(found, quantiles_of(everything, fractions))
