"""Masks of several regions and defects_config.json, as MVTec LOCO has them."""

import json

import numpy as np
import pytest
from PIL import Image

import mvtec_dataset
from AnomalyDataset import AnomalyDataset
from student_teacher.images.defect_regions import load_regions, read_saturations
from student_teacher.images.reading import load_mask
from student_teacher.runtime.errors import UserError

CONFIG = [
    {"defect_name": "missing", "pixel_value": 255, "saturation_threshold": 6, "relative_saturation": False},
    {"defect_name": "scratch", "pixel_value": 250, "saturation_threshold": 0.5, "relative_saturation": True},
]


def save_mask(path, value, part, size=(10, 12)):
    mask = np.zeros(size, np.uint8)
    mask[part] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(path)
    return mask


@pytest.fixture
def category(tmp_path):
    """A good and two defective test images; one of the masks has two regions that overlap, the other a file alone."""
    folder = tmp_path / "box"
    (folder / "train" / "good").mkdir(parents=True)
    for name in ("train/good/000", "test/good/000", "test/logical_anomalies/000", "test/logical_anomalies/001"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 10)).save(folder / f"{name}.png")
    masks = folder / "ground_truth" / "logical_anomalies"
    save_mask(masks / "000" / "000.png", 255, np.s_[1:4, 2:6])
    save_mask(masks / "000" / "001.png", 250, np.s_[3:8, 5:7])
    save_mask(masks / "001" / "000.png", 250, np.s_[0:2, 0:2])
    (folder / "defects_config.json").write_text(json.dumps(CONFIG))
    return folder


def test_a_folder_of_masks_is_indexed_and_read_as_one(category):
    mvtec_dataset.prepare(category)
    dataset = AnomalyDataset(category, type="test", label=1)
    assert [row["gt_name"] for row in dataset.rows] == [f"ground_truth/logical_anomalies/{n}" for n in ("000", "001")]
    expected = np.zeros((10, 12), bool)
    expected[1:4, 2:6] = expected[3:8, 5:7] = True
    assert np.array_equal(np.asarray(dataset[0]["mask"]) == 255, expected)
    assert set(np.unique(dataset[0]["mask"])) == {0, 255}


def test_regions_come_with_the_saturation_of_their_grey_value(category):
    saturations = read_saturations(category)
    first, second = load_regions(category / "ground_truth" / "logical_anomalies" / "000", saturations)
    assert first[0].tolist() == [12 * row + column for row in range(1, 4) for column in range(2, 6)]
    assert first[1:] == (6, False)
    assert second[0].tolist() == [12 * row + column for row in range(3, 8) for column in (5, 6)]
    assert second[1:] == (0.5, True)
    save_mask(category / "plain.png", 250, np.s_[0:1, 0:3])
    assert [region[0].tolist() for region in load_regions(category / "plain.png", saturations)] == [[0, 1, 2]]
    save_mask(category / "ground_truth" / "logical_anomalies" / "001" / "001.png", 0, np.s_[:, :])
    assert len(load_regions(category / "ground_truth" / "logical_anomalies" / "001", saturations)) == 1


def test_a_category_without_the_file_has_no_saturations(tmp_path):
    assert read_saturations(tmp_path) is None


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[", "not a list of defects"),
        ('[{"pixel_value": 255}]', "lacks 'saturation_threshold'"),
        ('{"pixel_value": 255}', "not a list of defects"),
        ('[{"pixel_value": 1, "saturation_threshold": 1.5, "relative_saturation": true}]', "1.5, a share"),
        ('[{"pixel_value": 1, "saturation_threshold": 0, "relative_saturation": false}]', "0, a number of pixels"),
        ('[{"pixel_value": 1, "saturation_threshold": NaN, "relative_saturation": false}]', "nan"),
    ],
)
def test_a_broken_file_is_refused_by_name(tmp_path, content, says):
    (tmp_path / "defects_config.json").write_text(content)
    with pytest.raises(UserError, match=says) as error:
        read_saturations(tmp_path)
    assert str(error.value).startswith(str(tmp_path / "defects_config.json"))


def test_broken_masks_are_refused_by_name(category):
    folder, saturations = category / "ground_truth" / "logical_anomalies" / "000", read_saturations(category)
    mask = save_mask(folder / "002.png", 249, np.s_[0, 0])
    with pytest.raises(UserError, match=r"002\.png: .* no kind of defect with the grey value 249"):
        load_regions(folder, saturations)
    mask[1, 1] = 255
    Image.fromarray(mask).save(folder / "002.png")
    with pytest.raises(UserError, match=r"002\.png: has the grey values 249, 255, where a region has one"):
        load_regions(folder, saturations)
    save_mask(folder / "002.png", 255, np.s_[0, 0], size=(10, 11))
    with pytest.raises(UserError, match="holds masks of 12 x 10 and of 11 x 10 pixels"):
        load_mask(folder)
    with pytest.raises(UserError, match="holds masks of 12 x 10"):
        mvtec_dataset.prepare(category)
    for file in folder.iterdir():
        file.unlink()
    with pytest.raises(UserError, match="holds no mask"):
        load_mask(folder)
