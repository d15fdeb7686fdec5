"""The four stages, one after another, on a category of a few small images."""

import csv
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import detection_settings
import numpy as np
import pytest
import torch
from PIL import Image

import anomaly_detection
import mvtec_dataset
import resnet18_training
import students_training
import teacher_training
from AnomalyDataset import AnomalyDataset
from student_teacher.detection.AnomalyDetector import AnomalyDetector
from student_teacher.detection.Detector import load_detector
from student_teacher.detection.regions import regions_above
from student_teacher.evaluation import metrics
from student_teacher.evaluation.regions import Region
from student_teacher.reports import figures, measured
from student_teacher.runtime import checkpoints
from student_teacher.runtime.errors import UserError, run
from student_teacher.runtime.ledger import NAME
from student_teacher.runtime.paths import ROOT
from student_teacher.training import loop, patch_students

CATEGORY = "knit"
SIZE = (44, 40)


def picture(random, spot=False):
    pixels = 110 + 40 * np.sin(np.arange(SIZE[0]) / 2)[:, None, None] + random.normal(0, 8, (*SIZE, 3))
    mask = np.zeros(SIZE, np.uint8)
    if spot:
        top, left = random.integers(4, 28, 2)
        pixels[top : top + 8, left : left + 8] = (250, 20, 20)
        mask[top : top + 8, left : left + 8] = 255
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), Image.fromarray(mask)


def make_category(data: Path) -> None:
    random = np.random.default_rng(0)
    for folder, number, spot in (("train/good", 10, False), ("test/good", 4, False), ("test/spot", 4, True)):
        for index in range(number):
            image, mask = picture(random, spot)
            files = [(data / CATEGORY / folder / f"{index:03d}.png", image)]
            if spot:
                files.append((data / CATEGORY / "ground_truth" / "spot" / f"{index:03d}_mask.png", mask))
            for path, content in files:
                path.parent.mkdir(parents=True, exist_ok=True)
                content.save(path)


def prepared_category(data: Path) -> Path:
    """The folder, with the category in it and its index written."""
    make_category(data)
    mvtec_dataset.main([CATEGORY, "--data", str(data)])
    return data


class Place:
    """Folders of a run, and the stages in them."""

    def __init__(self, root: Path, data: Path):
        self.data, self.model, self.results = data, root / "model", root / "results"
        self.folders = ["--data", str(data), "--model", str(self.model)]

    def backbone(self, *options):
        weights = ("--backbone-weights", "random", "--image-size", "32", "--epochs", "2", "--batch-size", "4")
        resnet18_training.main([CATEGORY, *self.folders, *weights, *options])

    def teacher(self, *options):
        way = ("--distillation", "patches", "--backbone-weights", "random")
        options = (*way, "--patch-size", "17", "--steps", "3", "--batch-size", "4", *options)
        teacher_training.main([CATEGORY, *self.folders, *options])

    def students(self, *options):
        options = ("--patch-size", "17", "--image-size", "32", "--epochs", "3", "--students", "2", *options)
        students_training.main([CATEGORY, *self.folders, *options])

    def detection(self, *options):
        anomaly_detection.main([CATEGORY, *self.folders, "--results", str(self.results), *options])

    def load(self, name, kind):
        return checkpoints.load(self.model / CATEGORY / name, kind)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepared_category(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def done(tmp_path_factory, data):
    """All four stages, run once."""
    place = Place(tmp_path_factory.mktemp("done"), data)
    place.backbone()
    place.teacher()
    place.students()
    place.detection()
    return place


def test_the_stages_leave_models_maps_figures_and_measures(done):
    model = {path.name for path in (done.model / CATEGORY).iterdir()}
    assert {"resnet18.pt", "teacher_17.pt", "students_17.pt", "detector.pt", "students_17_training.png"} <= model
    assert not [name for name in model if "checkpoint" in name]
    with (done.model / CATEGORY / "students_17_training.csv").open() as file:
        losses = list(csv.DictReader(file))
    assert [int(row["step"]) for row in losses] == list(range(1, len(losses) + 1))
    assert losses and all(0 < float(row["loss"]) < 10 for row in losses)
    results = done.results / CATEGORY
    measures = json.loads((results / "metrics.json").read_text())
    for measure in ("image_au_roc", "pixel_au_roc", "au_pro"):
        assert 0 <= measures[measure] <= 1
        assert 0 <= measures["kinds"]["spot"][measure] <= 1
    assert measures["au_pro_limit"] == 0.3
    with (results / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [f"test/{kind}/{n:03d}.png" for kind in ("good", "spot") for n in range(4)]
    assert [int(row["label"]) for row in rows] == [0] * 4 + [1] * 4
    for row in rows:
        name = Path(row["path"]).relative_to("test").with_suffix("")
        assert Image.open(results / "figures" / f"{name}.jpg").width > 1000
        anomaly_map = Image.open(results / "anomaly_maps" / CATEGORY / "test" / f"{name}.tiff")
        assert (anomaly_map.mode, anomaly_map.size) == ("F", SIZE[::-1])
    assert (results / "curves.svg").exists()
    assert (results / "examples.png").exists()


def test_the_measures_are_those_of_the_maps_that_were_written(done, capsys):
    # By the folder: src has a module of the same name.
    benchmark = importlib.import_module("benchmarks.metrics")
    folders = ["--data", str(done.data), "--results", str(done.results)]
    assert benchmark.main(["--check", CATEGORY, *folders]) == 0
    assert "image_au_roc_of_maxima" in capsys.readouterr().out
    metrics_file = done.results / CATEGORY / "metrics.json"
    content = metrics_file.read_text()
    changed = json.loads(content)
    changed["au_pro"] += 2e-6
    metrics_file.write_text(json.dumps(changed))
    assert benchmark.main(["--check", CATEGORY, *folders]) == 1
    metrics_file.write_text(content)


def test_measures_at_thresholds_that_good_images_set(done, tmp_path, capsys):
    missing = json.loads((done.results / CATEGORY / "metrics.json").read_text())["missing"]
    assert set(missing) == {"image_f1", "image_f1_threshold"}  # too few for a false-alarm rate of 0.05
    other = Place(tmp_path, done.data)
    other.folders[-1] = str(done.model)
    other.detection("--false-alarm-rate", "0.4", "--pixel-false-alarm-rate", "0.1")
    assert "\npixel_f1 " in capsys.readouterr().out
    measures = json.loads((other.results / CATEGORY / "metrics.json").read_text())
    assert measures["missing"] == {} and "au_spro" not in measures
    threshold = load_detector(done.model / CATEGORY / "detector.pt").calibration.pixel_threshold(0.1)
    assert measures["pixel_f1_threshold"] == threshold and 0 < measures["pixel_f1"] <= measures["pixel_best_f1"]
    with (other.results / CATEGORY / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    called = np.array([float(row["p_value"]) <= measures["decisions"]["false_alarm_rate"] for row in rows])
    scores = np.array([float(row["image_score"]) for row in rows])
    assert np.array_equal(scores >= measures["image_f1_threshold"], called)
    labels = np.array([row["label"] == "1" for row in rows])
    assert measures["image_f1"] == pytest.approx(2 * (called & labels).sum() / (called.sum() + labels.sum()))
    assert measures["aupimo"] == pytest.approx(np.mean(list(measures["aupimo_of_images"].values())))
    assert set(measures["aupimo_of_images"]) == {row["path"] for row in rows if row["label"] == "1"}


def test_the_best_threshold_of_the_test_images_is_kept_and_says_that_it_used_labels(done, tmp_path, capsys):
    shutil.copytree(done.model, tmp_path / "model")
    place = Place(tmp_path, done.data)
    place.detection("--threshold", "best-f1", "--save-threshold")
    assert "the threshold used the test images' labels" in capsys.readouterr().out
    measures = json.loads((place.results / CATEGORY / "metrics.json").read_text())
    threshold, by_labels = place.load("detector.pt", "detector")["threshold"]
    assert by_labels and measures["decisions"]["threshold_used_labels"]
    assert measures["image_f1"] == measures["image_best_f1"] > 0
    assert measures["image_f1_threshold"] == threshold == measures["decisions"]["threshold"]
    assert threshold <= measures["image_best_f1_threshold"]
    with (place.results / CATEGORY / "scores.csv").open() as file:
        scores = [float(row["image_score"]) for row in csv.DictReader(file)]
    assert not any(threshold <= score < measures["image_best_f1_threshold"] - 1e-3 for score in scores)
    place.detection()  # it holds from now on
    assert json.loads((place.results / CATEGORY / "metrics.json").read_text()) == measures


def test_masks_of_several_regions_give_the_saturated_overlap(done, tmp_path, capsys):
    """MVTec LOCO: a spot's left half and the whole of it are two regions; the first saturates at a quarter of it."""
    shutil.copytree(done.data / CATEGORY, tmp_path / CATEGORY)
    regions = []
    for file in sorted((tmp_path / CATEGORY / "ground_truth" / "spot").iterdir()):
        mask = np.asarray(Image.open(file))
        left = mask * (np.cumsum(mask > 0, axis=1) <= 4)
        folder = file.with_name(file.stem.removesuffix("_mask"))
        file.unlink()
        folder.mkdir()
        for number, (region, value) in enumerate(((left, 254), (mask, 255))):
            Image.fromarray(np.where(region > 0, value, 0).astype(np.uint8)).save(folder / f"{number:03}.png")
        regions.append([Region(np.flatnonzero(left), 16, relative=False), Region(np.flatnonzero(mask), 0.5)])
    config = [
        {"defect_name": "half", "pixel_value": 254, "saturation_threshold": 16, "relative_saturation": False},
        {"defect_name": "spot", "pixel_value": 255, "saturation_threshold": 0.5, "relative_saturation": True},
    ]
    (tmp_path / CATEGORY / "defects_config.json").write_text(json.dumps(config))
    mvtec_dataset.main([CATEGORY, "--data", str(tmp_path)])
    other = Place(tmp_path, tmp_path)
    other.folders[-1] = str(done.model)
    other.detection()
    assert "au_spro_0.05 " in capsys.readouterr().out
    found, before = (json.loads((place.results / CATEGORY / "metrics.json").read_text()) for place in (other, done))
    files = sorted((other.results / CATEGORY / "anomaly_maps" / CATEGORY / "test").rglob("*.tiff"))
    maps = [np.asarray(Image.open(file)) for file in files]  # 4 good ones, then 4 with spots
    assert found["au_spro"] == pytest.approx(metrics.au_spro(maps, [[]] * 4 + regions, 0.3))
    assert found["au_spro_0.05"] == found["kinds"]["spot"]["au_spro_0.05"]
    assert found["au_pro"] == pytest.approx(before["au_pro"]) and found["aupimo"] == pytest.approx(before["aupimo"])

    config.pop()
    (tmp_path / CATEGORY / "defects_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="no kind of defect with the grey value 255"):
        other.detection()


def test_settings_of_detection_are_compared_on_the_same_images(done, tmp_path):
    output = tmp_path / "figures.json"
    options = ["--data", str(done.data), "--model", str(done.model), "--stride", "4", "1", "--precision", "float32"]
    detection_settings.main([CATEGORY, *options, "--output", str(output)])
    rows = json.loads(output.read_text())["rows"]
    assert [row["stride"] for row in rows] == [4, 1]
    measures = json.loads((done.results / CATEGORY / "metrics.json").read_text())
    assert rows[0]["image_au_roc"] == pytest.approx(measures["image_au_roc"], abs=0.1)
    assert rows[0]["au_pro"] == pytest.approx(measures["au_pro"], abs=0.02)  # those are in the default precision
    assert all(len(row["turns"]) == 8 for row in rows)


def test_regions_of_the_test_images_are_those_of_their_maps(done):
    results = done.results / CATEGORY
    threshold = load_detector(done.model / CATEGORY / "detector.pt").calibration.pixel_threshold(0.01)
    expected = []
    for kind in ("good", "spot"):
        for number in range(4):
            anomaly_map = Image.open(results / "anomaly_maps" / CATEGORY / "test" / kind / f"{number:03d}.tiff")
            regions = regions_above(np.asarray(anomaly_map), threshold)
            expected += [[f"test/{kind}/{number:03d}.png", *region.cells()] for region in regions]
    with (results / "regions.csv").open() as file:
        assert list(csv.reader(file))[1:] == expected != []


@pytest.mark.parametrize("kinds", [(), ("maps",), ("figures",), ("page",)])
def test_what_is_saved_of_test_images_can_be_chosen(done, tmp_path, kinds):
    place = Place(tmp_path, done.data)
    place.folders[-1] = str(done.model)
    place.detection("--save", *kinds)
    found, everything = (
        {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
        for folder in (place.results / CATEGORY, done.results / CATEGORY)
    )
    places = {"anomaly_maps": "maps", "index.html": "page", "page": "page", "figures": "figures"}
    places |= {"examples.png": "figures", "curves.png": "figures", "curves.svg": "figures"}
    assert found.keys() == {path for path in everything if places.get(path.parts[0], "") in ("", *kinds)}
    for name in found.keys() - {Path(".student_teacher.json")}:
        assert found[name].read_bytes() == everything[name].read_bytes()
    with pytest.raises(UserError, match="--save overlays is for --input"):
        place.detection("--save", "overlays")


def test_measures_taken_on_disk_are_those_taken_in_memory(done, tmp_path, monkeypatch):
    monkeypatch.setattr(measured, "MOST_IN_MEMORY", 0)
    place = Place(tmp_path, done.data)
    place.folders[-1] = str(done.model)
    place.detection("--save")
    found, expected = (place.results / CATEGORY / "metrics.json" for place in (place, done))
    assert found.read_bytes() == expected.read_bytes()


def test_a_red_spot_on_grey_is_found_even_so(done):
    assert json.loads((done.results / CATEGORY / "metrics.json").read_text())["pixel_au_roc"] > 0.8


def test_run_again_nothing_is_trained_again(done, capsys):
    files = [done.model / CATEGORY / name for name in ("resnet18.pt", "teacher_17.pt", "students_17.pt")]
    before = [path.stat().st_mtime_ns for path in files]
    done.backbone()
    done.teacher()
    done.students()
    assert [path.stat().st_mtime_ns for path in files] == before
    assert capsys.readouterr().out.count("trained already") == 3


def test_a_model_with_other_settings_is_not_overwritten(done):
    with pytest.raises(UserError, match=r"students_17\.pt was trained with epochs 3\.0, not 4\.0.*--restart"):
        done.students("--epochs", "4")
    with pytest.raises(UserError, match="steps 3, not 5"):
        done.teacher("--steps", "5")


class StoppedTraining(loop.Training):
    """Gets Ctrl-C in its second step."""

    def report(self, loss, **parts):
        super().report(loss, **parts)
        if self.step == 1:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("stage", ("backbone", "teacher", "students"))
def test_a_stopped_training_goes_on_to_the_same_numbers(done, tmp_path, monkeypatch, stage):
    name = {"backbone": "resnet18.pt", "teacher": "teacher_17.pt", "students": "students_17.pt"}[stage]
    place = Place(tmp_path, done.data)
    (place.model / CATEGORY).mkdir(parents=True)
    for needed in ("resnet18.pt", "teacher_17.pt"):
        if needed != name:
            (place.model / CATEGORY / needed).write_bytes((done.model / CATEGORY / needed).read_bytes())
    monkeypatch.setattr(loop, "Training", StoppedTraining)
    with pytest.raises(KeyboardInterrupt):
        getattr(place, stage)()
    assert not (place.model / CATEGORY / name).exists()
    checkpoint = place.load(name.replace(".pt", ".checkpoint.pt"), checkpoint_kind(stage))
    assert checkpoint["step"] == 2
    monkeypatch.undo()
    getattr(place, stage)()
    found, expected = (tensors(p.load(name, stage)) for p in (place, done))
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def checkpoint_kind(stage):
    return {"backbone": "backbone training", "teacher": "teacher training, 17 pixels"}.get(
        stage, "students training, 17 pixels"
    )


def tensors(content):
    return content["scale"]["state"] if "scale" in content else content["net"]


def test_students_of_another_teacher_are_not_taken_over(done, tmp_path):
    place = Place(tmp_path, done.data)
    (place.model / CATEGORY).mkdir(parents=True)
    for name in ("students_17.pt", "resnet18.pt"):
        (place.model / CATEGORY / name).write_bytes((done.model / CATEGORY / name).read_bytes())
    place.teacher("--seed", "1")
    with pytest.raises(UserError, match="with teacher"):
        place.students()


def test_several_strides_and_sizes_of_one_detector(done, tmp_path):
    for options in (
        ("--stride", "1"),
        ("--image-size", "native"),
        ("--image-size", "30", "26"),
        ("--patch-size", "17"),
    ):
        anomaly_detection.main([CATEGORY, *done.folders, "--results", str(tmp_path), *options])
        assert (tmp_path / CATEGORY / "metrics.json").exists()


def test_a_stopped_detection_goes_on_to_the_same_maps(done, tmp_path, monkeypatch):
    compute, visited = AnomalyDetector.maps, []

    def stopping(detector, images):
        visited.append(len(images))
        if len(visited) == 4:
            raise KeyboardInterrupt
        return compute(detector, images)

    monkeypatch.setattr(AnomalyDetector, "maps", stopping)
    options = [CATEGORY, *done.folders, "--results", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        anomaly_detection.main(options)
    anomaly_detection.main(options)
    assert len(visited) == 4 + 5  # three of the eight were done
    for name in ("metrics.json", "scores.csv", f"anomaly_maps/{CATEGORY}/test/spot/003.tiff"):
        assert (tmp_path / CATEGORY / name).read_bytes() == (done.results / CATEGORY / name).read_bytes()
    assert not (tmp_path / CATEGORY / "detection.unfinished").exists()


def test_a_detection_stopped_at_its_pictures_does_not_ask_the_networks_again(done, tmp_path, monkeypatch):
    options = [CATEGORY, *done.folders, "--results", str(tmp_path)]
    with monkeypatch.context() as patched:
        patched.setattr(figures, "contact_sheet", interrupted)
        with pytest.raises(KeyboardInterrupt):
            anomaly_detection.main(options)
    monkeypatch.setattr(AnomalyDetector, "maps", None)
    anomaly_detection.main(options)
    for name in ("metrics.json", "scores.csv"):
        assert (tmp_path / CATEGORY / name).read_bytes() == (done.results / CATEGORY / name).read_bytes()
    assert not (tmp_path / CATEGORY / "detection.unfinished").exists()


def test_maps_and_figures_of_test_images_that_have_gone_go_and_files_of_others_stay(done, tmp_path):
    data, results = tmp_path / "data", tmp_path / "results"
    shutil.copytree(done.data, data)
    shutil.copytree(done.results, results)
    others = results / CATEGORY / "figures" / "spot" / "mine.jpg"
    others.write_text("mine")
    for name in ("test/spot/003.png", "ground_truth/spot/003_mask.png"):
        (data / CATEGORY / name).unlink()
    mvtec_dataset.main([CATEGORY, "--data", str(data)])
    options = [CATEGORY, "--data", str(data), "--model", str(done.model), "--results", str(results)]
    anomaly_detection.main(options)
    gone = {path.relative_to(done.results) for path in done.results.rglob("*")}
    gone -= {path.relative_to(results) for path in results.rglob("*")}
    pictures = {f"page/0007{end}" for end in (".jpg", "_small.jpg", "_map.png")}
    pictures |= {f"anomaly_maps/{CATEGORY}/test/spot/003.tiff", "figures/spot/003.jpg"}
    assert {path.relative_to(CATEGORY).as_posix() for path in gone} == pictures
    assert others.read_text() == "mine"
    (results / CATEGORY / ".student_teacher.json").unlink()
    with pytest.raises(UserError, match=r"there already, and not written by"):
        anomaly_detection.main(options)
    anomaly_detection.main([*options, "--overwrite"])


def interrupted(*_):
    raise KeyboardInterrupt


def test_a_teacher_to_start_from_is_not_overwritten(done, data, tmp_path):
    place = Place(tmp_path, data)
    start = place.model / CATEGORY / "teacher_17.pt"
    start.parent.mkdir(parents=True)
    shutil.copy(done.model / CATEGORY / "teacher_17.pt", start)
    options = ("--distillation", "dense", "--start-from", str(start), "--restart")
    with pytest.raises(UserError, match="it would be overwritten"):
        place.teacher(*options)
    with pytest.raises(UserError, match="one --patch-size"):
        place.teacher(*options, "--patch-size", "17", "33")
    assert start.exists()


def test_teachers_of_all_sizes_are_looked_for_before_any_student_learns(done, tmp_path, monkeypatch):
    monkeypatch.setattr(patch_students, "ROOT", tmp_path)
    shutil.copytree(done.model, tmp_path / "model")
    students = tmp_path / "model" / CATEGORY / "students_17.pt"
    before = students.read_bytes()
    with pytest.raises(UserError, match=r"teacher_33\.pt is not there"):
        done.students("--model", str(tmp_path / "model"), "--patch-size", "17", "33", "--restart")
    assert students.read_bytes() == before


def test_two_equal_sides_are_the_same_as_one(done, capsys):
    done.students("--image-size", "32", "32")
    assert "is trained already" in capsys.readouterr().out


def test_images_too_small_for_the_stride_are_refused(done, tmp_path):
    with pytest.raises(UserError, match="--image-size 14: too small for patches of 17 pixels with --stride 8"):
        done.students("--model", str(tmp_path), "--image-size", "14", "--stride", "8")


def test_images_too_small_for_the_stride_are_named_before_one_is_decoded(data, tmp_path, done, monkeypatch):
    shutil.copytree(data / CATEGORY, tmp_path / CATEGORY)
    image = tmp_path / CATEGORY / "train" / "good" / "small.png"
    Image.new("RGB", (40, 15)).save(image)
    mvtec_dataset.main([CATEGORY, "--data", str(tmp_path)])
    decoded = []
    monkeypatch.setattr(AnomalyDataset, "__getitem__", lambda _, index: decoded.append(index))
    arguments = ["--model", str(tmp_path), "--data", str(tmp_path), "--image-size", "native", "--stride", "8"]
    with pytest.raises(UserError, match=r"small\.png: too small, 15 pixels where 16 are the least"):
        done.students(*arguments)
    assert not decoded


def test_native_size_trains_on_images_of_different_sizes(data, tmp_path, done):
    other = tmp_path / "data" / CATEGORY / "train" / "good"
    other.mkdir(parents=True)
    for index in range(6):
        picture(np.random.default_rng(index))[0].resize((30 + index % 2, 28)).save(other / f"{index}.bmp")
    mvtec_dataset.main([CATEGORY, "--data", str(tmp_path / "data")])
    place = Place(tmp_path, tmp_path / "data")
    place.teacher("--images", str(data / CATEGORY / "train"))
    place.students("--image-size", "native", "--epochs", "1")
    assert place.load("detector.pt", "detector")["image_size"] is None
    with pytest.raises(UserError, match="no test images"):
        place.detection()


def test_every_part_lies_within_the_image():
    pixels, last = torch.arange(30.0).view(1, 1, 5, 6), 1 - 2**-24
    assert torch.equal(patch_students.part(pixels, 2, (0.0, 0.0)), pixels[:, :, :2, :2])
    assert torch.equal(patch_students.part(pixels, 2, (0.5, last)), pixels[:, :, 2:4, 4:])
    assert torch.equal(patch_students.part(pixels, 9, (last, last)), pixels)


def test_students_of_17_pixels_learn_from_parts_of_the_images(done, tmp_path, monkeypatch, capsys):
    places, sizes, part = set(), set(), patch_students.part

    def noted(pixels, side, place):
        found = part(pixels, side, place)
        places.add(place)
        sizes.add(found.shape[2:])
        return found

    monkeypatch.setattr(patch_students, "PARTS", {17: 12})
    monkeypatch.setattr(patch_students, "part", noted)
    shutil.copytree(done.model, tmp_path / "model")
    done.students("--model", str(tmp_path / "model"), "--restart")
    assert sizes == {(28, 28)}
    assert len(places) > 1
    left = float(capsys.readouterr().out.split("students leave ")[1].split()[0])
    assert left < 1


def test_a_teacher_is_taught_densely_of_any_pictures(data, tmp_path, capsys):
    place = Place(tmp_path, data)
    options = ("--distillation", "dense", "--patch-size", "33", "--batch-size", "1", "--steps", "2")
    place.teacher(*options, "--metric-weight", "0.1", "--compactness-weight", "0.1")
    content = place.load("teacher_33.pt", "teacher")
    assert content["settings"]["distillation"] == "dense"
    assert {tensor.dtype for tensor in content["net"].values()} == {torch.float16}
    assert "is left unexplained on validation pictures" in capsys.readouterr().out
    place.students("--patch-size", "33", "--epochs", "1")


def test_teachers_that_ship_are_used_if_the_category_has_none(data, tmp_path, monkeypatch):
    shipping = Place(tmp_path, data)
    backbone = ("--distillation", "patches", "--backbone-weights", "random")
    options = (*backbone, "--patch-size", "17", "--steps", "1", "--batch-size", "2")
    teacher_training.main(["pretrained", *shipping.folders, "--images", str(data / CATEGORY), *options])
    monkeypatch.setattr(patch_students, "ROOT", tmp_path)
    place = Place(tmp_path / "elsewhere", data)
    place.students("--epochs", "1")
    shipped = checkpoints.load(shipping.model / "pretrained/teacher_17.pt", "teacher")["net"]
    taken = place.load("students_17.pt", "students")["scale"]["state"]
    assert torch.equal(taken["teacher.layers.0.weight"], shipped["layers.0.weight"].float())


def test_missing_files_are_named_in_one_line(tmp_path, data, monkeypatch):
    monkeypatch.setattr(patch_students, "ROOT", tmp_path)
    place = Place(tmp_path, data)
    with pytest.raises(UserError, match=r"teacher_17\.pt is not there: run teacher_training\.py knit --patch-size 17"):
        place.students()
    with pytest.raises(UserError, match=r"detector\.pt is not there: run students_training\.py knit"):
        place.detection()
    with pytest.raises(UserError, match="is not a state dict of torchvision's resnet18"):
        torch.save({"weight": torch.ones(1)}, tmp_path / "weights.pth")
        place.backbone("--backbone-weights", str(tmp_path / "weights.pth"))
    with pytest.raises(UserError, match="is not a folder"):
        place.teacher("--images", str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds 0 pictures"):
        place.teacher("--images", str(tmp_path / "empty"))
    with pytest.raises(UserError, match="--device nonsense"):
        place.backbone("--device", "nonsense")


@pytest.fixture
def small_disk(tmp_path):
    """A folder that takes 128 kilobytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", folder]
    if shutil.which("mount") is None or subprocess.run(mounting, capture_output=True).returncode:
        pytest.skip("only root may mount a file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


def ends_in_one_line(arguments, words):
    """What a command leaves in the folder for `--results` or `--model`, its last option, when it can't write there."""
    found = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False)
    lines = [line for line in found.stderr.splitlines() if line.strip() and "%|" not in line]  # without bars
    assert (found.returncode, len(lines)) == (2, 1), found.stderr
    assert words == "No space left on device" or "%|" not in found.stderr  # at once, before anything is computed
    assert words in lines[0] and str(arguments[-1]) in lines[0]
    return [path for path in arguments[-1].rglob("*") if path.is_file()]


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--input", "test")])
def test_results_on_a_full_or_read_only_disk_end_in_one_line(done, small_disk, more):
    more = [done.data / CATEGORY / each if each == "test" else each for each in more]
    command = [ROOT / "src/anomaly_detection.py", CATEGORY, *done.folders, *more, "--results", small_disk]
    found = ends_in_one_line(command, "No space left on device")
    assert found and not [path for path in found if path.stat().st_size == 0]
    for path in found:  # whole, or not there
        if path.suffix in (".jpg", ".png", ".tiff"):
            Image.open(path).load()
        assert not path.name.startswith(".") or path.name == NAME
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert ends_in_one_line(command, "Read-only file system") == found


@pytest.mark.parametrize("stage", ["backbone", "teacher", "students"])
def test_a_model_folder_that_can_not_be_made_is_said_before_the_training(done, tmp_path, stage):
    place = Place(tmp_path, done.data)
    place.model.touch()  # a file, where root may write too
    with pytest.raises(UserError, match="model/knit can't be written into"):
        getattr(place, stage)()


@pytest.mark.slow
def test_models_on_a_full_or_read_only_disk_end_in_one_line(data, small_disk):
    options = ["--patch-size", "17", "--students", "1", "--epochs", "1", "--image-size", "32", "--data", data]
    command = [ROOT / "src/students_training.py", CATEGORY, *options, "--model", small_disk]
    curve = {f"students_17_training.{ending}" for ending in ("csv", "png", "svg")}  # whole, and written first
    assert {path.name for path in ends_in_one_line(command, "No space left on device")} <= curve
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert {path.name for path in ends_in_one_line(command, "Read-only file system")} <= curve


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_names_that_the_output_s_encoding_lacks_stop_no_stage(tmp_path, encoding):
    name = "木目→" if encoding != "utf-8" else "caf\udce9"  # bytes that are not UTF-8
    make_category(tmp_path)
    try:
        (tmp_path / CATEGORY).rename(tmp_path / name)
    except OSError:
        pytest.skip("the file system takes no such names")
    command = [sys.executable, ROOT / "mvtec_dataset.py", name, "--data", tmp_path]
    env = os.environ | {"PYTHONIOENCODING": encoding}
    found = subprocess.run(command, capture_output=True, env=env, check=False)
    assert (found.returncode, found.stderr) == (0, b"")
    shown = name.encode(encoding, errors="backslashreplace")
    assert shown + b": 10 good to train" in found.stdout and b"index: " in found.stdout


@pytest.mark.parametrize("work", [lambda: b" " * 10**17, lambda: torch.empty(10**15)])
def test_memory_that_runs_out_is_one_line(work, capsys):
    with pytest.raises(SystemExit) as ended:
        run(work)
    assert ended.value.code == 2
    assert "out of memory; a smaller --image-size" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="size"):
        run(lambda: torch.zeros(2) @ torch.zeros(3))


@pytest.mark.parametrize(
    "script", ("resnet18_training.py", "teacher_training.py", "students_training.py", "anomaly_detection.py")
)
def test_an_unknown_category_is_one_line_and_status_2(script, tmp_path):
    command = [sys.executable, ROOT / "src" / script, "nonsense", "--data", tmp_path]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ, check=False)
    assert found.returncode == 2
    assert found.stderr.count("\n") == 1
    assert "mvtec_dataset.sh nonsense" in found.stderr
