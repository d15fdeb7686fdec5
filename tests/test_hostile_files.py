"""Files that were made, or named, to do harm: each is named or counted, and the good ones beside them are decided."""

import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from student_teacher.images import reading
from student_teacher.images.folders import told
from student_teacher.images.indexing import check_images, index_category
from student_teacher.reports import inspection, watching
from student_teacher.runtime import checkpoints
from student_teacher.runtime.errors import UserError, shown
from student_teacher.runtime.files import fitting, remove_unfinished, write_atomically
from student_teacher.runtime.paths import ROOT
from tests.test_detector import CATEGORY, folder, run  # noqa: F401  (a fixture)
from tests.test_stages import data, done  # noqa: F401  (fixtures)
from tests.test_watching import line  # noqa: F401  (a fixture)
from tests.tiff import tiff_of


def picture(path, side=24):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(path)
    return path


def test_links_in_a_circle_pipes_and_long_names_do_not_stop_the_others(folder, tmp_path, capsys):  # noqa: F811
    images = tmp_path / "in"
    good = [picture(images / f"{name}.png") for name in ("good", "x" * 251)]
    for name, target in (("circle.png", "circle.png"), ("nowhere.png", "gone.png"), ("zero.png", "/dev/zero")):
        (images / name).symlink_to(target)
    os.mkfifo(images / "pipe.png")
    assert run(folder, tmp_path, "--input", images, images / "pipe.png", "--output", tmp_path / "out") == 3
    with (tmp_path / "out/decisions.csv").open() as file:
        assert [row["path"] for row in csv.DictReader(file)] == [str(path) for path in good]
    told = capsys.readouterr().err
    assert told.count("not inspected: ") == 3
    assert f"not inspected: {images / 'circle.png'}: cannot be read (Too many levels of symbolic links)" in told
    assert f"not inspected: {images / 'pipe.png'}: cannot be read (a pipe or a device, not a file)" in told
    assert "passed over 2 files, hidden or not images by name: pipe.png, zero.png" in told
    assert run(folder, tmp_path, "--input", images, images / "pipe.png", "--output", tmp_path / "out") == 3


def test_a_name_that_is_too_long_is_shortened_and_stays_the_only_one(tmp_path):
    names = [f"{'é' * 125}{number}.png.tiff" for number in range(2)]
    short = [fitting(tmp_path / name) for name in names]
    assert short[0] != short[1] and fitting(tmp_path / "a.tiff") == tmp_path / "a.tiff"
    for path in short:
        write_atomically(path, b"content")
        assert path.suffix == ".tiff"
    assert set(tmp_path.iterdir()) == set(short)


def test_names_with_line_ends_and_broken_characters_stay_on_one_line(tmp_path):
    assert shown("a\nb\x1b[31m\udcff é") == r"a\nb\x1b[31m\udcff é"
    assert "\n" not in told([tmp_path / "a\nb.txt"], tmp_path)
    (tmp_path / "a\nb.png").write_bytes(b"broken")
    with pytest.raises(UserError) as refused:
        reading.load_rgb(tmp_path / "a\nb.png")
    assert "\n" not in str(refused.value)
    row = {"image_name": "a\nb.png", "gt_name": "", "label": 0, "type": "train"}
    assert check_images(tmp_path, [row])[0].problems[0].startswith(r"a\nb.png: not an image")


@pytest.mark.parametrize(
    ("name", "words"), [("a.eps", "images of the kind eps are not read"), ("a.png", "not an image")]
)
def test_a_program_in_postscript_is_never_run(tmp_path, monkeypatch, name, words):
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch '{tmp_path}/was_run'\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (tmp_path / name).write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n%%EOF\n")
    with pytest.raises(UserError, match=words):
        reading.load_rgb(tmp_path / name)
    assert reading.is_image(tmp_path / name)  # by its name: it is named, not passed over
    assert not (tmp_path / "was_run").exists()


def test_a_file_that_is_called_as_a_page_of_another_is_not_taken_for_it(tmp_path):
    pages = [Image.new("L", (9, 9), value) for value in (1, 2)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    assert len(reading.pages_of(tmp_path / "a.tif")) == 2
    (tmp_path / "a.tif#2").write_bytes(b"other")
    assert reading.pages_of(tmp_path / "a.tif") == [tmp_path / "a.tif"]
    with pytest.raises(UserError, match="rename a file that is called so itself"):
        reading.load_rgb(tmp_path / "a.tif")


def test_large_values_are_scaled_in_parts_as_at_once():
    values = np.random.default_rng(0).normal(0, 1, (5, 3_000_000)).astype(np.float32)
    values[0, :3] = np.nan, np.inf, -np.inf
    found = reading.to_8_bit(values, (-1, 1))
    expected = np.rint(np.clip((np.nan_to_num(values[:, :99].astype(float), nan=-1) + 1) / 2, 0, 1) * 255)
    assert np.array_equal(found[:, :99], expected)


def test_an_image_beyond_large_is_reduced_once_it_is_decoded(tmp_path, monkeypatch):
    picture(tmp_path / "a.png", 64)
    whole = reading.load_rgb(tmp_path / "a.png")
    assert reading.load_reduced(tmp_path / "a.png", 16)[0].size == (64, 64)
    monkeypatch.setattr(reading, "LARGE", 64 * 64 - 1)
    reduced, size = reading.load_reduced(tmp_path / "a.png", 16)
    assert (reduced.size, size) == ((16, 16), (64, 64))
    assert np.allclose(reduced, whole.reduce(4))
    assert reading.load_reduced(tmp_path / "a.png", None)[0].size == (64, 64)


def test_what_a_kill_has_left_of_a_file_is_removed_and_nothing_else(tmp_path):
    others = [tmp_path / name for name in (".notes.12345678", ".detector.pt.backup", "detector.pt.12345678")]
    for path in (*others, tmp_path / ".detector.pt.12345678"):
        path.write_bytes(b"half")
    remove_unfinished([tmp_path / "detector.pt", tmp_path / "missing/detector.pt"])
    assert sorted(tmp_path.iterdir()) == sorted(others)
    (tmp_path / ".detector.pt.12345678").write_bytes(b"half")
    checkpoints.save(tmp_path / "detector.pt", "detector", CATEGORY, {})
    assert sorted(tmp_path.iterdir()) == sorted([*others, tmp_path / "detector.pt"])


def test_watching_follows_links_and_counts_what_is_no_image(line, capsys, tmp_path):  # noqa: F811
    path, content = line.picture("not\udcff utf-8.png")
    path.write_bytes(content)
    picture(tmp_path / "elsewhere/b.png")
    (line.images / "linked").symlink_to(tmp_path / "elsewhere")
    (line.images / "up").symlink_to(line.images)
    (line.images / "results").symlink_to(line.output)  # whose pictures are not watched
    (line.images / "notes.txt").write_text("no image")
    os.mkfifo(line.images / "pipe.png")
    sys.stdout.reconfigure(errors="backslashreplace")  # as errors.run does
    line.watch(options=("--save", "overlays"))
    assert [row["path"] for row in line.rows()] == [
        str(line.images / "linked/b.png"),
        str(path).replace("\udcff", "?"),
    ]
    assert "passed over 2 files, hidden or not images by name: notes.txt, pipe.png" in capsys.readouterr().err


def test_watching_names_a_folder_that_it_can_not_look_into_once(tmp_path, capsys):
    folders = watching.Folders([tmp_path], tmp_path / "out")
    for error in (PermissionError(13, "Permission denied", "a\nb"), FileNotFoundError(2, "gone", "c")) * 2:
        folders._refuse(error)
    assert capsys.readouterr().err == "not looked into: a\\nb (Permission denied)\n"


@pytest.fixture
def locked():
    """A folder with a good image, one that may not be read, and one in a folder that may be listed but not entered."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        place.chmod(0o755)
        for path in ("train/good/a.png", "train/good/locked.png", "train/good/closed/b.png"):
            picture(place / path)
        (place / "train/good/locked.png").chmod(0)
        (place / "train/good/closed").chmod(0o444)
        user = os.geteuid()
        if user == 0:  # who may read everything
            os.seteuid(65534)
        yield place / "train/good"
        os.seteuid(user)
        (place / "train/good/closed").chmod(0o755)


def test_files_without_permission_are_named_and_folders_end_the_command(locked, capsys):
    files, passed_over = inspection.files_in([locked], locked / "out")
    names = [path.relative_to(locked).as_posix() for path, _ in files]
    assert (names, passed_over) == (["a.png", "closed/b.png", "locked.png"], [])
    for name in names[1:]:
        with pytest.raises(UserError, match=rf"{name}: cannot be read \(Permission denied\)"):
            reading.load_rgb(locked / name)
    with pytest.raises(UserError, match="2 problems, no index written"):
        index_category(locked.parents[1])
    watched = watching.Folders([locked], locked / "out")
    assert [path for path in watched() if watched.wants(path)] == [path for path, _ in files]
    os.seteuid(0) if os.getuid() == 0 else None
    (locked / "closed").chmod(0)
    os.seteuid(65534) if os.getuid() == 0 else None
    with pytest.raises(UserError, match=r"closed: cannot be read .* make it readable, or move it away"):
        inspection.files_in([locked], locked / "out")
    assert len(list(watched())) == len(list(watched())) == 2
    assert capsys.readouterr().err.count("not looked into: ") == 1


@pytest.mark.slow
def test_lines_of_any_bytes_are_answered(done, tmp_path):  # noqa: F811
    good = picture(tmp_path / "good.png")
    os.mkfifo(tmp_path / "pipe.png")
    text = [b"\xff.png", b"zero\0byte.png", b"x" * 5000, os.fsencode(tmp_path / "pipe.png"), os.fsencode(good)]
    command = [ROOT / "src/anomaly_detection.py", CATEGORY, *done.folders, "--input", "-", "--output", tmp_path / "out"]
    found = subprocess.run(
        [sys.executable, *map(str, command)], input=b"\n".join(text) + b"\n", capture_output=True, timeout=300
    )
    assert found.returncode == 3 and b"Traceback" not in found.stderr
    assert found.stderr.count(b"not inspected: ") == 4
    assert os.fsencode(good) in found.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("hostile_files.py", "--often", "1", "--quiet", "10", "--category", CATEGORY),
        ("kills.py", "--kills", "4"),
    ],
)
def test_the_benchmarks_find_nothing_wrong(done, options):  # noqa: F811
    script, *options = options
    if script == "hostile_files.py":
        options += ["--data", str(done.data), "--detector", str(done.model)]
    found = subprocess.run([sys.executable, ROOT / "benchmarks" / script, *options], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


def test_training_images_that_are_not_finite_are_named(tmp_path, capsys):
    good = tmp_path / CATEGORY / "train/good"
    good.mkdir(parents=True)
    for number in range(3):
        pixels = np.random.default_rng(number).random((9, 9)).astype(np.float32)
        pixels[0, 0] = (1, np.nan, np.inf)[number]
        (good / f"{number}.tif").write_bytes(tiff_of(pixels))
    index_category(tmp_path / CATEGORY)
    told = capsys.readouterr().err
    assert "values that are not finite, in 2 images: train/good/1.tif, train/good/2.tif" in told
