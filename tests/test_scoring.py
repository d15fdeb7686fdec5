import math

import pytest
import torch

from AnomalyNet import PATCH_SIZES, AnomalyNet
from FDFE import PADDING
from FDFEAnomalyNet import FDFEAnomalyNet
from student_teacher.detection import scoring
from student_teacher.detection.AnomalyDetector import AnomalyDetector, Scale, scale_from_checkpoint, scale_to_checkpoint
from student_teacher.detection.score_statistics import ScoreStatistics
from student_teacher.images.preprocessing import normalise


def make_scale(patch_size=17, students=3):
    torch.manual_seed(patch_size)
    nets = [AnomalyNet(patch_size) for _ in range(students + 1)]
    return Scale(nets[0], nets[1:], torch.randn(512), torch.rand(512) + 0.5).eval()


def pictures(*size, number=1):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (number, 3, *size), generator=generator, dtype=torch.uint8)


def test_error_and_variance_equal_the_paper_on_stacked_students():
    scale = make_scale()
    images = torch.randn(2, 3, 9, 12)
    with torch.no_grad():
        teacher = (FDFEAnomalyNet(scale.teacher, padding=PADDING)(images) - scale.mean.float()[:, None, None]) / (
            scale.std.float()[:, None, None]
        )
        students = torch.stack([FDFEAnomalyNet(student, padding=PADDING)(images) for student in scale.students])
        error, variance = scoring.error_and_variance(*scale.dense(1), images)
    mean = students.mean(0)
    assert torch.allclose(error, (mean - teacher).square().sum(1), rtol=1e-4)
    expected = students.square().sum(2).mean(0) - mean.square().sum(1)
    assert torch.allclose(variance, expected, rtol=1e-3)


def test_one_student_has_no_variance():
    with torch.no_grad():
        _, variance = scoring.error_and_variance(*make_scale(students=1).dense(1), torch.randn(1, 3, 5, 6))
    assert (variance == 0).all()


@pytest.mark.parametrize("stride", (1, 2, 4, 8))
@pytest.mark.parametrize("patch_size", PATCH_SIZES)
def test_tiles_have_no_seams(patch_size, stride):
    nets = make_scale(patch_size, students=2).dense(stride)
    images = torch.randn(1, 3, 45, 31)
    with torch.no_grad():
        whole = scoring.error_and_variance(*nets, images)
        tiles = scoring.error_and_variance(*nets, images, tile=7)
    for found, expected in zip(tiles, whole, strict=True):
        assert found.shape == (1, -(-45 // stride), -(-31 // stride))
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5 * expected.max().item())


@pytest.mark.parametrize("stride", (2, 4, 8))
@pytest.mark.parametrize("size", ((33, 41), (32, 40), (5, 7), (30, 27)))
def test_each_score_stays_at_its_own_pixel(stride, size):
    scores = torch.rand(2, -(-size[0] // stride), -(-size[1] // stride))
    found = scoring.at_every_pixel(scores, stride, size)
    assert found.shape == (2, *size)
    assert torch.allclose(found[:, ::stride, ::stride], scores, atol=1e-6)
    # A slope stays the same slope, up to the last row and column that were computed.
    rows = torch.arange(0.0, size[0], stride)
    slope = scoring.at_every_pixel(rows[None, :, None].expand(1, -1, scores.shape[2]), stride, size)[0, :, 0]
    assert torch.allclose(slope, torch.arange(float(size[0])).clamp_max(rows[-1].item()), atol=1e-5)


def score_statistics(scale, images):
    """ScoreStatistics of a scale on images, and its error and variance on them."""
    statistics = ScoreStatistics()
    with torch.no_grad():
        found = scoring.error_and_variance(*scale.dense(1), normalise(images))
    statistics.update(*found)
    return statistics, *found


def test_maps_of_good_images_are_zero_on_average_after_calibration():
    scale = make_scale(students=2)
    images = pictures(20, 16, number=3)
    statistics, error, variance = score_statistics(scale, images)
    scale.calibrate(statistics)
    normalised = (
        (error - error.mean()) / error.std(correction=0),
        (variance - variance.mean()) / variance.std(correction=0),
    )
    found = AnomalyDetector([scale], normalisation="image")(images)
    assert torch.allclose(found, sum(normalised), atol=1e-3)
    assert AnomalyDetector([scale])(images).mean().abs() < 0.2


def test_error_plus_variance_is_the_students_mean_squared_distance_to_the_teacher():
    scale = make_scale()
    images = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        error, variance = scoring.error_and_variance(*scale.dense(1), images)
        teacher, students = scale.dense(1)
        distances = [scoring.squared_norm(student(images) - teacher(images)) for student in students]
    assert torch.allclose(error + variance, torch.stack(distances).mean(0), rtol=1e-4)


def test_errors_common_at_a_place_are_not_anomalous_there():
    """Errors of 5 +- 1 on the left, of 1 +- 0.1 on the right: 5 is common on the left only."""
    random = torch.Generator().manual_seed(0)
    errors = 1 + 0.1 * torch.randn(400, 64, 64, generator=random)
    errors[:, :, :32] = 5 + torch.randn(400, 64, 32, generator=random)
    statistics = ScoreStatistics()
    for error in errors:
        statistics.update(error[None], torch.zeros(1, 64, 64))
    scale = make_scale(students=1)
    scale.calibrate(statistics)
    found = scale.combine(torch.full((1, 64, 64), 5.0), torch.zeros(1, 64, 64))[0]
    assert found[:, :28].abs().max() < 1 < 5 < found[:, 36:].min()


@pytest.mark.parametrize("normalisation", ("place", "image"))
def test_several_scales_are_averaged(normalisation):
    scales = [make_scale(17), make_scale(33)]
    images = pictures(18, 15)
    found = AnomalyDetector(scales, 2, normalisation).maps(images)
    parts = [AnomalyDetector([scale], 2, normalisation)(images) for scale in scales]
    assert torch.allclose(found.anomaly_maps, sum(parts) / 2, rtol=1e-4, atol=1e-3)
    assert torch.equal(found.scored_maps, found.anomaly_maps)


def test_a_scale_survives_its_checkpoint():
    scale = make_scale()
    images = pictures(12, 10)
    again = scale_from_checkpoint(scale_to_checkpoint(scale))
    assert torch.equal(AnomalyDetector([scale])(images), AnomalyDetector([again])(images))


def test_weights_that_are_loaded_count_at_once():
    first, second = (AnomalyDetector([make_scale(size, students=2)], 4) for size in (17, 17))
    with torch.no_grad():
        for values in second.state_dict().values():
            values.mul_(1.1)
    first.load_state_dict(second.state_dict())
    images = pictures(20, 24)
    expected = AnomalyDetector(second.scales, 4)(images)
    assert torch.equal(first(images), expected)


def test_an_image_is_scored_by_its_highest_pixels_its_maximum_or_its_mean():
    maps = torch.arange(400.0).view(1, 20, 20)[:, torch.randperm(20, generator=torch.Generator().manual_seed(0))]
    maps = torch.cat([maps, torch.zeros_like(maps)])
    scores = {image_score: scoring.image_scores(maps, image_score).tolist() for image_score in scoring.IMAGE_SCORES}
    assert scores.pop("smooth") == pytest.approx([399 - 0.5 * math.log(400 * (1 - math.exp(-1 / 0.5))), 0], abs=1e-4)
    assert scores == {"top": [397.5, 0], "maximum": [399, 0], "mean": [199.5, 0]}
    assert scoring.image_scores(maps[:, :2, :2], "top").tolist() == [maps[0, :2, :2].max(), 0]  # one pixel at least
