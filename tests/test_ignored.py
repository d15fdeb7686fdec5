"""Regions to ignore: what lies in them has no influence, in any training, in maps, scores, measures and ONNX."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import anomaly_detection
import demo_dataset
import mvtec_dataset
import students_training
from student_teacher.detection import scoring
from student_teacher.detection.AnomalyDetector import Maps
from student_teacher.detection.Detector import Calibration, load_detector
from student_teacher.evaluation.Evaluation import Evaluation
from student_teacher.evaluation.regions import Region
from student_teacher.images import ignored
from student_teacher.images.folders import IGNORED
from student_teacher.images.indexing import index_category
from student_teacher.runtime.errors import UserError
from tests.test_stages import CATEGORY, Place, prepared_category

DEMO = "demo_carpet"


def corner_mask(size=(44, 40)):
    """White in the top left corner, where a serial number would be."""
    mask = np.zeros(size, dtype=bool)
    mask[: size[0] // 3, : size[1] // 3] = True
    return mask


def stamped(picture, random):
    """The picture with another serial number in its corner."""
    pixels = np.array(picture)
    height, width = pixels.shape[0] // 3, pixels.shape[1] // 3
    cells = 255 * random.integers(0, 2, (max(2, height // 6), max(2, width // 6)), dtype=np.uint8)
    number = Image.fromarray(cells).resize((width - 4, height - 4), Image.Resampling.NEAREST)
    pixels[1 : height - 3, 1 : width - 3] = np.asarray(number)[..., None]
    return Image.fromarray(pixels)


def stamp_all(folder, seed=0):
    random = np.random.default_rng(seed)
    for path in [*sorted((folder / "train").rglob("*.png")), *sorted((folder / "test").rglob("*.png"))]:
        stamped(Image.open(path).convert("RGB"), random).save(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Students of patches, trained with an ignore.png in the category's folder."""
    root = tmp_path_factory.mktemp("ignored")
    data = prepared_category(root / "data")
    Image.fromarray(corner_mask()).save(data / CATEGORY / "ignore.png")
    place = Place(root, data)
    place.teacher()
    place.students()
    return place


def test_a_mask_is_brought_to_any_size_by_fraction(tmp_path):
    Image.fromarray(corner_mask((30, 60))).save(tmp_path / "ignore.png")
    mask = ignored.load(tmp_path)
    assert np.array_equal(mask, corner_mask((30, 60)))
    assert np.array_equal(ignored.at(mask, (90, 30)), corner_mask((90, 30)))
    assert np.array_equal(ignored.unpacked(ignored.packed(mask)), mask)
    assert ignored.load(tmp_path / "elsewhere") is None
    Image.new("L", (4, 4), 255).save(tmp_path / "white.png")
    with pytest.raises(UserError, match="100% of it is white"):
        ignored.load(tmp_path, tmp_path / "white.png")
    with pytest.raises(UserError, match="no such file"):
        ignored.load(tmp_path, tmp_path / "missing.png")


@pytest.mark.parametrize("good", ["train/good", "OK"])
def test_a_categorys_own_mask_is_none_of_its_images(tmp_path, capsys, good):
    category = tmp_path / "part"
    (category / good).mkdir(parents=True)
    for path in (category / good / "0.png", category / good / "1.png", category / "ignore.png"):
        Image.fromarray(corner_mask()).save(path)
    split = tmp_path / "own.csv"
    lines = [f"part,train,normal,{good}/{number}.png," for number in range(2)]
    split.write_text("\n".join(["object,split,label,image,mask", *lines]))
    for given in (None, split):
        rows = index_category(category, split_csv=given)
        assert [row["image_name"] for row in rows] == [f"{good}/0.png", f"{good}/1.png"]
    assert "passed over" not in capsys.readouterr().err


def test_what_is_ignored_has_no_influence_on_map_and_score(trained):
    detector = load_detector(trained.model / CATEGORY / "detector.pt")
    random = np.random.default_rng(0)
    picture = Image.fromarray(random.integers(0, 256, (88, 80, 3), dtype=np.uint8))
    for image_score in scoring.IMAGE_SCORES:
        found, other = (detector(image, image_score) for image in (picture, stamped(picture, random)))
        assert np.array_equal(found.anomaly_map, other.anomaly_map)
        assert (found.score, found.p_value) == (other.score, other.p_value)
    lowest = found.anomaly_map.min()
    assert (found.anomaly_map[ignored.at(corner_mask(), (88, 80))] == lowest).all()
    plain = load_detector(trained.model / CATEGORY / "detector.pt", ignored=~corner_mask())
    with pytest.raises(UserError, match="leave nothing"):  # the two masks together
        plain(picture)


def test_what_is_ignored_does_not_count_in_calibration_and_scores():
    maps = torch.randn(5, 12, 12, generator=torch.Generator().manual_seed(0))
    other, mask = maps.clone(), corner_mask((24, 24))
    other[:, :4, :4] = 1e9
    first, second = (Calibration([Maps(image, image) for image in some.split(1)], mask) for some in (maps, other))
    for image_score in scoring.IMAGE_SCORES:
        assert torch.equal(first.scores(image_score), second.scores(image_score))
    assert first.pixel_threshold(0.01) == second.pixel_threshold(0.01) < 1e9


def test_what_is_ignored_does_not_count_in_measures():
    random = np.random.default_rng(0)
    maps = random.normal(size=(6, 24, 24))
    masks = np.zeros((6, 24, 24), dtype=bool)
    masks[3:, 10:15, 2:9] = True
    maps[masks] += 2
    counted = ~corner_mask((24, 24))
    regions = [[] if not mask.any() else [Region(np.flatnonzero(mask), 0.5)] for mask in masks]
    given, kinds = (random.random(6), [0, 0, 0, 1, 1, 1]), ["good"] * 3 + ["a", "a", "b"]
    expected, spoiled = maps.copy(), masks.copy()
    maps[:, ~counted] = random.normal(size=(6, (~counted).sum())) * 100
    spoiled[3:, ~counted] = True
    spoiled_regions = [[] if not mask.any() else [Region(np.flatnonzero(mask), 0.5)] for mask in spoiled]
    seen = {"kinds": kinds, "pixel_threshold": 1.0}
    unseen = seen | {"ignored": [~counted] * 6}
    found = Evaluation(maps, spoiled, *given, regions=spoiled_regions, **unseen).measures()
    assert found == Evaluation(expected, masks, *given, regions=regions, **unseen).measures()
    assert "au_spro" in found and "aupimo" in found
    without = Evaluation(maps, spoiled, *given, regions=spoiled_regions, **seen).measures()
    assert without["pixel_au_roc"] != found["pixel_au_roc"]


def test_another_mask_means_another_detector(trained, tmp_path):
    trained.students()  # nothing to do
    Image.fromarray(~corner_mask()).save(tmp_path / "other.png")
    with pytest.raises(UserError, match=r"was trained with other regions to ignore.*--restart"):
        trained.students("--ignore", str(tmp_path / "other.png"))


@pytest.fixture(scope="module")
def stamped_twice(tmp_path_factory):
    """Two data folders whose images differ in their corner alone, each with another serial number; and a mask."""
    root = tmp_path_factory.mktemp("stamped")
    folders = [prepared_category(root / name) for name in ("one", "two")]
    for seed, folder in enumerate(folders):
        stamp_all(folder / CATEGORY, seed)
    Image.fromarray(corner_mask()).save(root / "mask.png")
    return folders, root / "mask.png"


TRAININGS = [
    ("backbone", "resnet18.pt", ()),
    ("teacher", "teacher_17.pt", ()),
    pytest.param(
        "teacher",
        "teacher_17.pt",
        ("--distillation", "dense", "--steps", "2", "--image-size", "32", "--batch-size", "1"),
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize("stage, name, options", TRAININGS)
def test_what_is_ignored_has_no_influence_on_backbone_and_teacher(stamped_twice, tmp_path, stage, name, options):
    folders, mask = stamped_twice
    found = []
    for number, (data, more) in enumerate([(folders[0], ()), *((data, ("--ignore", str(mask))) for data in folders)]):
        place = Place(tmp_path / str(number), data)
        getattr(place, stage)("--precision", "float32", *options, *more)
        found.append(place.load(name, stage)["net"])
    plain, first, second = found
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not all(torch.equal(first[key], plain[key]) for key in first)


@pytest.mark.parametrize("stage, name, options", TRAININGS[:2])
def test_backbone_and_teacher_notice_another_mask(stamped_twice, tmp_path, capsys, stage, name, options):
    data = tmp_path / "data"
    shutil.copytree(stamped_twice[0][0], data)
    place, mask = Place(tmp_path, data), data / CATEGORY / IGNORED
    getattr(place, stage)()
    shutil.copyfile(stamped_twice[1], mask)
    with pytest.raises(UserError, match=rf"{name} was trained with no regions to ignore.*--restart"):
        getattr(place, stage)()
    getattr(place, stage)("--restart")
    capsys.readouterr()
    getattr(place, stage)()
    getattr(place, stage)("--ignore", str(stamped_twice[1]))  # the same mask, from elsewhere
    assert capsys.readouterr().out.count("trained already") == 2
    Image.fromarray(~corner_mask()).save(mask)
    with pytest.raises(UserError, match=rf"{name} was trained with other regions to ignore.*--restart"):
        getattr(place, stage)()


def test_a_category_s_mask_is_not_for_other_pictures(stamped_twice, tmp_path):
    folders, mask = stamped_twice
    place = Place(tmp_path, folders[0])
    with pytest.raises(UserError, match="--ignore is for the category's own images"):
        place.teacher("--images", str(folders[0] / CATEGORY / "train"), "--ignore", str(mask))


def test_results_show_and_leave_out_what_is_ignored(trained, tmp_path, capsys):
    trained.detection("--save", "maps", "page")
    results = trained.results / CATEGORY
    measures = json.loads((results / "metrics.json").read_text())
    assert 0 < measures["pixel_au_roc"] <= 1
    anomaly_map = np.asarray(Image.open(results / "anomaly_maps" / CATEGORY / "test" / "good" / "000.tiff"))
    assert (anomaly_map[corner_mask()] == anomaly_map.min()).all()
    picture = np.asarray(Image.open(results / "page" / "0000.jpg")).astype(int)
    plain = np.asarray(Image.open(trained.data / CATEGORY / "test" / "good" / "000.png").convert("RGB")).astype(int)
    difference = np.abs(picture - plain).max(-1)
    assert difference[corner_mask()].mean() > 2 * difference[~corner_mask()].mean()
    capsys.readouterr()
    Image.fromarray(~corner_mask()[::-1]).save(tmp_path / "other.png")
    trained.detection("--ignore", str(tmp_path / "other.png"), "--save")
    assert "not all that is ignored was so in training" in capsys.readouterr().out


@pytest.mark.slow
def test_a_serial_number_costs_accuracy_and_a_mask_brings_it_back(tmp_path):
    """On the demo's carpet, with a pattern in the corner of every part that is never the same."""
    data = tmp_path / "data"
    make_demo(data / DEMO)
    mvtec_dataset.main([DEMO, "--data", str(data)])
    Image.fromarray(corner_mask((512, 512))).save(tmp_path / "mask.png")
    found = {}
    for name, options in (("with", ()), ("masked", ("--ignore", str(tmp_path / "mask.png")))):
        folders = [DEMO, "--data", str(data), "--model", str(tmp_path / name)]
        students_training.main([*folders, "--image-size", "128", *options])
        anomaly_detection.main([*folders, "--results", str(tmp_path / name), "--save"])
        measures = json.loads((tmp_path / name / DEMO / "metrics.json").read_text())
        found[name] = measures["image_au_roc"], measures["au_pro"]
    assert found["with"][0] <= found["masked"][0] > 0.98
    assert found["with"][1] + 0.02 < found["masked"][1]


def make_demo(folder):
    """A part of the demo's category, each image stamped."""
    numbers = {"train": 30, "test_good": 10, "test_per_kind": 2}
    demo_dataset.write_category(folder, numbers | {"image_size": 512, "seed": 0})
    stamp_all(folder)
