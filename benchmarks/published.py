"""The published way, for comparison: multi-pooling, students in a stack, trained one after another.

Dense extraction follows Bailer, Habtegebrial, Varanasi, Stricker, "Fast Dense Feature Extraction with CNNs that have
Pooling or Striding Layers" (BMVC 2017, arXiv 1805.03096), sections 3.1 and 3.2. Scoring and training follow Bergmann,
Fauser, Sattlegger, Steger, "Uninformed Students" (CVPR 2020, arXiv 1911.02357), section 3.2, as public ports implement
it. All in float32, in the layout NCHW, on every pixel.
"""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from measuring import exact_float32
from torch import Tensor, nn

from AnomalyNet import AnomalyNet
from FDFE import PADDING
from FDFEAnomalyNet import FDFEAnomalyNet
from student_teacher.detection.AnomalyDetector import Scale
from student_teacher.images import preprocessing
from student_teacher.training import losses

TOLERANCE = 1e-5  # descriptors, relative to the largest
MAP_TOLERANCE = 1e-4  # maps: sums of squares of differences


class MultiPoolingNet(nn.Module):
    """A patch network on every pixel: (N,3,H,W) -> (N,C,H,W), equal to FDFEAnomalyNet(net). Its weights are a copy."""

    def __init__(self, net: AnomalyNet, padding: str = "zeros"):
        super().__init__()
        self.net = copy.deepcopy(net).to(memory_format=torch.contiguous_format)
        self._padding = FDFEAnomalyNet(net, padding=padding).pad

    def forward(self, images: Tensor) -> Tensor:
        """Describe every pixel."""
        x, pools = self._padding(images.contiguous()).contiguous(), []
        for layer in self.net.layers:
            if isinstance(layer, nn.MaxPool2d):
                x = multi_pool(x, layer.kernel_size)
                pools.append(layer.kernel_size)
            else:
                x = layer(x)
        for size in reversed(pools):
            x = unwarp(x, size)
        return x[:, :, : images.shape[2], : images.shape[3]]


def multi_pool(x: Tensor, size: int) -> Tensor:
    """Pool all size^2 shifts of (N,C,H,W), stacked in the batch: (size^2 N,C,H',W').

    The image is padded at the end to a multiple of `size`; the extra outputs are beyond the last pixel, and are cropped
    at the end.
    """
    rows, columns = (-(-(length - size + 1) // size) for length in x.shape[2:])
    x = F.pad(x, (0, (columns + 1) * size - x.shape[3], 0, (rows + 1) * size - x.shape[2]))
    height, width = rows * size, columns * size
    starts = [(down, right) for down in range(size) for right in range(size)]
    shifts = [x[:, :, down : down + height, right : right + width] for down, right in starts]
    return F.max_pool2d(torch.cat(shifts), size)


def unwarp(x: Tensor, size: int) -> Tensor:
    """Interleave the shifts that multi_pool put into the batch."""
    shifts = x.unflatten(0, (size, size, -1))  # down, right, N, C, H', W'
    return shifts.permute(2, 3, 4, 0, 5, 1).flatten(4, 5).flatten(2, 3)


class PublishedDetector(nn.Module):
    """Teacher and students as published: uint8 images (N,3,H,W) -> anomaly maps (N,H,W), equal to AnomalyDetector's."""

    def __init__(self, scale: Scale):
        super().__init__()
        self.scale = scale
        self.teacher = MultiPoolingNet(scale.teacher, PADDING)
        self.students = nn.ModuleList(MultiPoolingNet(student, PADDING) for student in scale.students)

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        pixels = preprocessing.normalise(images)
        mean, std = (value.float()[:, None, None] for value in (self.scale.mean, self.scale.std))
        target = (self.teacher(pixels) - mean) / std
        students = torch.stack([student(pixels) for student in self.students])
        error = (students.mean(0) - target).square().sum(1)
        variance = students.var(0, correction=0).sum(1)
        return self.scale.combine(error, variance)


class PublishedTraining:
    """Trains one student after another on an image, each with its own pass of the teacher, on every pixel."""

    def __init__(self, teacher: AnomalyNet, students: Sequence[AnomalyNet], learning_rate: float, weight_decay: float):
        self.teacher = MultiPoolingNet(teacher, PADDING)
        self.students = [MultiPoolingNet(student, PADDING) for student in students]
        self.optimisers = [
            torch.optim.Adam(student.parameters(), learning_rate, weight_decay=weight_decay)
            for student in self.students
        ]

    def step(self, images: Tensor) -> list[float]:
        """Train all students on uint8 images (N,3,H,W) and return the losses; teacher descriptors are normalised."""
        found = []
        for student, optimiser in zip(self.students, self.optimisers, strict=True):
            pixels = preprocessing.normalise(images)
            optimiser.zero_grad()
            with torch.no_grad():
                target = self.teacher(pixels)
            loss = losses.regression(student(pixels), target)
            loss.backward()
            optimiser.step()
            found.append(loss.item())
        return found


@torch.inference_mode()
def require_same_descriptors(net: AnomalyNet, images: Tensor) -> None:
    """Raise AssertionError if MultiPoolingNet and FDFEAnomalyNet differ on any pixel of (N,3,H,W)."""
    with exact_float32():
        _require_equal(MultiPoolingNet(net)(images), FDFEAnomalyNet(net)(images), TOLERANCE, "descriptors")


@torch.inference_mode()
def require_same_maps(published: nn.Module, ours: nn.Module, images: Tensor) -> None:
    """Raise AssertionError if the maps of two detectors differ on any pixel of uint8 (N,3,H,W)."""
    with exact_float32():
        _require_equal(published(images), ours(images), MAP_TOLERANCE, "maps")


def _require_equal(found, expected, tolerance, what):
    assert found.shape == expected.shape, f"{what} of shape {tuple(found.shape)}, not {tuple(expected.shape)}"
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    assert difference < tolerance, f"the published way's {what} differ by {difference:.1e} from ours"
