"""Where a category's index lies: in its folder, where --index says, or elsewhere because the folder takes no files."""

import errno
import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest

import mvtec_dataset
from AnomalyDataset import AnomalyDataset
from student_teacher.images import index
from student_teacher.reports.leak_report import find_leaks, write_split
from student_teacher.runtime.errors import UserError
from student_teacher.runtime.files import write_atomically, writing
from student_teacher.runtime.paths import ROOT
from tests.test_mvtec_dataset import category, files, picture, script  # noqa: F401  (a fixture)
from tests.test_stages import CATEGORY, Place, make_category, small_disk  # noqa: F401  (a fixture)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "ELSEWHERE", tmp_path / "index")
    return tmp_path / "index"


def refuse(monkeypatch, folder, number):
    """Let a folder take no index, as if with this errno."""

    def write(path, content):
        with writing(path):
            if path.is_relative_to(folder):
                raise OSError(number, os.strerror(number))
        write_atomically(path, content)

    monkeypatch.setattr(index, "write_atomically", write)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_where_a_folder_takes_no_files_all_find_its_index_elsewhere(category, elsewhere, monkeypatch, capsys, number):  # noqa: F811
    refuse(monkeypatch, category, number)
    before = files(category)
    mvtec_dataset.main(["tiny", "--data", str(category.parent)])
    place = elsewhere / category.relative_to("/") / "tiny.csv"
    out = capsys.readouterr().out
    assert f"{category} takes no files: its index goes below {elsewhere}\n" in out
    assert out.endswith(f"index: {place}\n") and place.with_suffix(".json").exists()
    assert files(category) == before
    assert len(AnomalyDataset(category)) == len(find_leaks(category).kinds) + 3 == 6
    (category.parent / "link").symlink_to(category.parent, target_is_directory=True)
    assert len(AnomalyDataset(category.parent / "link" / "tiny")) == 6

    picture(category / "train/good/new.png")
    assert len(AnomalyDataset(category)) == 7
    assert f"{place} is written again: 1 came: train/good/new.png" in capsys.readouterr().out
    assert len(AnomalyDataset(category)) == 7
    assert "written again" not in capsys.readouterr().out
    place.write_text("".join(line for line in place.open() if "new" not in line))
    assert len(AnomalyDataset(category)) == 6
    assert "was changed by hand" in capsys.readouterr().err


def test_an_index_that_a_folder_has_already_is_read_there_until_it_must_change(category, elsewhere, monkeypatch):  # noqa: F811
    mvtec_dataset.prepare(category)
    refuse(monkeypatch, category, errno.EROFS)
    mvtec_dataset.prepare(category)
    assert len(AnomalyDataset(category)) == 6 and not elsewhere.exists()
    before = (category / "tiny.csv").read_bytes()
    picture(category / "train/good/new.png")
    assert len(AnomalyDataset(category)) == len(AnomalyDataset(category)) == 7
    assert (category / "tiny.csv").read_bytes() == before and elsewhere.exists()


def test_settings_alone_that_change_take_the_index_along(category, elsewhere, monkeypatch):  # noqa: F811
    mvtec_dataset.prepare(category)
    refuse(monkeypatch, category, errno.EROFS)
    mvtec_dataset.prepare(category, mask_threshold=7)
    assert AnomalyDataset(category).mask_threshold == 7
    assert len(list(elsewhere.rglob("tiny.*"))) == 2


def test_a_full_disk_is_no_reason_to_write_elsewhere(category, elsewhere, monkeypatch):  # noqa: F811
    refuse(monkeypatch, category, errno.ENOSPC)
    with pytest.raises(UserError, match=r"tiny\.csv can't be written: No space left on device; --index FILE"):
        mvtec_dataset.prepare(category)
    assert not elsewhere.exists()


@pytest.mark.parametrize("given", ["my index.csv", "folder"])
def test_the_index_lies_where_the_option_says(category, tmp_path, capsys, given):  # noqa: F811
    place = tmp_path / given if given.endswith(".csv") else tmp_path / given / "tiny.csv"
    command = rf"\./mvtec_dataset\.sh tiny --index {shlex.quote(str(tmp_path / given))}"
    with pytest.raises(UserError, match=rf"no index yet; run {command}"):
        AnomalyDataset(category, index=tmp_path / given)
    before = files(category)
    found = script("tiny", "--index", tmp_path / given, "--check-leaks", data=category.parent)
    assert found.returncode == 0 and f"index: {place}\n" in found.stdout and "likely to show a part" in found.stdout
    assert files(category) == before
    assert len(AnomalyDataset(category, index=tmp_path / given)) == 6
    picture(category / "train/good/new.png")
    assert len(AnomalyDataset(category, index=tmp_path / given)) == 7
    assert "is written again: 1 came" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"tiny/tiny\.csv: the category has no index yet"):
        AnomalyDataset(category)
    assert "images change sides" in write_split(category, tmp_path / "split.csv", tmp_path / given)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("mine.csv", "a,b\n1,2\n", r"mine\.csv: no index of a category; move it away, and run .* --index"),
        ("mine.json", '{"a": 1}', r"mine\.json: cannot be read \(not the settings of an index\); move it away"),
        ("mine.json", "[]", r"mine\.json: cannot be read \(not the settings of an index\); move it away"),
        ("mine.json", json.dumps({"category": "nut"}), r"mine\.json is of nut, not of tiny: give another --index"),
    ],
)
def test_files_that_are_no_index_of_this_category_are_not_replaced(category, tmp_path, name, content, message):  # noqa: F811
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        mvtec_dataset.prepare(category, index=tmp_path / "mine.csv")
    assert (tmp_path / name).read_text() == content


def test_the_index_does_not_lie_among_the_images(category):  # noqa: F811
    with pytest.raises(UserError, match="among the images"):
        mvtec_dataset.prepare(category, index=category / "train")
    mvtec_dataset.prepare(category, index=category)  # its usual place
    assert len(AnomalyDataset(category)) == 6


@pytest.mark.slow
def test_all_stages_work_on_a_folder_that_takes_no_files(small_disk, tmp_path, elsewhere, monkeypatch, capsys):  # noqa: F811
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    make_category(small_disk)
    shutil.copytree(small_disk / CATEGORY, small_disk / "weave")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    place = Place(tmp_path, small_disk)

    def stages(*where):
        for stage in (place.backbone, place.teacher, place.students):
            stage(*where, *(() if stage == place.students else ("--restart",)))
        place.detection(*where, "--save", "--threshold", "best-f1", "--save-threshold")

    mvtec_dataset.main([CATEGORY, "--data", str(small_disk)])
    stages()
    assert "takes no files" in capsys.readouterr().out and list(elsewhere.rglob(f"{CATEGORY}.csv"))
    monkeypatch.setattr(index, "ELSEWHERE", tmp_path / "another")
    where = ["--index", str(tmp_path / "given")]
    with pytest.raises(UserError, match="no index yet"):
        place.backbone("--restart")
    mvtec_dataset.main([CATEGORY, "--data", str(small_disk), *where])
    stages(*where)
    assert not (tmp_path / "another").exists()

    command = [sys.executable, ROOT / "src/all_categories.py", *place.folders, "--results", place.results]
    command += ["--image-size", "32", "--patch-size", "17", "--students", "2", "--students-training=--epochs 3"]
    one = subprocess.run([*command, "--index", tmp_path / "one.csv"], capture_output=True, text=True)
    assert one.returncode == 2 and "one.csv is of one category" in one.stderr
    both = subprocess.run([*command, *where], capture_output=True, text=True)
    assert both.returncode == 0 and "2 of 2 done" in both.stdout, both.stderr
    again = subprocess.run([*command, *where], capture_output=True, text=True)
    assert again.stdout.count("done already") == 2
    (tmp_path / "given" / "weave.json").touch()
    again = subprocess.run([*command, *where], capture_output=True, text=True)
    assert again.stdout.count("done already") == 1
