"""A full or read-only disk ends every command in one line, and nothing is half-written.

Detection and the students' training are in test_stages.py.
"""

import contextlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from student_teacher.runtime import checkpoints
from student_teacher.runtime.errors import UserError
from student_teacher.runtime.paths import ROOT
from student_teacher.training import loop
from tests.test_stages import (  # noqa: F401  (fixtures)
    CATEGORY,
    Place,
    checkpoint_kind,
    data,
    done,
    ends_in_one_line,
    small_disk,
    tensors,
)

FULL, READ_ONLY = "No space left on device", "Read-only file system"


def fill(disk, but=0):
    """Take all that is left, but for some bytes."""
    with (disk / "filler").open("wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while True:
                file.write(b" " * 4096)
        file.truncate(max(0, file.tell() - but))


def close(disk):
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)


def fails(arguments, words, status=2):
    """The command ends with one line on standard error that has these words."""
    found = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=120
    )
    lines = [line for line in found.stderr.splitlines() if line.strip() and "%|" not in line]
    assert (found.returncode, len(lines)) == (status, 1), found.stderr
    assert words in lines[0]
    return lines[0]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def changes_nothing(command, disk, before):
    """What a command prints on the full disk; there and on the closed one it leaves the contents as they were."""
    printed = fails(command, FULL)
    assert contents(disk) == before
    close(disk)
    fails(command, READ_ONLY)
    assert contents(disk) == before
    return printed


@pytest.mark.slow
def test_the_index(small_disk):  # noqa: F811
    folder = small_disk / CATEGORY / "train/good"
    folder.mkdir(parents=True)
    for number in range(3):
        Image.fromarray(np.full((8, 8), number, np.uint8)).save(folder / f"{number}.png")
    fill(small_disk)
    before = contents(small_disk)
    command = [ROOT / "mvtec_dataset.py", CATEGORY, "--data", small_disk]
    assert f"{CATEGORY}.csv can't be written" in fails(command, FULL)  # a closed disk's index goes elsewhere
    command += ["--index", small_disk / "index.csv"]
    assert "index.csv can't be written" in changes_nothing(command, small_disk, before)


BACKBONE = ["--backbone-weights", "random", "--image-size", "32", "--epochs", "1", "--batch-size", "8"]
TEACHER = ["--backbone-weights", "random", "--distillation", "patches", "--patch-size", "17"]
TEACHER += ["--steps", "2", "--batch-size", "4"]
TRAININGS = [
    ("resnet18_training", "resnet18", "backbone", BACKBONE),
    ("teacher_training", "teacher_17", "teacher", TEACHER),
]


@pytest.mark.slow
@pytest.mark.parametrize("stage, name, kind, options", TRAININGS)
def test_backbone_and_teacher(data, small_disk, stage, name, kind, options):  # noqa: F811
    command = [ROOT / f"src/{stage}.py", CATEGORY, *options, "--data", data, "--model", small_disk]
    curve = {f"{name}_training.{ending}" for ending in ("csv", "png", "svg")}  # whole, and written first
    left = ends_in_one_line(command, FULL)
    assert {path.name for path in left} <= curve
    before = contents(small_disk)
    for path in left:
        assert path.stat().st_size
        if path.suffix == ".png":
            Image.open(path).load()
    close(small_disk)
    ends_in_one_line(command, READ_ONLY)
    ends_in_one_line([*command[:2], "--restart", *command[2:]], READ_ONLY)
    assert contents(small_disk) == before
    subprocess.run(["mount", "-o", "remount,rw,size=100m", small_disk], check=True)
    for words in ("saved", "trained already"):
        found = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True)
        assert words in found.stdout
    assert checkpoints.load(small_disk / CATEGORY / f"{name}.pt", kind)
    assert {path.name for path in (small_disk / CATEGORY).iterdir()} == {f"{name}.pt", *curve}


class Filling(loop.Training):
    """Fills the disk in its second step."""

    def report(self, loss, **parts):
        super().report(loss, **parts)
        if self.step == 1:
            fill(self._path.parents[1])


@pytest.mark.slow
@pytest.mark.parametrize("stage, name", [("backbone", "resnet18"), ("teacher", "teacher_17")])
def test_a_training_goes_on_where_its_last_checkpoint_fitted(done, small_disk, tmp_path, monkeypatch, stage, name):  # noqa: F811
    subprocess.run(["mount", "-o", "remount,size=600m", small_disk], check=True)
    place = Place(tmp_path, done.data)
    place.model = small_disk
    place.folders[-1] = str(small_disk)
    (small_disk / CATEGORY).mkdir()
    if stage == "teacher":  # it is distilled from the backbone
        shutil.copyfile(done.model / CATEGORY / "resnet18.pt", small_disk / CATEGORY / "resnet18.pt")
    monkeypatch.setattr(loop, "SECONDS_BETWEEN_CHECKPOINTS", -1)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "Training", Filling)
        with pytest.raises(UserError, match=FULL):
            getattr(place, stage)()
    assert place.load(f"{name}.checkpoint.pt", checkpoint_kind(stage))["step"] == 1
    assert not (small_disk / CATEGORY / f"{name}.pt").exists()
    (small_disk / "filler").unlink()
    getattr(place, stage)()
    found, expected = (tensors(each.load(f"{name}.pt", stage)) for each in (place, done))
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    assert not list((small_disk / CATEGORY).glob(".*")) and not list((small_disk / CATEGORY).glob("*checkpoint*"))


@pytest.mark.slow
def test_a_threshold_that_is_to_be_kept(done, small_disk):  # noqa: F811
    subprocess.run(["mount", "-o", "remount,size=90m", small_disk], check=True)
    (small_disk / CATEGORY).mkdir()
    shutil.copyfile(done.model / CATEGORY / "detector.pt", small_disk / CATEGORY / "detector.pt")
    fill(small_disk)
    before = contents(small_disk)
    images = done.data / CATEGORY / "test"
    options = ["--data", done.data, "--model", small_disk, "--output", done.results / "kept"]
    command = [ROOT / "src/anomaly_detection.py", CATEGORY, *options, "--input", images]
    command += ["--threshold", "2", "--save-threshold"]
    changes_nothing(command, small_disk, before)


@pytest.mark.slow
def test_an_onnx_file(done, small_disk):  # noqa: F811
    pytest.importorskip("onnx", reason="optional: requirements-onnx.txt")
    command = [ROOT / "src/export_onnx.py", CATEGORY, "--model", done.model, "--output", small_disk / "detector.onnx"]
    changes_nothing(command, small_disk, {})


@pytest.mark.slow
@pytest.mark.parametrize("save", [["--save", "maps"], []])
def test_watching(done, small_disk, save):  # noqa: F811
    watched = done.data / CATEGORY / "test"
    fill(small_disk, but=(6 if save else 2) * 4096)  # for the tables, and some maps
    options = ["--watch", "--threshold", "2", "--input", watched, *save, "--output", small_disk]
    command = [ROOT / "src/anomaly_detection.py", CATEGORY, *done.folders, *options]
    fails(command, FULL)
    rows = [line.split(",") for path in small_disk.glob("decisions.csv") for line in path.read_text().splitlines()]
    assert all(len(row) == 5 for row in rows)
    for path in small_disk.rglob("*.tiff"):
        Image.open(path).load()
    before = contents(small_disk)
    close(small_disk)
    fails(command, READ_ONLY)
    assert contents(small_disk) == before


@pytest.mark.slow
def test_all_categories(data, done, small_disk):  # noqa: F811
    options = ["--data", done.data, "--model", done.model, "--patch-size", "17", "--image-size", "32"]
    options += ["--students", "2", "--students-training=--epochs 3", "--results", small_disk]
    command = [sys.executable, ROOT / "src/all_categories.py", CATEGORY, *options]
    found = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=120)
    lines = [line for line in found.stderr.splitlines() if line.strip() and "%|" not in line]
    assert found.returncode in (1, 2) and "Traceback" not in found.stderr
    assert any(FULL in line for line in lines) and len(lines) == 2  # of the stage, and why the category failed
    for path in small_disk.rglob("*.tiff"):
        Image.open(path).load()
    close(small_disk)
    before = contents(small_disk)
    fails(command[1:], READ_ONLY)
    assert contents(small_disk) == before
