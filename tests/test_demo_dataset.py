import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import demo_dataset
import mvtec_dataset
from student_teacher.runtime.errors import UserError
from student_teacher.runtime.paths import ROOT

PARAMETERS = {"seed": 3, "image_size": 64, "train": 3, "test_good": 1, "test_per_kind": 2}
COMMAND = [sys.executable, ROOT / "demo_dataset.py", "--image-size", "64", "--train", "3", "--test-good", "1"]


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small category, made once; tests that change it copy it."""
    category = tmp_path_factory.mktemp("data") / "demo_carpet"
    assert demo_dataset.write_category(category, PARAMETERS)
    return category


def test_the_layout_is_that_of_mvtec(made):
    names = {path.as_posix() for path in contents(made)}
    expected = {"demo_dataset.json", "test/good/000.png"} | {f"train/good/{number:03d}.png" for number in range(3)}
    for kind in ("cut", "hole", "thread", "stain", "metal"):
        expected |= {f"test/{kind}/00{number}.png" for number in range(2)}
        expected |= {f"ground_truth/{kind}/00{number}_mask.png" for number in range(2)}
    assert names == expected


def test_its_index_can_be_made(made, tmp_path):
    category = tmp_path / "demo_carpet"
    demo_dataset.write_category(category, PARAMETERS)
    rows = mvtec_dataset.prepare(category)
    assert sum(row["label"] for row in rows) == 10
    assert not demo_dataset.write_category(category, PARAMETERS)  # an index alone does not make it again


def test_same_seed_same_bytes_and_another_seed_another_carpet(made, tmp_path):
    demo_dataset.write_category(tmp_path / "again", PARAMETERS)
    assert contents(tmp_path / "again") == contents(made)
    demo_dataset.write_category(tmp_path / "other", PARAMETERS | {"seed": 4})
    other = contents(tmp_path / "other")
    assert all(other[name] != content for name, content in contents(made).items() if "ground_truth" not in name.parts)


def test_more_images_leave_the_first_as_they_were(made, tmp_path):
    demo_dataset.write_category(tmp_path / "larger", PARAMETERS | {"train": 4})
    larger = contents(tmp_path / "larger")
    train = {name: content for name, content in contents(made).items() if name.parts[0] == "train"}
    assert len(train) == 3
    assert all(larger[name] == content for name, content in train.items())


def test_no_two_good_images_are_alike(made):
    good = np.stack([np.asarray(Image.open(path), float) for path in sorted(made.glob("*/good/*.png"))])
    assert good.shape == (4, 64, 64, 3)
    for first in range(4):
        for second in range(first):
            assert np.abs(good[first] - good[second]).mean() > 5
    assert (good.std(axis=(1, 2)) > 10).all()  # a weave, not a plain


@pytest.mark.parametrize("kind", demo_dataset.DEFECTS)
@pytest.mark.parametrize("strength", [1.0, demo_dataset.WEAKEST])
def test_masks_mark_what_the_defect_changed(kind, strength):
    """One seed is one carpet: with and without its defect, it differs where the mask says."""
    picture, mask = demo_dataset.make_image(kind, strength, [5], 128)
    bare, none = demo_dataset.make_image("good", 0, [5], 128)
    assert picture.mode == "RGB"
    assert mask.mode == "L"
    assert set(np.unique(mask)) == {0, 255}
    assert not np.asarray(none).any()

    change = np.abs(np.asarray(picture, float) - np.asarray(bare, float)).mean(axis=-1)
    marked = np.asarray(mask) > 0
    assert 10 < marked.sum() < 0.06 * marked.size
    assert change[marked].mean() > 3 * change[~marked].mean()


def test_strengths_go_from_plain_to_hard():
    plan = demo_dataset.plan(train=1, test_good=1, test_per_kind=8)
    for kind in demo_dataset.DEFECTS:
        strengths = [strength for folder, _, strength in plan if folder == f"test/{kind}"]
        assert strengths == sorted(strengths, reverse=True)
        assert (strengths[0], strengths[-1]) == (1, demo_dataset.WEAKEST)


def test_run_twice_does_nothing(tmp_path):
    command = [*COMMAND, "--data", tmp_path, "--test-per-kind", "1"]
    first = subprocess.run(command, check=True, capture_output=True, text=True)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    second = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "made" in first.stdout
    assert "unchanged" in second.stdout
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == times
    assert [path.name for path in tmp_path.iterdir()] == ["demo_carpet"]


def test_other_parameters_or_a_lost_image_make_it_again(tmp_path):
    category = tmp_path / "demo_carpet"
    small = {"seed": 0, "image_size": 32, "train": 2, "test_good": 0, "test_per_kind": 0}
    demo_dataset.write_category(category, small)
    (category / "train/good/001.png").unlink()
    assert demo_dataset.write_category(category, small)
    assert len(list(category.glob("train/good/*.png"))) == 2
    assert demo_dataset.write_category(category, small | {"train": 1})
    assert len(list(category.glob("train/good/*.png"))) == 1
    assert json.loads((category / "demo_dataset.json").read_text())["train"] == 1


def test_an_interruption_leaves_nothing_that_looks_complete(tmp_path, monkeypatch):
    small = {"seed": 0, "image_size": 32, "train": 2, "test_good": 0, "test_per_kind": 0}

    def interrupted(jobs, **_):
        next(iter(jobs))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demo_dataset, "tqdm", interrupted)
        with pytest.raises(KeyboardInterrupt):
            demo_dataset.write_category(tmp_path / "demo_carpet", small)
    assert not (tmp_path / "demo_carpet").exists()
    assert demo_dataset.write_category(tmp_path / "demo_carpet", small)
    assert [path.name for path in tmp_path.iterdir()] == ["demo_carpet"]


def test_a_folder_of_the_users_is_not_touched(tmp_path):
    (tmp_path / "demo_carpet").mkdir()
    (tmp_path / "demo_carpet/mine.txt").write_text("mine")
    with pytest.raises(UserError, match="not a demo category"):
        demo_dataset.write_category(tmp_path / "demo_carpet", PARAMETERS)
    assert [path.name for path in (tmp_path / "demo_carpet").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    "options", [["--image-size", "8"], ["--train", "0"], ["--seed", "-1"], ["--category", "../up"], ["--category", ""]]
)
def test_senseless_options_are_one_line(tmp_path, options):
    result = subprocess.run(
        [sys.executable, ROOT / "demo_dataset.py", "--data", tmp_path, *options], capture_output=True, text=True
    )
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert not any(tmp_path.iterdir())
