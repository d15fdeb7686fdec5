"""From descriptors to anomaly maps: the scores of section 3.2 of "Uninformed Students"."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from FDFEAnomalyNet import FDFEAnomalyNet

IMAGE_SCORES = SMOOTH, TOP, MAXIMUM, MEAN = "smooth", "top", "maximum", "mean"
TEMPERATURE = 0.5  # of the smooth maximum
TOP_FRACTION = 0.01  # of an image's pixels
TILE_DESCRIPTORS, TILE_PIXELS = 256, 512  # along each side of a tile; the smaller of the two limits holds


def error_and_variance(
    teacher: FDFEAnomalyNet, students: Sequence[FDFEAnomalyNet], images: Tensor, tile: int | None = None
) -> tuple[Tensor, Tensor]:
    """Regression error and predictive variance of M students: (N,3,H,W) -> two of (N,ceil(H/stride),ceil(W/stride)).

    Error: squared distance of the students' mean to the teacher's normalised descriptor. Variance: mean squared
    distance of the students to their mean (equal to the paper's difference of squared norms, but without cancellation).
    Both are in [0, inf); one student has variance 0. The `teacher`'s descriptors are normalised
    (AnomalyNet.with_normalised_descriptors); all nets share patch size and stride.

    Works tile by tile. Each tile is cut from the padded images with its receptive field, so that maps have no seams and
    large images need little memory. `tile`: descriptors along a tile's side, chosen automatically by default.
    """
    padded = teacher.pad(images)
    tile = tile or min(TILE_DESCRIPTORS, TILE_PIXELS // teacher.stride)
    stride, field = teacher.stride, teacher.receptive_field
    rows, columns = ((padded.shape[2 + axis] - field[axis]) // stride + 1 for axis in (0, 1))
    error, variance = (torch.empty(len(images), rows, columns, device=images.device) for _ in range(2))
    for top in range(0, rows, tile):
        bottom = min(top + tile, rows)
        for left in range(0, columns, tile):
            right = min(left + tile, columns)
            pixels = padded[
                :, :, top * stride : (bottom - 1) * stride + field[0], left * stride : (right - 1) * stride + field[1]
            ]
            part = slice(None), slice(top, bottom), slice(left, right)
            error[part], variance[part] = _of_tile(teacher, students, pixels)
    return error, variance


def _of_tile(teacher, students, pixels):
    spread = 0.0
    mean = students[0].describe_padded(pixels).float()
    for number, student in enumerate(students[1:], 2):  # Welford's update: no stack of all students
        difference = student.describe_padded(pixels).float().sub_(mean)
        mean.add_(difference, alpha=1 / number)
        spread = spread + squared_norm(difference) * ((number - 1) / number)
    error = squared_norm(mean.sub_(teacher.describe_padded(pixels)))
    return error, spread / len(students)


def squared_norm(descriptors: Tensor) -> Tensor:
    """Squared Euclidean norm over channels: (N,C,H,W) -> (N,H,W)."""
    return torch.linalg.vector_norm(descriptors, dim=1).square_()


def at_every_pixel(scores: Tensor, stride: int, size: tuple[int, int]) -> Tensor:
    """Interpolate scores (N,h,w) at rows and columns 0, stride, 2 stride ... of an image of `size` (H,W) to (N,H,W).

    Each score stays at its own pixel, so nothing shifts. Beyond the last row and column the last value is repeated.
    """
    if stride == 1:
        return scores
    rows, columns = ((length - 1) * stride + 1 for length in scores.shape[1:])
    between = F.interpolate(scores[:, None], (rows, columns), mode="bilinear", align_corners=True)
    return F.pad(between, (0, size[1] - columns, 0, size[0] - rows), mode="replicate")[:, 0]


def image_scores(anomaly_maps: Tensor, image_score: str, seen: Tensor | None = None) -> Tensor:
    """One score per map, (N,H,W) -> (N,). `image_score` is one of IMAGE_SCORES; `seen` (H,W) says which pixels count.

    "maximum" is the paper's; it depends on a single pixel and so on noise. "top" is the mean of the highest 1 % of the
    pixels. "mean" is the mean of all pixels: for defects that change the whole image. "smooth" is a smooth maximum,
    T log mean exp(pixel / T), for pixels that are standardised: a few high pixels raise it, and so do many raised ones.
    """
    pixels = anomaly_maps.flatten(1) if seen is None else anomaly_maps[:, seen.to(anomaly_maps.device)]
    if image_score == SMOOTH:
        return TEMPERATURE * (torch.logsumexp(pixels / TEMPERATURE, 1) - math.log(pixels.shape[1]))
    if image_score == MAXIMUM:
        return pixels.amax(1)
    if image_score == MEAN:
        return pixels.mean(1)
    return pixels.topk(max(1, round(TOP_FRACTION * pixels.shape[1])), sorted=False).values.mean(1)
