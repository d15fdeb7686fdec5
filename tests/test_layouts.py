"""A small category in each layout, from its folders to its figures."""

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageDraw

import all_categories
import anomaly_detection
import mvtec_dataset
import students_training
from AnomalyDataset import AnomalyDataset
from student_teacher.detection.Detector import load_detector
from student_teacher.images.index import LEARNED, kind_of
from student_teacher.images.labelme import drawn_mask
from student_teacher.images.layouts import PRIVATE, drawn_for_test, is_category
from student_teacher.images.reading import load_mask
from student_teacher.runtime.errors import UserError
from student_teacher.training import backbone_students
from tests.test_mvtec_dataset import script

SIDE = 64
BOX = np.s_[20:36, 24:40]  # where defects are


def photograph(path, seed=0, defect=False):
    """Stripes with noise, each seed its own; a defect is a white box."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = 100 + 40 * np.sin(np.arange(SIDE) / 3) + np.random.default_rng(seed).normal(0, 6, (SIDE, SIDE))
    if defect:
        values[BOX] = 250
    Image.fromarray(np.clip(values, 0, 255).astype(np.uint8)).save(path)


def box(path, value=255):
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[BOX] = value
    Image.fromarray(mask).save(path)


def photographs(folder, number, first=0, suffix="png", defect=False):
    for place in range(number):
        photograph(folder / f"{place:03}.{suffix}", first + place, defect)


def shapes(path, *shapes, size=(SIDE, SIDE)):
    """A labelme file, of shapes (type, points)."""
    found = [{"label": "defect", "shape_type": kind, "points": points} for kind, points in shapes]
    content = {"version": "5.5.0", "shapes": found, "imageHeight": size[0], "imageWidth": size[1], "imageData": None}
    path.write_text(json.dumps(content))


RECTANGLE = "rectangle", [[24, 20], [39, 35]]  # BOX


def mvtec_ad(folder):
    photographs(folder / "train/good", 5)
    photographs(folder / "test/good", 3, 20)
    photographs(folder / "test/hole", 2, 30, defect=True)
    for number in range(2):
        box(folder / f"ground_truth/hole/{number:03}_mask.png")


def mvtec_ad_2(folder):
    photographs(folder / "train/good", 3)
    photographs(folder / "validation/good", 2, 10)
    photographs(folder / "test_public/good", 3, 20)
    photographs(folder / "test_public/bad", 2, 30, defect=True)
    for number in range(2):
        box(folder / f"test_public/ground_truth/bad/{number:03}_mask.png")
    photographs(folder / "test_private", 2, 40)
    photographs(folder / "test_private_mixed", 1, 50)


def mvtec_loco(folder):
    photographs(folder / "train/good", 3)
    photographs(folder / "validation/good", 2, 10)
    photographs(folder / "test/good", 3, 20)
    photographs(folder / "test/logical_anomalies", 2, 30, defect=True)
    for name in ("000/000", "000/001", "001/000"):
        box(folder / f"ground_truth/logical_anomalies/{name}.png")
    kind = {"defect_name": "extra", "pixel_value": 255, "saturation_threshold": 0.5, "relative_saturation": True}
    (folder / "defects_config.json").write_text(json.dumps([kind]))


def visa(folder):
    photographs(folder / "Data/Images/Normal", 8, suffix="JPG")
    photographs(folder / "Data/Images/Anomaly", 2, 30, suffix="JPG", defect=True)
    lines = ["object,split,label,image,mask"]
    for number in range(8):
        split = "train" if number < 5 else "test"
        lines.append(f"{folder.name},{split},normal,{folder.name}/Data/Images/Normal/{number:03}.JPG,")
    for number in range(2):
        box(folder / f"Data/Masks/Anomaly/{number:03}.png", value=number + 1)
        image, mask = (f"{folder.name}/Data/{kind}/Anomaly/{number:03}" for kind in ("Images", "Masks"))
        lines.append(f"{folder.name},test,anomaly,{image}.JPG,{mask}.png")
    lines.append("other,train,normal,other/Data/Images/Normal/000.JPG,")
    (folder.parent / "split_csv").mkdir()
    (folder.parent / "split_csv/1cls.csv").write_text("\n".join(lines) + "\n")


def btad(folder):
    photographs(folder / "train/ok", 5, suffix="bmp")
    photographs(folder / "test/ok", 3, 20, suffix="bmp")
    photographs(folder / "test/ko", 2, 30, suffix="bmp", defect=True)
    box(folder / "ground_truth/ko/000.png")
    box(folder / "ground_truth/ko/001.bmp")


def ok_ng(folder):
    photographs(folder / "OK/2024-05-01", 4)
    photographs(folder / "OK/2024-05-02", 4, 10)
    photographs(folder / "ng/2024-05-01", 1, 30, defect=True)
    photographs(folder / "ng/2024-05-02", 1, 40, defect=True)


# layout: what its line starts with, and how many images are of each type and label
LAYOUTS = {
    mvtec_ad: ("MVTec AD", {("train", 0): 5, ("test", 0): 3, ("test", 1): 2}),
    mvtec_ad_2: (
        "MVTec AD 2; students learn from validation/ as from train/; test_private and test_private_mixed without",
        {
            **{("train", 0): 3, ("validation", 0): 2, ("test", 0): 3, ("test", 1): 2},
            **{("test_private", -1): 2, ("test_private_mixed", -1): 1},
        },
    ),
    mvtec_loco: ("MVTec LOCO; students", {("train", 0): 3, ("validation", 0): 2, ("test", 0): 3, ("test", 1): 2}),
    visa: ("VisA, split by ", {("train", 0): 5, ("test", 0): 3, ("test", 1): 2}),
    btad: ("BTAD, train/ok\n", {("train", 0): 5, ("test", 0): 3, ("test", 1): 2}),
    ok_ng: (
        "folders OK and ng, with no split into training and testing; 2 of 8 good images, drawn with seed 0, and all "
        "bad ones are for testing\n",
        {("train", 0): 6, ("test", 0): 2, ("test", 1): 2},
    ),
}


def counts(rows):
    found = {}
    for row in rows:
        found[row["type"], row["label"]] = found.get((row["type"], row["label"]), 0) + 1
    return found


@pytest.fixture(params=LAYOUTS, ids=lambda layout: layout.__name__)
def layout(request, tmp_path):
    """A category in a layout, what its line says, and its counts."""
    category = tmp_path / "data" / "part"
    request.param(category)
    return category, *LAYOUTS[request.param]


def test_a_layout_is_known_by_its_folders(layout, capsys):
    category, line, expected = layout
    rows = mvtec_dataset.prepare(category)
    shown = capsys.readouterr()
    assert f"layout: {line}" in shown.out and shown.out.count("layout: ") == 1
    assert "passed over" not in shown.err
    assert counts(rows) == expected
    masks = [row for row in rows if row["label"] == 1]
    if "OK" not in line:
        for sample in AnomalyDataset(category, label=1):
            assert np.array_equal(
                np.argwhere(sample["mask"]), np.argwhere(np.pad(np.ones((16, 16)), ((20, 28), (24, 24))))
            )
    assert all(bool(row["gt_name"]) == ("OK" not in line) for row in masks)
    assert {kind_of(row) for row in masks} <= {"hole", "bad", "logical_anomalies", "Anomaly", "ko", "ng"}
    arguments = all_categories.parse_arguments(["--data", str(category.parent)])
    assert all_categories.chosen_categories(arguments) == ["part"]


def test_the_index_of_a_layout_follows_its_folder(layout, capsys):
    category, *_ = layout
    rows = mvtec_dataset.prepare(category)
    capsys.readouterr()
    assert AnomalyDataset(category).rows == rows
    assert capsys.readouterr().out == ""
    gone = next(row["image_name"] for row in rows if row["type"] in LEARNED)
    (category / gone).unlink()
    if (split := category.parent / "split_csv/1cls.csv").exists():
        split.write_text("".join(line for line in split.read_text().splitlines(True) if f"part/{gone}" not in line))
    left = AnomalyDataset(category, type=LEARNED).rows
    assert f"1 went: {gone}" in capsys.readouterr().out
    assert gone not in [row["image_name"] for row in left] and counts(left)


@pytest.mark.slow
def test_a_layout_from_training_to_figures(layout, capfd, monkeypatch):
    monkeypatch.setattr(backbone_students, "LOCAL_STEPS", 5)
    monkeypatch.setattr(backbone_students, "COARSE_STEPS", 5)
    category, _, expected = layout
    root = category.parent.parent
    folders = [word for name in ("data", "model") for word in (f"--{name}", str(root / name))]
    mvtec_dataset.main(["part", "--data", str(category.parent)])
    common = ["part", *folders, "--device", "cpu", "--precision", "float32"]
    students_training.main([*common, "--image-size", "64"])
    learned = sum(number for (kind, _), number in expected.items() if kind in LEARNED)
    assert f"{learned} good images" in capfd.readouterr().out
    assert anomaly_detection.main([*common, "--results", str(root / "results")]) == 0
    results = root / "results/part"
    measures = json.loads((results / "metrics.json").read_text())
    tested = expected["test", 0] + expected["test", 1]
    assert len((results / "scores.csv").read_text().splitlines()) == 1 + tested
    assert len([path for path in (results / "figures").rglob("*.jpg")]) == tested
    assert measures["image_au_roc"] == 1
    if "pixel_au_roc" in measures:
        assert measures["pixel_au_roc"] > 0.9
    assert ("pixel_au_roc" in measures) == any(row["gt_name"] for row in AnomalyDataset(category).rows)
    assert ("au_spro" in measures) == (category / "defects_config.json").exists()
    submit = [*common, "--results", str(root / "results"), "--submission", str(root / "submission")]
    if not (category / "test_private").exists():
        with pytest.raises(UserError, match="only MVTec AD 2 takes submissions"):
            anomaly_detection.main(submit)
        return
    assert anomaly_detection.main(submit) == 0
    check_submission(root / "submission", category)
    before = {path: path.read_bytes() for path in (root / "submission").rglob("*.*")}
    next(iter(before)).unlink()
    assert anomaly_detection.main(submit) == 0
    assert {path: path.read_bytes() for path in (root / "submission").rglob("*.*")} == before
    (root / ".submission.part.json").unlink()
    with pytest.raises(UserError, match="not written by this command"):
        anomaly_detection.main(submit)


def check_submission(folder, category):
    """The rules of MVTec AD 2's server: these files and no others, one channel each, float16 and 0 or 255."""
    images = [path for part in PRIVATE for path in (category / part).iterdir()]
    assert {path.name for path in folder.iterdir()} == {"anomaly_images", "anomaly_images_thresholded"}
    for kind, suffix in (("anomaly_images", ".tiff"), ("anomaly_images_thresholded", ".png")):
        wanted = {folder / kind / "part" / image.parent.name / f"{image.stem}{suffix}" for image in images}
        assert {path for path in (folder / kind).rglob("*") if path.is_file()} == wanted
    threshold = load_detector(category.parent.parent / "model/part/detector.pt").decisions().pixel_threshold
    for image in images:
        part = Path("part", image.parent.name, image.stem)
        anomaly_map = tifffile.imread(folder / "anomaly_images" / part.with_suffix(".tiff"))
        marks = np.asarray(Image.open(folder / "anomaly_images_thresholded" / part.with_suffix(".png")))
        assert anomaly_map.dtype == np.float16 and marks.dtype == np.uint8
        assert anomaly_map.shape == marks.shape == Image.open(image).size[::-1]
        assert set(np.unique(marks)) <= {0, 255}
        clear = np.abs(anomaly_map - threshold) > 0.01 * np.abs(anomaly_map)  # beyond what float16 rounds
        assert np.array_equal((anomaly_map > threshold)[clear], (marks == 255)[clear])


# VisA without its split, and a split of one's own


def test_visa_without_its_split_says_so(tmp_path, capsys):
    category = tmp_path / "part"
    visa(category)
    shutil.rmtree(tmp_path / "split_csv")
    rows = mvtec_dataset.prepare(category)
    assert (
        "layout: VisA, without split_csv/1cls.csv beside it; 2 of 8 good images, drawn with seed 0, and all bad"
        in capsys.readouterr().out
    )
    assert counts(rows) == {("train", 0): 6, ("test", 0): 2, ("test", 1): 2}
    assert all(row["gt_name"] for row in rows if row["label"])


def test_numbers_of_kinds_in_a_mask_are_not_shades_of_grey(tmp_path, capsys):
    visa(tmp_path / "part")
    values = np.zeros((SIDE, SIDE), np.uint8)
    values[BOX] = 1
    values[40:50, 40:50] = 4
    Image.fromarray(values).save(tmp_path / "part/Data/Masks/Anomaly/000.png")
    mvtec_dataset.prepare(tmp_path / "part")
    assert "grey values" not in capsys.readouterr().err
    assert np.array_equal(np.asarray(AnomalyDataset(tmp_path / "part", label=1)[0]["mask"]) > 0, values > 0)


def test_a_split_that_was_given_stays_and_is_followed(tmp_path, capsys):
    category = tmp_path / "data/part"
    ok_ng(category)
    own = tmp_path / "own.csv"
    names = [path.relative_to(category).as_posix() for path in sorted((category / "OK").rglob("*.png"))]
    lines = [f"part,{'test' if number < 3 else 'train'},OK,part/{name}," for number, name in enumerate(names)]
    lines.append("part,test,NG,part/ng/2024-05-01/000.png,")
    own.write_text("\n".join(["object,split,label,image,mask", *lines]))
    mvtec_dataset.main(["part", "--data", str(category.parent), "--split-csv", str(own)])
    shown = capsys.readouterr()
    assert f"layout: split by {own}" in shown.out
    assert "passed over 1 file" in shown.err and "ng/2024-05-02/000.png" in shown.err
    assert counts(AnomalyDataset(category).rows) == {("train", 0): 5, ("test", 0): 3, ("test", 1): 1}
    own.write_text("\n".join(["object,split,label,image,mask", *lines[1:]]))
    assert counts(AnomalyDataset(category).rows)["test", 0] == 2
    own.unlink()
    with pytest.raises(UserError, match=r"own\.csv: cannot be read .*--split-csv auto none"):
        AnomalyDataset(category)
    assert counts(mvtec_dataset.prepare(category, split_csv="auto"))["train", 0] == 6


def test_the_script_hands_the_split_on_and_exits_with_2_where_images_have_no_place(tmp_path):
    category = tmp_path / "part"
    visa(category)
    split = (tmp_path / "split_csv").rename(tmp_path / "elsewhere") / "1cls.csv"
    done = script("part", "--split-csv", split, data=tmp_path)
    assert done.returncode == 0 and f"layout: VisA, split by {split}" in done.stdout, done.stderr
    photograph(category / "Data/Images/Unknown/000.png")
    done = script("part", "--split-csv", "auto", data=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "Data/Images/Unknown: 1 image in a folder that no layout has; move them to a folder OK or NG" in done.stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "part,training,normal,part/a.png,",
            "part/a.png: split 'training' is none of train, validation, test; correct",
        ),
        ("part,train,odd,part/a.png,", "label 'odd' is neither"),
        ("part,train,normal,../a.png,", r"\.\./a\.png leads out"),
        ("part,train,anomaly,part/a.png,", "part/a.png: an anomaly in train"),
        ("part,train,normal,part/a.png,", "a.png: no such file"),
        ("part,test,normal,part/OK/2024-05-01/000.png,", "train/good: no images to train on"),
        ("part,train", "label None"),
        ("other,train,normal,other/a.png,", "names no images of part, but of other"),
    ],
)
def test_a_split_that_is_wrong_is_refused_by_name(tmp_path, line, message):
    category = tmp_path / "part"
    ok_ng(category)
    (tmp_path / "own.csv").write_text(f"object,split,label,image,mask\n{line}\n")
    with pytest.raises(UserError, match=message):
        mvtec_dataset.prepare(category, split_csv=tmp_path / "own.csv")
    (tmp_path / "own.csv").write_text("image,label\na.png,0\n")
    with pytest.raises(UserError, match="not a split as VisA's"):
        mvtec_dataset.prepare(category, split_csv=tmp_path / "own.csv")


def test_the_default_split_changes_little_when_images_come():
    names = [f"{number}.png" for number in range(100)]
    before, after = drawn_for_test(names), drawn_for_test([*names, *(f"new{number}.png" for number in range(5))])
    assert len(before) == 20 and len(after) == 21
    assert len(before - after) <= 5
    assert drawn_for_test(names[::-1]) == before
    assert [len(drawn_for_test(names[:number])) for number in range(5)] == [0, 0, 0, 1, 1]


def test_good_folders_alone_are_all_learned_from(tmp_path, capsys):
    photographs(tmp_path / "part/Good", 4)
    photographs(tmp_path / "part/anomaly_free/a/b", 2)
    assert counts(mvtec_dataset.prepare(tmp_path / "part")) == {("train", 0): 6}
    assert "all good images are for training" in capsys.readouterr().out


# What no layout has


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["a.png", "b.png"], r"a\.png, b\.png: lie in no folder; move them to train/good if good, to test/KIND if not"),
        (["images/a.png"], "images: 1 image in a folder that no layout has; move them to train/good"),
        (["OK/a.png", "OK/b.png", "scratch/a.png"], "scratch: 1 image .* move them to a folder OK or NG"),
        (["OK/a.png", "b.png"], r"b\.png: lies in no folder; move it to OK or another folder"),
        (["train/good/a.png", "NG/a.png"], "NG: 1 image .*; move them to train/good, to test/KIND"),
        (["train/a.png"], r"train/a\.png: lies in no folder; move it to train/good$"),
        (["train/good/a.png", "top.png"], r"top\.png: lies in no folder; move it to train/good, to test/KIND"),
        (["train/ng/a.png"], "train/ng: training takes good images only"),
        (["NG/a.png"], r"train/good: no images to train on"),
        (["notes/a.txt"], r"train/good: no images to train on"),
        (["Data/Images/Normal/a.png", "Data/Images/Other/a.png"], "Data/Images/Other: 1 image"),
        (["NG/a.png", "NG/a.bmp", "OK/a.png"], r"NG/a\.png: has the name of NG/a\.bmp"),
    ],
)
def test_what_has_no_place_is_named_with_the_way_out(tmp_path, files, message):
    for file in files:
        path = tmp_path / "part" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph(path) if path.suffix != ".txt" else path.write_text("")
    with pytest.raises(UserError, match=message):
        mvtec_dataset.prepare(tmp_path / "part")
    assert not (tmp_path / "part/part.csv").exists()


def test_other_folders_are_no_categories(tmp_path):
    photographs(tmp_path / "images", 2)
    (tmp_path / "split_csv").mkdir()
    assert not any(is_category(tmp_path / name) for name in ("images", "split_csv", "nowhere"))


# labelme


def test_labelme_s_shapes_are_drawn_as_labelme_draws_them(tmp_path):
    photograph(tmp_path / "part/OK/a.png")
    photograph(tmp_path / "part/OK/b.png")
    photograph(tmp_path / "part/NG/a.png", defect=True)
    shapes(
        tmp_path / "part/NG/a.json",
        RECTANGLE,
        ("polygon", [[2, 2], [9, 2], [9, 7]]),
        ("circle", [[50, 50], [50, 55]]),
    )
    (tmp_path / "part/NG/camera.json").write_text('{"exposure": 3}')
    (row,) = (row for row in mvtec_dataset.prepare(tmp_path / "part") if row["label"])
    assert row["gt_name"] == "NG/a.json"
    found = np.asarray(AnomalyDataset(tmp_path / "part", label=1)[0]["mask"]) == 255
    expected = np.zeros((SIDE, SIDE), bool)
    expected[BOX] = True
    assert np.array_equal(found[15:40, 15:45], expected[15:40, 15:45])
    y, x = np.mgrid[:SIDE, :SIDE]
    assert found[45:].sum() == pytest.approx(math.pi * 5.5**2, rel=0.05)
    assert found[np.hypot(y - 50, x - 50) < 5].all()
    polygon = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(polygon).polygon([(2, 2), (9, 2), (9, 7)], outline=1, fill=1)
    assert np.array_equal(found[:15], np.asarray(polygon)[:15] == 1)


def test_labelme_beside_an_image_of_a_test_folder_is_followed(tmp_path, capsys):
    category = tmp_path / "part"
    mvtec_ad(category)
    for number in range(2):
        (category / f"ground_truth/hole/{number:03}_mask.png").unlink()
        shapes(category / f"test/hole/{number:03}.json", RECTANGLE)
    rows = mvtec_dataset.prepare(category)
    assert [row["gt_name"] for row in rows if row["label"]] == ["test/hole/000.json", "test/hole/001.json"]
    capsys.readouterr()
    shapes(category / "test/hole/001.json", ("circle", [[10, 10], [12, 10]]))
    os.utime(category / "test/hole/001.json", (1, 1))
    assert np.asarray(AnomalyDataset(category, label=1)[1]["mask"])[10, 12] == 255
    assert "1 changed: test/hole/001.json" in capsys.readouterr().out
    box(category / "ground_truth/hole/001.png")
    rows = mvtec_dataset.prepare(category)
    assert [row["gt_name"] for row in rows if row["label"]] == ["test/hole/000.json", "ground_truth/hole/001.png"]
    assert "passed over 1 file" in capsys.readouterr().err


def test_labelme_of_another_size_is_refused(tmp_path):
    mvtec_ad(tmp_path / "part")
    (tmp_path / "part/ground_truth/hole/000_mask.png").unlink()
    shapes(tmp_path / "part/test/hole/000.json", RECTANGLE, size=(32, 48))
    with pytest.raises(UserError, match=r"test/hole/000\.json: 48x32, but test/hole/000\.png is 64x64"):
        mvtec_dataset.prepare(tmp_path / "part")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not as labelme writes it"),
        ("[]", "not as labelme writes it"),
        ('{"shapes": []}', "lacks 'imageWidth'"),
        ('{"shapes": [], "imageWidth": null, "imageHeight": 4}', "no numbers of pixels"),
        (
            '{"shapes": [{"points": [[0, 0], [1, 1]], "shape_type": "line"}], "imageWidth": 4, "imageHeight": 4}',
            "a line",
        ),
        ('{"shapes": [{"points": [[0, 0], [1, NaN], [2, 2]]}], "imageWidth": 4, "imageHeight": 4}', "not finite"),
        ('{"shapes": [{"points": [0, 0]}], "imageWidth": 4, "imageHeight": 4}', "not as labelme"),
    ],
)
def test_a_labelme_file_that_is_wrong_is_refused_by_name(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    for read in (drawn_mask, load_mask):
        with pytest.raises(UserError, match=rf"a\.json: .*{message}"):
            read(tmp_path / "a.json")


# A data folder that takes no files


def test_links_stand_in_for_a_folder_that_takes_no_files(layout, tmp_path):
    category, _, expected = layout
    link = tmp_path / "writable" / category.name
    link.mkdir(parents=True)
    for entry in category.iterdir():
        (link / entry.name).symlink_to(entry)
    if (split := category.parent / "split_csv").exists():
        (link.parent / "split_csv").symlink_to(split)
    assert counts(mvtec_dataset.prepare(link)) == expected
    assert counts(AnomalyDataset(link).rows) == expected
    assert not (category / "part.csv").exists()
