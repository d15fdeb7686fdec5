"""Every measure of a test set together: over all images, for each kind of defect, and what can't be measured."""

import json
import weakref

import numpy as np
import pytest

from student_teacher.evaluation import metrics
from student_teacher.evaluation.aupimo import aupimo
from student_teacher.evaluation.Evaluation import (
    IMAGE_MEASURES,
    NO_GOOD_IMAGES,
    NO_THRESHOLD,
    PIXEL_MEASURES,
    SATURATED_MEASURES,
    Evaluation,
)
from student_teacher.evaluation.pixels import OnDemand
from student_teacher.evaluation.regions import Region


@pytest.fixture
def test_set():
    """Two good images, two with cracks, one with a hole whose mask is empty, two with stains."""
    rng = np.random.default_rng(3)
    kinds = ["good", "crack", "hole", "stain", "good", "crack", "stain"]
    labels = np.array([kind != "good" for kind in kinds])
    maps = [rng.integers(0, 30, (12, 10 + index)).astype(np.float32) for index in range(7)]
    masks = [np.zeros(scores.shape, np.uint8) for scores in maps]
    for index in (1, 3, 5, 6):
        masks[index][2:5, 3:6] = masks[index][8:10, 7:9] = 255
        maps[index] += 8 * (masks[index] > 0)
    scores = np.array([scores.max() for scores in maps]) + rng.random(7)
    return maps, masks, scores, labels, kinds


def regions_of(masks):
    """One region a mask, which saturates at half its area; none where the mask is empty."""
    return [[Region(np.flatnonzero(mask), 0.5)] if mask.any() else [] for mask in masks]


def evaluation_of(maps, masks, scores, labels, kinds, **options):
    return Evaluation(maps, masks, scores, labels, kinds=kinds, **options)


def f1_at(scores, labels, threshold):
    called = scores >= threshold
    return 2 * np.sum(called & labels) / (np.sum(called) + np.sum(labels))


def test_evaluation_gives_every_measure_over_all_and_per_kind(test_set):
    maps, masks, scores, labels, kinds = test_set
    regions = regions_of(masks)
    thresholds = {"image_threshold": 35.5, "pixel_threshold": 25.0}
    evaluation = evaluation_of(*test_set, regions=regions, **thresholds)
    result = evaluation.measures()
    assert json.loads(json.dumps(result)) == result
    assert result["au_pro_limit"] == 0.3 and result["missing"] == {}
    of_images = evaluation.aupimo_of_images()
    assert [value is None for value in of_images] == [kind in ("good", "hole") for kind in kinds]
    good = [maps[i] for i in np.flatnonzero(~labels)]
    assert set(result["kinds"]) == {"crack", "hole", "stain"}
    for kind in (None, "crack", "stain"):
        taken = [i for i in range(7) if kind in (None, kinds[i]) or not labels[i]]
        some = result if kind is None else result["kinds"][kind]
        images = scores[taken], labels[taken]
        assert some["image_au_roc"] == pytest.approx(metrics.au_roc(*images))
        assert some["image_average_precision"] == pytest.approx(metrics.count_scores(*images).average_precision())
        assert (some["image_best_f1"], some["image_best_f1_threshold"]) == pytest.approx(
            metrics.count_scores(*images).best_f1()
        )
        assert some["image_f1"] == pytest.approx(f1_at(*images, 35.5)) and some["image_f1_threshold"] == 35.5
        pixels = metrics.count_pixels(*([values[i] for i in taken] for values in (maps, masks, regions)))
        curve = pixels.pro_curve()
        assert some["au_pro"] == pytest.approx(metrics.area_under_curve(*curve, 0.3))
        assert some["au_pro_0.05"] == pytest.approx(metrics.area_under_curve(*curve, 0.05))
        assert some["pixel_au_roc"] == pytest.approx(pixels.au_roc())
        assert some["pixel_average_precision"] == pytest.approx(pixels.average_precision())
        assert (some["pixel_best_f1"], some["pixel_best_f1_threshold"]) == pytest.approx(pixels.best_f1())
        flat = [np.concatenate([values[i].ravel() for i in taken]) for values in (maps, masks)]
        assert some["pixel_f1"] == pytest.approx(f1_at(flat[0], flat[1] > 0, 25)) and some["pixel_f1_threshold"] == 25
        assert some["au_spro"] == pytest.approx(metrics.area_under_curve(*pixels.spro_curve(), 0.3))
        assert some["au_spro_0.05"] == pytest.approx(metrics.area_under_curve(*pixels.spro_curve(), 0.05))
        defective = [i for i in taken if masks[i].any()]
        expected = aupimo(good, [maps[i][masks[i] > 0] for i in defective])
        assert [of_images[i] for i in defective] == pytest.approx(expected)
        assert some["aupimo"] == pytest.approx(expected.mean())
        assert some["good_images"] == 2 and some["anomalous_images"] == len(taken) - 2


def test_a_kind_with_empty_masks_alone_lacks_the_pixel_measures(test_set):
    evaluation = evaluation_of(*test_set, regions=regions_of(test_set[1]), image_threshold=3, pixel_threshold=3)
    hole = evaluation.measures()["kinds"]["hole"]
    assert hole["missing"] == dict.fromkeys(PIXEL_MEASURES + SATURATED_MEASURES, "all ground truth masks are empty")
    assert "image_au_roc" in hole and "au_pro" not in hole


def test_thresholds_are_missing_where_good_images_set_none(test_set):
    result = evaluation_of(*test_set).measures()
    names = "image_f1", "image_f1_threshold", "pixel_f1", "pixel_f1_threshold"
    assert result["missing"] == dict.fromkeys(names, NO_THRESHOLD)
    assert not set(SATURATED_MEASURES) & set(result)


def test_a_threshold_above_all_scores_finds_nothing(test_set):
    result = evaluation_of(*test_set, image_threshold=1e6, pixel_threshold=1e6).measures()
    assert result["image_f1"] == result["pixel_f1"] == 0
    for name in ("image", "pixel"):  # and the best F1 is that of the best threshold
        best = evaluation_of(*test_set, **{f"{name}_threshold": result[f"{name}_best_f1_threshold"]}).measures()
        assert best[f"{name}_f1"] == pytest.approx(best[f"{name}_best_f1"])


def test_pixels_are_found_at_a_threshold_as_numpy_compares_them():
    maps = [np.full((4, 4), 0.1, np.float32), np.full((4, 4), 0.1, np.float32)]
    mask = np.zeros((4, 4), bool)
    mask[:2] = True
    for threshold in (0.1, np.float64(0.1), np.nextafter(np.float32(0.1), np.float32(1))):
        result = evaluation_of(
            maps, [None, mask], [0, 1], [0, 1], ["good", "cut"], pixel_threshold=threshold
        ).measures()
        assert result["pixel_f1"] == f1_at(np.stack(maps), np.stack([mask & False, mask]), threshold)


def test_without_masks_the_image_measures_remain(test_set):
    maps, masks, *rest = test_set
    result = evaluation_of(maps, None, *rest, image_threshold=40).measures()
    assert result["missing"] == dict.fromkeys(PIXEL_MEASURES, "there are no ground truth masks")
    assert set(evaluation_of(maps, None, *rest).aupimo_of_images()) == {None}
    assert result["image_au_roc"] == evaluation_of(maps, masks, *rest).measures()["image_au_roc"]
    assert evaluation_of(maps, None, *rest).curves().pro is None


def test_without_good_images_the_pixel_measures_remain(test_set):
    maps, masks, scores, labels, kinds = test_set
    bad = np.flatnonzero(labels)
    evaluation = evaluation_of(
        [maps[i] for i in bad],
        [masks[i] for i in bad],
        scores[bad],
        labels[bad],
        [kinds[i] for i in bad],
        pixel_threshold=20,
    )
    result = evaluation.measures()
    assert result["missing"] == dict.fromkeys((*IMAGE_MEASURES, "aupimo"), NO_GOOD_IMAGES)
    assert result["au_pro"] == pytest.approx(metrics.au_pro([maps[i] for i in bad], [masks[i] for i in bad]))
    assert evaluation.curves().image_roc is None and evaluation.curves().pixel_roc is not None


def test_without_anomalous_images_every_measure_is_missing(test_set):
    maps, _, scores, _, _ = test_set
    result = evaluation_of(maps[:2], [None, None], scores[:2], [0, 0], ["good", "good"]).measures()
    assert set(result["missing"]) == {*IMAGE_MEASURES, *PIXEL_MEASURES}
    assert set(result["missing"].values()) == {"there are no anomalous test images"}
    assert result["kinds"] == {}


def test_a_good_image_needs_no_mask(test_set):
    maps, masks, *rest = test_set
    without = [mask if mask.any() or index == 2 else None for index, mask in enumerate(masks)]
    assert evaluation_of(maps, without, *rest).measures() == evaluation_of(*test_set).measures()


def test_defects_without_a_mask_count_as_images_alone(test_set):
    maps, masks, scores, labels, kinds = test_set
    unknown = int(np.flatnonzero(np.asarray(kinds) == "crack")[0])
    some = [None if index == unknown else mask for index, mask in enumerate(masks)]
    regions = regions_of(masks)
    thresholds = {"image_threshold": 35.5, "pixel_threshold": 25.0}
    evaluation = evaluation_of(maps, some, scores, labels, kinds, regions=regions, **thresholds)
    found, whole = evaluation.measures(), evaluation_of(*test_set, regions=regions, **thresholds).measures()
    left = [index for index in range(len(maps)) if index != unknown]
    rest, regions_left = [[values[i] for i in left] for values in test_set], [regions[i] for i in left]
    without = evaluation_of(*rest, regions=regions_left, **thresholds)
    for name in IMAGE_MEASURES:
        assert found[name] == whole[name]
    for name in PIXEL_MEASURES + SATURATED_MEASURES:
        assert found[name] == without.measures()[name]
    of_images = evaluation.aupimo_of_images()
    assert of_images[unknown] is None
    assert [of_images[index] for index in left] == without.aupimo_of_images()
    assert found["au_pro"] != whole["au_pro"]
    assert found["anomalous_images_without_mask"] == 1 == found["kinds"]["crack"]["anomalous_images_without_mask"]
    assert "anomalous_images_without_mask" not in found["kinds"]["hole"]
    cracks = [None if kind == "crack" else mask for kind, mask in zip(kinds, masks, strict=True)]
    found = evaluation_of(maps, cracks, scores, labels, kinds, **thresholds).measures()
    assert found["kinds"]["crack"]["missing"]["au_pro"] == "there are no ground truth masks"
    assert found["kinds"]["stain"] == evaluation_of(*test_set, **thresholds).measures()["kinds"]["stain"]


def test_evaluation_refuses_what_contradicts_itself(test_set):
    maps, masks, scores, labels, kinds = test_set
    with pytest.raises(ValueError, match="image 0 is labelled good and has a mask"):
        evaluation_of(maps, [np.ones_like(masks[0]), *masks[1:]], scores, labels, kinds).measures()
    with pytest.raises(ValueError, match="the regions of 3 images"):
        evaluation_of(*test_set, regions=[[]] * 3)
    with pytest.raises(ValueError, match="are not the mask"):
        evaluation_of(*test_set, regions=[[]] * 7)
    with pytest.raises(ValueError, match="must be as many"):
        evaluation_of(maps, masks, scores[:-1], labels, kinds).measures()
    with pytest.raises(ValueError, match="image score is not a finite number"):
        evaluation_of(maps, masks, np.where(labels, np.nan, scores), labels, kinds).measures()


def test_measures_on_disk_are_the_same_and_read_one_map_at_a_time(tmp_path):
    random = np.random.default_rng(0)
    maps = random.normal(size=(6, 20, 20)).astype(np.float32)
    masks = [None] * 3 + [random.random((20, 20)) < 0.1 for _ in range(3)]
    given = masks, random.random(6), [0, 0, 0, 1, 1, 1], ["good"] * 3 + ["a", "a", "b"]
    held = []

    class Held(np.ndarray):
        def __array_finalize__(self, _):
            held.append(weakref.ref(self))

    def read(number):
        assert sum(ref() is not None for ref in held) <= 3  # this one, and views of it
        return maps[number].copy().view(Held)

    on_disk = evaluation_of(OnDemand(read, 6), *given, pixel_threshold=1.0, on_disk=tmp_path)
    in_memory = evaluation_of(maps, *given, pixel_threshold=1.0)
    assert on_disk.measures() == in_memory.measures()
    assert np.array_equal(on_disk.curves().pro, in_memory.curves().pro)
    assert held
    assert list(tmp_path.iterdir()) == []
