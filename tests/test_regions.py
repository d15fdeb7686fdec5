"""The saturated per-region overlap of MVTec LOCO against its definition, written out plainly."""

import numpy as np
import pytest
from scipy import ndimage

from student_teacher.evaluation import metrics
from student_teacher.evaluation.regions import Region, saturation_area


def plain_spro_curve(maps, regions):
    """At every distinct score, the mean over regions of min(pixels found / saturation, 1); no interpolation."""
    good, marked = [], []
    for scores, of_image in zip(maps, regions, strict=True):
        outside = np.ones(scores.size, dtype=bool)
        for pixels, saturation in of_image:
            outside[pixels] = False
            marked.append((scores.ravel()[pixels], saturation))
        good.append(scores.ravel()[outside])
    good = np.concatenate(good)
    fpr, spro = [0.0], [0.0]
    for threshold in np.unique(np.concatenate([scores.ravel() for scores in maps]))[::-1]:
        fpr.append(np.mean(good >= threshold))
        spro.append(np.mean([min(np.sum(scores >= threshold) / saturation, 1) for scores, saturation in marked]))
    return np.array(fpr), np.array(spro)


def plain_area(fpr, rate, limit):
    within = fpr <= limit
    x, y = np.append(fpr[within], limit), np.append(rate[within], np.interp(limit, fpr, rate))
    return np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2) / limit


def random_case(seed, levels, saturation):
    """Maps of several sizes; regions that overlap, lie apart or are one pixel; `saturation` of a region's area."""
    rng = np.random.default_rng(seed)
    maps = [rng.integers(0, levels, shape).astype(np.float32) for shape in ((13, 17), (9, 8), (20, 5), (6, 6))]
    regions = []
    for scores, number in zip(maps, (3, 0, 2, 1), strict=True):
        pixels = [np.flatnonzero(rng.random(scores.size) < 0.15) for _ in range(number)]
        pixels = [part if len(part) else np.array([0]) for part in pixels]
        regions.append([Region(part, saturation(len(part))) for part in pixels])
    return maps, regions


@pytest.mark.parametrize("saturation", [lambda area: area, lambda area: 1, lambda area: max(1, area // 3)])
@pytest.mark.parametrize("levels", [2, 5, 40, 100000])
@pytest.mark.parametrize("seed", range(3))
def test_au_spro_follows_its_definition_with_ties_sizes_and_overlaps(seed, levels, saturation):
    maps, regions = random_case(seed, levels, saturation)
    expected = plain_spro_curve(maps, regions)
    for limit in (0.01, 0.05, 0.3, 0.77, 1.0):
        assert metrics.au_spro(maps, regions, limit) == pytest.approx(plain_area(*expected, limit), abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_au_spro_equals_au_pro_where_saturation_is_the_full_area(seed):
    rng = np.random.default_rng(seed)
    maps = [rng.integers(0, 40, (15, 12)).astype(np.float32) for _ in range(4)]
    masks = [rng.random((15, 12)) < 0.15 for _ in range(3)] + [None]
    regions = []
    for mask in masks[:3]:
        labels, number = ndimage.label(mask, np.ones((3, 3)))
        pixels = [np.flatnonzero(labels == region) for region in range(1, number + 1)]
        regions.append([Region(part, saturation_area(len(part), 1.0, True)) for part in pixels])
    for limit in (0.05, 0.3, 1.0):
        expected = metrics.au_pro(maps, masks, limit)
        assert metrics.au_spro(maps, [*regions, ()], limit) == pytest.approx(expected, abs=1e-12)


def test_a_saturated_region_is_wholly_found_by_a_part_of_it():
    scores, mask = np.zeros((10, 10)), np.zeros((10, 10), dtype=bool)
    mask[2:6, 2:7] = True  # 20 pixels
    scores[2, 2:7] = 1  # a quarter of them
    regions = [[Region(np.flatnonzero(mask), 5)]]
    assert metrics.au_spro([scores], regions, 0.3) == 1
    assert metrics.au_spro([scores], [[Region(np.flatnonzero(mask), 10)]], 0.3) == pytest.approx(0.5 + 0.15 / 2)
    assert metrics.au_pro([scores], [mask], 0.3) == pytest.approx(0.25 + 0.75 * 0.15)


@pytest.mark.parametrize(
    ("area", "threshold", "relative", "expected"),
    [
        *((100, 1.0, True, 100), (100, 0.5, True, 50), (99, 0.5, True, 49), (1, 0.3, True, 1)),
        *((100, 40, False, 40), (100, 1000, False, 100), (7, 7, False, 7)),
    ],
)
def test_saturation_areas_are_shares_or_pixels(area, threshold, relative, expected):
    assert saturation_area(area, threshold, relative) == expected


def test_regions_that_contradict_themselves_are_refused():
    scores, mask = np.arange(12.0).reshape(3, 4), np.zeros((3, 4), dtype=bool)
    mask[0, :2] = True
    inside = np.flatnonzero(mask)
    for saturation in (0, 3):
        with pytest.raises(ValueError, match=f"a saturation of {saturation} pixels for a region of 2"):
            metrics.au_spro([scores], [[Region(inside, saturation)]])
    for pixels in (inside[:1], np.append(inside, 7)):
        with pytest.raises(ValueError, match="are not the mask"):
            metrics.count_pixels([scores], [mask], [[Region(pixels, 1)]])
    with pytest.raises(ValueError, match="has regions, but no mask"):
        metrics.count_pixels([scores, scores], [mask, None], [[Region(inside, 1)], [Region(inside, 1)]])
