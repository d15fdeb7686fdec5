"""The measures against MVTec AD's evaluation code (reference/README.md) and against their definitions, plainly."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from student_teacher.evaluation import metrics
from student_teacher.evaluation.Evaluation import Evaluation

REFERENCE = Path(__file__).resolve().parent / "reference"


@pytest.fixture(scope="module")
def reference():
    with np.load(REFERENCE / "evaluation_cases.npz") as cases:
        expected = json.loads((REFERENCE / "evaluation_expected.json").read_text())
        return cases["anomaly_maps"], cases["ground_truth"], expected


def thresholds_of(scores):
    return np.unique(scores)[::-1]


def plain_pro_curve(maps, masks):
    """The definition: at every distinct score, the mean over regions of the share at or above it."""
    scores = np.concatenate([scores.ravel() for scores in maps])
    good = np.concatenate([scores[mask == 0] for scores, mask in zip(maps, masks, strict=True)])
    regions = []
    for scores_of, mask in zip(maps, masks, strict=True):
        labels, count = ndimage.label(mask, np.ones((3, 3)))
        regions += [scores_of[labels == region] for region in range(1, count + 1)]
    fpr, pro = [0.0], [0.0]
    for threshold in thresholds_of(scores):
        fpr.append(np.mean(good >= threshold))
        pro.append(np.mean([np.mean(region >= threshold) for region in regions]))
    return np.array(fpr), np.array(pro)


def plain_area(fpr, rate, limit):
    within = fpr <= limit
    x, y = np.append(fpr[within], limit), np.append(rate[within], np.interp(limit, fpr, rate))
    return np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2) / limit


def plain_score_measures(scores, labels):
    """AU-ROC over all pairs; average precision and F1 over all thresholds."""
    good, anomalous = scores[labels == 0], scores[labels != 0]
    pairs = anomalous[:, None] - good[None, :]
    average_precision, f1s, recall_before = 0.0, [], 0.0
    for threshold in thresholds_of(scores):
        found, false = np.sum(anomalous >= threshold), np.sum(good >= threshold)
        recall = found / len(anomalous)
        average_precision += (recall - recall_before) * found / (found + false)
        f1s.append((2 * found / (2 * found + false + len(anomalous) - found), threshold))
        recall_before = recall
    return np.mean((pairs > 0) + 0.5 * (pairs == 0)), average_precision, max(f1s)


def random_case(seed, levels, shapes=((13, 17), (9, 8), (20, 5), (6, 6))):
    """Maps of several sizes with few distinct scores, masks with touching corners, and one empty mask."""
    rng = np.random.default_rng(seed)
    maps = [rng.integers(0, levels, shape).astype(np.float32) for shape in shapes]
    masks = [(rng.random(shape) < 0.15).astype(np.uint8) * 255 for shape in shapes]
    masks[1][:] = 0
    return maps, masks


@pytest.mark.parametrize("limit", ["0.05", "0.3", "1.0"])
def test_au_pro_equals_mvtec_evaluation(reference, limit):
    maps, masks, expected = reference
    assert metrics.au_pro(maps, masks, float(limit)) == pytest.approx(expected["au_pro"][limit], abs=1e-6)
    as_lists = metrics.au_pro(list(maps), list(masks), float(limit))
    assert as_lists == pytest.approx(expected["au_pro"][limit], abs=1e-6)


def test_au_roc_equals_mvtec_evaluation_and_scikit_learn(reference):
    maps, masks, expected = reference
    assert metrics.au_roc(maps.max((1, 2)), masks.any((1, 2))) == pytest.approx(expected["image_au_roc"], abs=1e-6)
    assert metrics.au_roc(maps.ravel(), masks.ravel()) == pytest.approx(expected["pixel_au_roc_sklearn"], abs=1e-6)
    pixels = metrics.count_pixels(maps, masks)
    assert pixels.au_roc() == pytest.approx(expected["pixel_au_roc_sklearn"], abs=1e-6)


def test_evaluation_equals_mvtec_evaluation(reference):
    maps, masks, expected = reference
    labels = masks.any((1, 2))
    result = Evaluation(maps, masks, maps.max((1, 2)), labels, kinds=np.where(labels, "defect", "good")).measures()
    assert result["au_pro"] == pytest.approx(expected["au_pro"]["0.3"], abs=1e-6)
    assert result["au_pro_0.05"] == pytest.approx(expected["au_pro"]["0.05"], abs=1e-6)
    assert result["image_au_roc"] == pytest.approx(expected["image_au_roc"], abs=1e-6)
    assert result["pixel_au_roc"] == pytest.approx(expected["pixel_au_roc_sklearn"], abs=1e-6)


@pytest.mark.parametrize("levels", [2, 5, 40, 100000])
@pytest.mark.parametrize("seed", range(3))
def test_pro_follows_its_definition_with_ties_and_sizes(seed, levels):
    maps, masks = random_case(seed, levels)
    expected = plain_pro_curve(maps, masks)
    curve = metrics.pro_curve(maps, masks)
    for limit in (0.01, 0.05, 0.3, 0.77, 1.0):
        assert metrics.au_pro(maps, masks, limit) == pytest.approx(plain_area(*expected, limit), abs=1e-12)
        assert metrics.area_under_curve(*curve, limit) == pytest.approx(plain_area(*expected, limit), abs=1e-12)
    for fpr, pro in zip(*expected, strict=True):  # every point of the definition lies on the curve
        on_curve = curve[1][curve[0] == fpr] if fpr in curve[0] else [np.interp(fpr, *curve)]
        assert min(on_curve) - 1e-12 <= pro <= max(on_curve) + 1e-12


@pytest.mark.parametrize("levels", [2, 5, 40, 100000])
@pytest.mark.parametrize("seed", range(3))
def test_score_measures_follow_their_definitions_with_ties(seed, levels):
    rng = np.random.default_rng(seed)
    labels = rng.random(70) < 0.3
    scores = rng.integers(-levels, levels, 70) / 7
    au_roc, average_precision, best_f1 = plain_score_measures(scores, labels)
    assert metrics.au_roc(scores, labels) == pytest.approx(au_roc, abs=1e-12)
    counts = metrics.count_scores(scores, labels)
    assert counts.average_precision() == pytest.approx(average_precision, abs=1e-12)
    assert counts.best_f1() == pytest.approx(best_f1, abs=1e-12)
    fpr, tpr = counts.roc_curve()
    assert np.trapezoid(tpr, fpr) == pytest.approx(au_roc, abs=1e-12)
    corners = set(zip(fpr, tpr, strict=True))
    for threshold in set(scores[labels]):
        assert (np.mean(scores[~labels] >= threshold), np.mean(scores[labels] >= threshold)) in corners


def test_pixel_measures_follow_the_same_definitions():
    maps, masks = random_case(5, 12)
    scores = np.concatenate([scores.ravel() for scores in maps])
    labels = np.concatenate([mask.ravel() for mask in masks])
    au_roc, average_precision, best_f1 = plain_score_measures(scores, labels)
    pixels = metrics.count_pixels(maps, masks)
    assert pixels.au_roc() == pytest.approx(au_roc, abs=1e-12)
    assert pixels.average_precision() == pytest.approx(average_precision, abs=1e-12)
    assert pixels.best_f1() == pytest.approx(best_f1, abs=1e-12)
    assert np.trapezoid(*pixels.roc_curve()[::-1]) == pytest.approx(au_roc, abs=1e-12)


def test_threshold_of_best_f1_gives_that_f1():
    scores, labels = np.array([0.1, 0.4, 0.35, 0.8, 0.4]), np.array([0, 1, 0, 1, 0])
    f1, threshold = metrics.count_scores(scores, labels).best_f1()
    found = scores >= threshold
    assert f1 == pytest.approx(2 * np.sum(found & (labels == 1)) / (found.sum() + labels.sum()))


def test_extreme_maps():
    mask = np.zeros((1, 10, 10), dtype=bool)
    mask[0, 2:5, 3:6] = True
    assert metrics.au_pro(mask.astype(np.float32), mask) == 1
    assert metrics.au_pro(-mask.astype(np.float32), mask, 1.0) == pytest.approx(0)
    # All ties: one straight line from (0, 0) to (1, 1).
    assert metrics.au_pro(np.zeros((1, 10, 10)), mask, 0.3) == pytest.approx(0.15)
    assert metrics.au_roc(np.zeros(4), np.array([0, 1, 0, 1])) == 0.5


def test_minus_zero_ties_with_zero():
    scores = np.array([0.0, -0.0, -0.0, 0.0], dtype=np.float32)
    assert metrics.au_roc(scores, np.array([0, 1, 0, 1])) == 0.5


def test_regions_are_8_connected_and_weigh_the_same():
    mask = np.zeros((6, 12), dtype=np.uint8)
    mask[0, 0] = mask[1, 1] = 1  # one region, by a corner
    mask[3:6, 5:11] = 1
    scores = np.zeros(mask.shape)
    scores[0, 0] = 2.0
    _, pro = metrics.pro_curve([scores], [mask])
    assert pro[2] == pytest.approx(0.25)  # half of one region of two


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int32, np.uint8])
def test_any_kind_of_number(dtype):
    maps, masks = random_case(1, 30)
    expected = metrics.au_pro(maps, masks)
    assert metrics.au_pro([scores.astype(dtype) for scores in maps], masks) == pytest.approx(expected, abs=1e-12)


def test_maps_are_left_as_they_are():
    maps, masks = random_case(1, 30)
    before = [scores.copy() for scores in maps]
    metrics.count_pixels(maps, masks)
    assert all(np.array_equal(scores, copy) for scores, copy in zip(maps, before, strict=True))


def test_errors_say_what_is_wrong():
    maps, masks = np.random.default_rng(0).random((3, 8, 8)), np.zeros((3, 8, 8))
    with pytest.raises(ValueError, match="no defect pixel"):
        metrics.au_pro(maps, masks)
    with pytest.raises(ValueError, match="no good pixel"):
        metrics.au_pro(maps, masks + 1)
    masks[0, 1:3, 1:3] = 1
    with pytest.raises(ValueError, match="3 anomaly maps, but 2 masks"):
        metrics.au_pro(maps, masks[:2])
    with pytest.raises(ValueError, match=r"anomaly map 0 has the shape \(8, 8\), its mask \(8, 7\)"):
        metrics.au_pro(maps, masks[:, :, :7])
    with pytest.raises(ValueError, match=r"anomaly map 2 .* not a finite number"):
        metrics.au_pro(np.where(np.arange(3)[:, None, None] == 2, np.nan, maps), masks)
    for limit in (0, -0.1, 1.1):
        with pytest.raises(ValueError, match="limit"):
            metrics.au_pro(maps, masks, limit)
    with pytest.raises(ValueError, match="no label is anomalous"):
        metrics.au_roc(np.arange(3), np.zeros(3))
    with pytest.raises(ValueError, match="no label is good"):
        metrics.count_scores(np.arange(3), np.ones(3))
    with pytest.raises(ValueError, match="not a finite number"):
        metrics.count_scores(np.array([0, np.inf]), np.array([0, 1]))
    with pytest.raises(ValueError, match="one length"):
        metrics.count_scores(np.arange(3), np.ones(2))
