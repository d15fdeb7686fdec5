"""A full or read-only disk ends every command in one line, and nothing is half-written.

Detection and training are in test_stages.py.
"""

import contextlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from student_teacher.runtime.paths import ROOT
from tests.test_stages import (  # noqa: F401  (fixtures)
    CATEGORY,
    data,
    done,
    ends_in_one_line,
    small_disk,
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
