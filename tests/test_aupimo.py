"""AUPIMO against its definition, written out plainly, and against the way that its authors compute it."""

import numpy as np
import pytest
from scipy import ndimage

from student_teacher.evaluation.aupimo import aupimo


def shared_fpr(good, threshold, above=False):
    return np.mean([np.mean(scores > threshold if above else scores >= threshold) for scores in good])


def plain_aupimo(good, defect, lower, upper):
    """At each rate the lowest threshold that keeps it: rates change at the distinct good scores, and there alone."""
    area = 0.0
    for score in np.unique(np.concatenate([scores.ravel() for scores in good])):
        # Just above this score the rate is that of the scores above; where the rate at it is allowed, lower will do.
        begin, end = (np.clip(shared_fpr(good, score, above), lower, upper) for above in (True, False))
        area += np.mean(defect > score) * (np.log(end) - np.log(begin))
    return area / np.log(upper / lower)


def authors_aupimo(good, defect, lower, upper, number=300_000):
    """Trapezoids over the logarithm of the rate, between evenly spaced thresholds, as in the authors' code."""
    ordered = [np.sort(scores.ravel()) for scores in good]
    thresholds = np.linspace(min(scores[0] for scores in ordered), max(scores[-1] for scores in ordered), number)
    rate = np.mean([1 - np.searchsorted(scores, thresholds) / len(scores) for scores in ordered], axis=0)
    recall = 1 - np.searchsorted(np.sort(defect), thresholds) / len(defect)
    first, last = (np.argmin(np.abs(rate - limit)) for limit in (upper, lower))
    rate, recall = rate[first : last + 1][::-1], recall[first : last + 1][::-1]
    return np.trapezoid(recall, np.log(rate)) / np.log(upper / lower)


@pytest.mark.parametrize("limits", [(0.01, 0.1), (0.003, 0.05), (0.2, 1.0), (1e-6, 1e-5)])
@pytest.mark.parametrize("levels", [2, 6, 40, 100000])
@pytest.mark.parametrize("seed", range(2))
def test_aupimo_follows_its_definition_with_ties_and_sizes(seed, levels, limits):
    rng = np.random.default_rng(seed)
    good = [rng.integers(0, levels, shape).astype(np.float32) for shape in ((13, 17), (9, 8), (5, 21))]
    defects = [rng.integers(0, 1.5 * levels, number).astype(np.float32) for number in (30, 1, 200)]
    found = aupimo(good, defects, limits)
    assert found == pytest.approx([plain_aupimo(good, defect, *limits) for defect in defects], abs=1e-12)
    assert found.min() >= 0 and found.max() <= 1


def test_aupimo_is_the_mean_recall_over_rates():
    rng = np.random.default_rng(0)
    good = [rng.integers(0, 60, shape).astype(np.float32) for shape in ((13, 17), (9, 8), (5, 21))]
    defect = rng.integers(30, 80, 50).astype(np.float32)
    thresholds = np.arange(-0.5, 80)
    rates = np.array([shared_fpr(good, threshold) for threshold in thresholds])
    # The lowest threshold that keeps each of many rates, evenly spaced on the logarithmic scale.
    lowest = [thresholds[rates <= rate].min() for rate in np.geomspace(0.01, 0.2, 20_001)]
    expected = np.mean([np.mean(defect > threshold) for threshold in lowest])
    assert aupimo(good, [defect], (0.01, 0.2))[0] == pytest.approx(expected, abs=1e-4)


def test_aupimo_is_near_the_authors_at_their_limits():
    rng = np.random.default_rng(0)
    good = [ndimage.gaussian_filter(rng.standard_normal((600, 700)), 3) for _ in range(8)]
    good = [(scores / scores.std()).astype(np.float32) for scores in good]
    defects = [(4.2 + offset + 0.5 * rng.standard_normal(5000)).astype(np.float32) for offset in (-1, 0, 1)]
    found = aupimo(good, defects)
    # They begin and end at the nearest rates that they meet: one pixel is 1/34 of the lower limit here.
    assert found == pytest.approx([authors_aupimo(good, defect, 1e-5, 1e-4) for defect in defects], abs=1e-2)
    assert found[0] < 0.2 < found[1] < found[2]


def test_every_good_image_weighs_the_same_whatever_its_size():
    small, large = np.zeros((10, 10)), np.zeros((100, 100))
    small.flat[:5] = np.arange(5, 0, -1)  # 1 to 5 % of the small image are 0.5 to 2.5 % of the two together
    limits = 0.01, 0.02
    # Recall is 1 above the third-highest score, whose rate is 1.5 %: from there to 2 % the threshold may lie below 3.
    assert aupimo([small, large], [np.array([3.0])], limits)[0] == pytest.approx(np.log(2 / 1.5) / np.log(2))


def test_what_lies_above_all_good_pixels_is_found_and_what_ties_with_the_highest_is_not():
    good = [np.zeros((200, 200), np.float32)]
    good[0][3, 4] = 1
    tied = np.log10(4)  # found from a rate of 2.5e-5 on, that of the one pixel
    found = aupimo(good, [np.array([1.5]), np.array([1.0]), np.array([1.0, 1.5]), np.array([0.0])])
    assert found == pytest.approx([1, tied, (1 + tied) / 2, 0])


def test_an_image_without_a_defect_pixel_has_none():
    found = aupimo([np.arange(9.0)], [np.empty(0), np.full(3, 10.0)], (0.1, 0.5))
    assert np.isnan(found[0]) and found[1] == 1
    assert aupimo([np.arange(9.0)], []).shape == (0,)


def test_errors_say_what_is_wrong():
    for good in ([], [np.empty((0, 3))]):
        with pytest.raises(ValueError, match="good images"):
            aupimo(good, [np.ones(3)])
    for limits in ((0, 0.1), (0.1, 0.1), (0.2, 0.1), (0.5, 1.1)):
        with pytest.raises(ValueError, match="must rise"):
            aupimo([np.ones(9)], [np.ones(3)], limits)
