import numpy as np
import pytest
import torch
from PIL import Image

from student_teacher.images import preprocessing, reading
from student_teacher.images.pictures import Pictures
from student_teacher.runtime.errors import UserError
from student_teacher.training import patches, synthetic_defects
from student_teacher.training.patches import PatchSampler


def noise(height=120, width=160, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def pictures(tmp_path):
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    for index, path in enumerate(paths):
        noise(100 + 20 * index, 130, index).save(path)
    return paths


def only_batch(sampler, size=8, step=0):
    ((drawn, partners),) = sampler.batches(range(step, step + 1), size)
    return drawn, partners


def in_unit_range(normalised):
    mean, std = (
        torch.tensor(values).view(3, 1, 1) for values in (preprocessing.IMAGENET_MEAN, preprocessing.IMAGENET_STD)
    )
    return normalised * std + mean


# patches


@pytest.mark.parametrize("size", [17, 65])
def test_patches_and_partners_have_the_size_and_are_normalised(pictures, size):
    for batch in only_batch(PatchSampler(Pictures(pictures), size, 0)):
        assert (batch.shape, batch.dtype) == ((8, 3, size, size), torch.float32)
        pixels = in_unit_range(batch)
        assert pixels.min() > -1e-5
        assert 0.9 < pixels.max() < 1 + 1e-5


def test_draws_depend_on_seed_and_step_only(pictures):
    batches = list(PatchSampler(Pictures(pictures), 17, 0).batches(range(4), 6))
    later = list(PatchSampler(Pictures(pictures), 17, 0).batches(range(2, 4), 6))
    for expected, found in zip(batches[2:], later, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    everything = torch.cat([drawn for drawn, _ in batches])
    assert len(everything.flatten(1).unique(dim=0)) == len(everything)
    other = only_batch(PatchSampler(Pictures(pictures), 17, 1), 6)[0]
    assert not (other[:, None] == batches[0][0][None]).flatten(2).all(2).any()


def test_the_partner_is_the_patch_shifted_by_up_to_a_quarter(pictures, monkeypatch):
    monkeypatch.setattr(patches, "NOISE_STD", 0)
    shifts = set()
    for patch, partner in zip(*only_batch(PatchSampler(Pictures(pictures), 17, 0), 40), strict=True):
        inner = patch[:, 4:-4, 4:-4]
        windows = partner.unfold(1, 9, 1).unfold(2, 9, 1)
        rows, columns = (windows == inner[:, None, None]).all(4).all(3).all(0).nonzero().unbind(1)
        assert len(rows) >= 1
        shifts.add((rows[0].item() - 4, columns[0].item() - 4))
    assert len(shifts) > 20
    assert {-4, 4} <= {row for row, _ in shifts} | {column for _, column in shifts}


def test_the_partner_carries_noise_of_a_tenth(tmp_path):
    Image.new("RGB", (60, 60), (128, 128, 128)).save(tmp_path / "grey.png")
    drawn, partners = only_batch(PatchSampler(Pictures([tmp_path / "grey.png"]), 17, 0))
    difference = in_unit_range(partners) - in_unit_range(drawn)
    assert difference.std().item() == pytest.approx(0.1, rel=0.05)
    assert abs(difference.mean().item()) < 0.005


@pytest.mark.parametrize(("probability", "grey"), [(0, False), (1, True)])
def test_grey_patches_are_grey_and_so_are_their_partners_pictures(pictures, monkeypatch, probability, grey):
    monkeypatch.setattr(patches, "GREY_PROBABILITY", probability)
    monkeypatch.setattr(patches, "NOISE_STD", 0)
    for batch in only_batch(PatchSampler(Pictures(pictures), 17, 0)):
        spread = in_unit_range(batch).amax(1) - in_unit_range(batch).amin(1)
        assert (spread.amax((1, 2)) < 1e-5).tolist() == [grey] * 8


def test_a_tenth_of_the_patches_is_grey(pictures):
    pixels = in_unit_range(only_batch(PatchSampler(Pictures(pictures), 17, 0), 400)[0])
    probability = ((pixels.amax(1) - pixels.amin(1)).amax((1, 2)) < 1e-5).float().mean().item()
    assert 0.05 < probability < 0.16


@pytest.mark.parametrize("image_size", [None, (40, 80)])
def test_the_shorter_side_is_zoomed_to_between_4_and_16_patches(tmp_path, image_size):
    # A ramp along the shorter side: the range of a patch is its fraction of that side.
    ramp = np.broadcast_to(np.linspace(0, 255, 120)[:, None, None], (120, 240, 3)).astype(np.uint8)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    pixels = in_unit_range(only_batch(PatchSampler(Pictures([tmp_path / "ramp.png"], image_size), 33, 0), 200)[0])
    spans = (pixels[:, 0, -1] - pixels[:, 0, 0]).mean(1) * 33 / 32
    assert 1 / 16 - 0.015 < spans.min() < 1 / 14
    assert 1 / 5 < spans.max() < 1 / 4 + 0.015


@pytest.mark.parametrize("axis", [0, 1])
def test_with_square_both_sides_are_zoomed_to_between_4_and_16_patches(tmp_path, axis):
    ramp = np.linspace(0, 255, (120, 240)[axis])[(slice(None), None) if axis == 0 else (None, slice(None))]
    Image.fromarray(np.broadcast_to(ramp[..., None], (120, 240, 3)).astype(np.uint8)).save(tmp_path / "ramp.png")
    sampler = PatchSampler(Pictures([tmp_path / "ramp.png"]), 33, 0, square=True)
    pixels = in_unit_range(only_batch(sampler, 200)[0])[:, 0]
    spans = (pixels.select(axis + 1, -1) - pixels.select(axis + 1, 0)).mean(1) * 33 / 32
    assert 1 / 16 - 0.015 < spans.min() < 1 / 14
    assert 1 / 5 < spans.max() < 1 / 4 + 0.015


def test_the_budget_only_changes_how_often_files_are_read(pictures, monkeypatch):
    read = []
    monkeypatch.setattr(reading, "load_rgb", lambda path, _: read.append(path) or Image.open(path).convert("RGB"))
    numbers = {}
    for budget in (0, 2**20):
        read.clear()
        sampler = PatchSampler(Pictures(pictures, (64, 64), budget), 17, 0)
        numbers[budget] = [only_batch(sampler, 10, step) for step in range(3)]
        assert len(read) == (30 if budget == 0 else 3)
    assert all(
        torch.equal(a, b)
        for one, other in zip(numbers[0], numbers[2**20], strict=True)
        for a, b in zip(one, other, strict=True)
    )


def test_the_next_picture_stands_in_for_a_broken_one(pictures, capsys):
    pictures[1].write_bytes(b"no picture")
    found = Pictures(pictures)
    assert found[1] == found[2] == found[1]
    assert capsys.readouterr().err.count("1.png: not an image") == 1
    with pytest.raises(UserError, match=r"gone-0\.png: broken, as are all 2000 pictures"):
        _ = Pictures([pictures[0].with_name(f"gone-{number}.png") for number in range(2000)])[0]


# synthetic_defects

BOTH = pytest.mark.parametrize("make", [synthetic_defects.cut_paste, synthetic_defects.cut_paste_scar])


def changed(make, picture, seed):
    """The mask of the defect: (H,W)."""
    found = make(picture, np.random.default_rng(seed))
    return (np.asarray(found) != np.asarray(picture)).any(2)


def extent(mask):
    return [int(np.ptp(indices)) + 1 for indices in np.nonzero(mask)]


@BOTH
def test_a_defect_is_made_in_a_copy(make):
    picture = noise()
    before = picture.copy()
    first, again, other = (np.asarray(make(picture, np.random.default_rng(seed))) for seed in (3, 3, 4))
    assert first.shape == (120, 160, 3)
    assert np.array_equal(np.asarray(picture), np.asarray(before))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, np.asarray(picture))
    assert not np.array_equal(first, other)


def test_cut_paste_changes_a_rectangle_of_2_to_15_per_cent():
    picture = noise(200, 240)
    masks = [changed(synthetic_defects.cut_paste, picture, seed) for seed in range(40)]
    for mask in masks:
        height, width = extent(mask)
        assert mask.sum() > 0.9 * height * width  # some pixels of the noise are equal by chance
        assert 0.018 < height * width / mask.size < 0.155
        assert 0.28 < width / height < 3.5
    shares = [mask.mean() for mask in masks]
    assert min(shares) < 0.05
    assert max(shares) > 0.1


@pytest.mark.parametrize("side", [256, 512])
def test_a_scar_measures_2_to_16_by_10_to_25_pixels_of_256(side):
    picture, unit = noise(side, side), side / 256
    masks = [changed(synthetic_defects.cut_paste_scar, picture, seed) for seed in range(30)]
    areas = [mask.sum() / unit**2 for mask in masks]
    assert 15 < min(areas) < max(areas) < 16 * 25 + 20
    assert max(np.hypot(*extent(mask)) for mask in masks) < unit * (np.hypot(16, 25) * 2**0.5 + 2)
    fill = [mask.sum() / np.prod(extent(mask)) for mask in masks]
    assert min(fill) < 0.6  # rotated: its bounding box is not full


@BOTH
def test_on_a_plain_picture_only_the_colours_jitter(make):
    picture = Image.new("RGB", (128, 128), (200, 160, 120))
    most = 0
    for seed in range(20):
        found = np.asarray(make(picture, np.random.default_rng(seed))).astype(int)
        difference = np.abs(found - (200, 160, 120))
        assert difference.max() <= 45  # and no black rim where a turned cut ends
        most = max(most, difference.max())
    assert most > 5


@BOTH
@pytest.mark.parametrize("size", [(8, 8), (8, 300), (300, 8)])
def test_small_and_narrow_pictures_get_a_defect_too(make, size):
    picture = noise(*size)
    assert all(make(picture, np.random.default_rng(seed)).size == size[::-1] for seed in range(20))
    assert sum(changed(make, picture, seed).any() for seed in range(20)) > 10
