import os

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import mvtec_dataset
from AnomalyDataset import AnomalyDataset
from student_teacher.images.defect_regions import Saturation, load_regions
from student_teacher.runtime.errors import UserError

INDEX = """image_name,gt_name,label,type
train/good/0.png,,0,train
train/good/1.png,,0,train
test/cut/0.png,ground_truth/cut/0_mask.png,1,test
test/good/0.png,,0,test
"""


@pytest.fixture
def category(tmp_path):
    """Images of 6x4 whose grey tells them apart, the last in colour; one mask with one defective pixel."""
    root = tmp_path / "tiny"
    for number, name in enumerate(("train/good/0.png", "train/good/1.png", "test/cut/0.png", "test/good/0.png")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB" if number == 3 else "L", (6, 4), (1, 2, 3) if number == 3 else 10 * number).save(root / name)
    mask = Image.new("L", (6, 4))
    mask.putpixel((5, 1), 1)
    (root / "ground_truth/cut").mkdir(parents=True)
    mask.save(root / "ground_truth/cut/0_mask.png")
    (root / "tiny.csv").write_text(INDEX)
    return root


def to_tensor(image):
    return torch.from_numpy(np.array(image))


def test_items_in_the_order_of_the_index(category):
    items = list(AnomalyDataset(category))
    assert [item["path"] for item in items] == [line.split(",")[0] for line in INDEX.splitlines()[1:]]
    assert [item["label"] for item in items] == [0, 0, 1, 0]
    assert [item["image"].mode for item in items] == ["RGB"] * 4
    assert [item["image"].getpixel((0, 0)) for item in items] == [(0,) * 3, (10,) * 3, (20,) * 3, (1, 2, 3)]


def test_masks_are_of_the_images_size_and_empty_without_a_file(category):
    masks = [item["mask"] for item in AnomalyDataset(category)]
    assert {(mask.mode, mask.size) for mask in masks} == {("L", (6, 4))}
    assert [np.argwhere(np.asarray(mask)).tolist() for mask in masks] == [[], [], [[1, 5]], []]
    assert masks[2].getpixel((5, 1)) == 255


def test_constraints_filter_on_columns(category):
    assert len(AnomalyDataset(category, type="train")) == 2
    assert [row["image_name"] for row in AnomalyDataset(category, type="test", label=0).rows] == ["test/good/0.png"]
    assert [row["label"] for row in AnomalyDataset(category, label=1).rows] == [1]
    assert len(AnomalyDataset(category, type="train", label=1)) == 0


def test_transforms_feed_a_data_loader(category):
    dataset = AnomalyDataset(category, transform=to_tensor, gt_transform=lambda mask: to_tensor(mask) > 0, type="test")
    (batch,) = DataLoader(dataset, batch_size=2)
    assert batch["image"].shape == (2, 4, 6, 3)
    assert batch["mask"].sum(dim=(1, 2)).tolist() == [1, 0]
    assert batch["label"].tolist() == [1, 0]
    assert batch["path"] == ["test/cut/0.png", "test/good/0.png"]


def test_any_way_to_name_the_folder(category, monkeypatch):
    monkeypatch.chdir(category)
    assert len(AnomalyDataset(".")) == 4
    monkeypatch.chdir(category.parent)
    assert len(AnomalyDataset("tiny/")) == 4


def test_an_unknown_column_is_refused(category):
    with pytest.raises(ValueError, match="kind"):
        AnomalyDataset(category, kind="cut")


def test_no_index_and_no_folder_name_the_way_out(category):
    (category / "tiny.csv").unlink()
    with pytest.raises(UserError, match=r"tiny\.csv: the category has no index yet; run \./mvtec_dataset\.sh tiny"):
        AnomalyDataset(category)
    with pytest.raises(UserError, match=r"no such category; run \./mvtec_dataset\.sh carpet"):
        AnomalyDataset(category.parent / "carpet")


@pytest.mark.parametrize("content", ["a,b\n1,2\n", INDEX.replace(",0,train", ",good,train"), INDEX + "short\n"])
def test_a_file_that_is_no_index_is_refused(category, content):
    (category / "tiny.csv").write_text(content)
    with pytest.raises(UserError, match=r"tiny\.csv: no index"):
        AnomalyDataset(category)


def test_a_file_that_vanished_is_named_on_access(category):
    dataset = AnomalyDataset(category)
    (category / "train/good/1.png").unlink()
    (category / "ground_truth/cut/0_mask.png").unlink()
    assert dataset[0]["path"] == "train/good/0.png"
    with pytest.raises(UserError, match=r"train/good/1\.png"):
        dataset[1]
    with pytest.raises(UserError, match=r"0_mask\.png"):
        dataset[2]


def test_the_index_follows_its_folder(category, capsys):
    mvtec_dataset.prepare(category)
    before = (category / "tiny.csv").read_bytes()
    AnomalyDataset(category)
    assert (category / "tiny.csv").read_bytes() == before
    assert "written again" not in capsys.readouterr().out
    for name in ("train/good/new.png", "test/hole/0.png"):
        (category / name).parent.mkdir(exist_ok=True)
        Image.new("L", (6, 4), 50).save(category / name)
    (category / "train/good/0.png").unlink()
    Image.new("L", (6, 4), 77).save(category / "train/good/1.png")
    os.utime(category / "train/good/1.png", (1, 1))
    names = [row["image_name"] for row in AnomalyDataset(category).rows]
    assert names == ["train/good/1.png", "train/good/new.png", "test/cut/0.png", "test/good/0.png", "test/hole/0.png"]
    told = capsys.readouterr().out
    assert "2 came: test/hole/0.png, train/good/new.png; 1 went: train/good/0.png; 1 changed: train/good/1.png" in told
    (category / "train/good/broken.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"train/good/broken\.png"):
        AnomalyDataset(category)


def test_an_index_changed_by_hand_stays(category, capsys):
    mvtec_dataset.prepare(category)
    lines = (category / "tiny.csv").read_text().splitlines(keepends=True)
    (category / "tiny.csv").write_text("".join(line for line in lines if "good/1" not in line))
    assert [row["image_name"] for row in AnomalyDataset(category, type="train").rows] == ["train/good/0.png"]
    assert "tiny.csv was changed by hand: it is taken as it is" in capsys.readouterr().err


def test_an_older_index_that_does_not_fit_is_refused_by_name(category):
    (category / "train/good/0.png").rename(category / "train/good/2.png")
    change = r"\(1 came: train/good/2\.png; 1 went: train/good/0\.png\): run \./mvtec_dataset\.sh tiny"
    with pytest.raises(UserError, match=rf"tiny\.csv does not say what lies there {change}"):
        AnomalyDataset(category)


def test_a_mask_of_another_size_is_named_on_access(category):
    Image.new("L", (5, 4)).save(category / "ground_truth/cut/0_mask.png")
    with pytest.raises(UserError, match=r"0_mask\.png has 5 x 4 pixels, its image 6 x 4"):
        _ = AnomalyDataset(category)[2]


def test_a_folder_of_masks_is_one_mask_and_followed_like_a_file(category, capsys):
    (category / "ground_truth/cut/0_mask.png").unlink()
    folder = category / "ground_truth/cut/0"  # as in MVTec LOCO
    folder.mkdir()
    for number, grey in enumerate((100, 200)):
        mask = Image.new("L", (6, 4))
        mask.putpixel((number, 2), grey)
        mask.save(folder / f"00{number}.png")
    mvtec_dataset.prepare(category, mask_threshold=150)
    dataset = AnomalyDataset(category, label=1)
    assert dataset.rows[0]["gt_name"] == "ground_truth/cut/0"
    assert np.argwhere(np.asarray(dataset[0]["mask"])).tolist() == [[2, 1]]
    saturations = {100: Saturation(0.5, True), 200: Saturation(3, False)}
    regions = load_regions(folder, saturations, dataset.mask_threshold)
    assert [(pixels.tolist(), *rest) for pixels, *rest in regions] == [([13], 3, False)]
    assert len(load_regions(folder, saturations)) == 2
    (folder / "001.png").unlink()
    capsys.readouterr()
    assert not np.asarray(AnomalyDataset(category, label=1)[0]["mask"]).any()
    assert "1 went: ground_truth/cut/0/001.png" in capsys.readouterr().out
    mask.resize((3, 2)).save(folder / "002.png")
    with pytest.raises(UserError, match="holds masks of 6 x 4 and of 3 x 2 pixels; they must agree"):
        AnomalyDataset(category)
