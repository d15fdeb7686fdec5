import pytest
import torch

import preprocessing
from AnomalyDetector import AnomalyDetector, Scale, scale_from_checkpoint, scale_to_checkpoint
from AnomalyNet import AnomalyNet
from GlobalStudent import EXPLAINED, GlobalStudent, leave_one_out, level, principal_components, seen_image, size_seen

SIZE = (40, 32)


def mixtures(number, seed, patterns=3):
    """Images that are mixtures of the same few."""
    parts = torch.randn(patterns, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    shares = torch.rand(number, patterns, generator=torch.Generator().manual_seed(seed))
    return (128 + 40 * torch.einsum("np,pchw->nchw", shares, parts)).clamp(0, 255).to(torch.uint8)


def fitted(images, zoom=1):
    """A scale of random weights and its global student."""
    torch.manual_seed(0)
    nets = [AnomalyNet(33) for _ in range(2)]
    with torch.inference_mode():
        found = nets[0](torch.randn(500, 3, 33, 33))
    scale = Scale(nets[0], nets[1:], found.mean(0), found.std(0), zoom).eval()

    def describe(net, number):
        return net(seen_image(preprocessing.normalise(images[:number]), SIZE, zoom)).split(1)

    scale.global_student = GlobalStudent.fit(scale.normalised_teacher(), zoom, SIZE, describe)
    return scale


def test_residuals_are_those_of_fits_to_the_other_images():
    """Each against ridge regression that has never seen it, mean and all."""
    maps = torch.randn(9, 40, dtype=torch.float64) + torch.arange(40)
    penalty = torch.tensor(3.0, dtype=torch.float64)
    centred = maps - maps.mean(0)
    found = leave_one_out(*torch.linalg.eigh(centred @ centred.T), penalty) @ centred
    for left_out in range(9):
        others = maps[[index for index in range(9) if index != left_out]]
        mean = others.mean(0)
        others, one = others - mean, maps[left_out] - mean
        shares = torch.linalg.solve(others @ others.T + penalty * torch.eye(8), others @ one)
        assert torch.allclose(found[left_out], one - shares @ others)


def test_components_are_the_fewest_that_explain_enough():
    spread = torch.tensor([10.0, 5.0, 1.0, 0.1])
    directions = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))[0]
    values = torch.randn(20, 4, 30, 30, generator=torch.Generator().manual_seed(1)) * spread[:, None, None]
    found = principal_components(torch.einsum("ck,nkhw->nchw", directions, values).split(1))
    shares = spread.square().cumsum(0) / spread.square().sum()
    assert len(found) == int((shares < EXPLAINED).sum()) + 1 == 2
    assert torch.allclose(found @ found.T, torch.eye(2), atol=1e-5)
    assert torch.allclose((found @ directions[:, :2]).abs(), torch.eye(2), atol=0.05)


@pytest.mark.parametrize("zoom", (1, 2))
def test_what_is_like_good_images_is_predicted_and_what_is_not_stands_out(zoom):
    student = (scale := fitted(mixtures(40, seed=1), zoom)).global_student
    assert 0.5 < student.explained <= 1
    new = mixtures(4, seed=2)
    damaged = new.clone()
    damaged[:, :, 20:32, 10:22] = 255
    with torch.inference_mode():
        good, bad = (
            student(scale.dense_global(), preprocessing.normalise(images), zoom)[0] for images in (new, damaged)
        )
    assert good.shape == (4, *SIZE)
    assert good.abs().mean() < 3
    assert bad[:, 22:30, 12:20].mean() > 3 * good.amax()
    if zoom == 1:  # else a patch is larger than the image
        assert bad[:, 22:30, 12:20].mean() > 2 * bad[:, :6].mean()


@torch.no_grad()
def test_its_part_in_the_map_is_what_it_explains(tmp_path):
    scale, images = fitted(mixtures(20, seed=1)), mixtures(2, seed=3)
    whole, levels = scale.global_student(scale.dense_global(), preprocessing.normalise(images), 1)
    patches = AnomalyDetector([scale], 4, global_students=False)(images)
    found = AnomalyDetector([scale], 4).find(images)
    levelled = whole / (1 + levels[:, None, None]).sqrt()
    for scores, expected in ((levelled, found.anomaly_maps), (whole, found.scored_maps)):
        assert torch.allclose(patches + scale.global_student.explained * (scores - patches), expected, atol=1e-4)
    again = scale_from_checkpoint(scale_to_checkpoint(scale))
    assert torch.equal(AnomalyDetector([again], 4)(images), AnomalyDetector([scale], 4)(images))
    assert torch.equal(AnomalyDetector([again], 4, global_students=False)(images), patches)


def test_the_level_is_what_the_least_anomalous_quarter_reaches():
    scores = torch.arange(100.0).view(1, 10, 10).flip(2)
    assert level(torch.cat([scores, -scores])).tolist() == [24, 0]
    assert level(scores[:, :1, :1]).tolist() == [9]


@torch.no_grad()
def test_a_part_unlike_all_is_anomalous_everywhere_and_its_map_is_levelled():
    scale = fitted(mixtures(40, seed=1))
    known, unknown = mixtures(3, seed=2), torch.randint(256, (3, 3, *SIZE), dtype=torch.uint8)
    detector = AnomalyDetector([scale], 4)
    known, unknown = (detector.find(images) for images in (known, unknown))
    assert unknown.scored_maps.amin() > known.scored_maps.amax()
    assert unknown.anomaly_maps.amax() < unknown.scored_maps.amax() / 2
    assert torch.allclose(known.anomaly_maps, known.scored_maps, rtol=0.3, atol=1)


def test_images_of_other_sizes_are_mapped_at_their_own():
    scale = fitted(mixtures(10, seed=1))
    images = torch.randint(256, (2, 3, 71, 90), dtype=torch.uint8)
    assert AnomalyDetector([scale], 4)(images).shape == (2, 71, 90)
    assert size_seen(None) == (256, 256)
    assert size_seen((512, 128)) == (256, 128)


def test_equal_images_leave_nothing_to_explain():
    images = mixtures(1, seed=1).expand(9, -1, -1, -1)
    scale = fitted(images)
    assert scale.global_student.explained < 1e-6
    assert AnomalyDetector([scale], 4)(images[:1]).isfinite().all()
