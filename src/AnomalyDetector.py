"""Teacher and students together: images in, anomaly maps out."""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

import preprocessing
import scoring
from AnomalyNet import AnomalyNet
from FDFEAnomalyNet import FDFEAnomalyNet
from moments import Moments

PADDING = "reflect"  # a mirrored border looks as the image does; the paper's zeros would be strange to every net


class Scale(nn.Module):
    """A teacher and M students of one patch size, with what normalises them.

    `mean` and `deviation` (512,) are those of the teacher's descriptors on anomaly-free images (section 3.2).
    `error_mean`, `error_deviation`, `variance_mean`, `variance_deviation` bring error and predictive variance to a
    common scale, from anomaly-free images too; `calibrate` sets them.
    """

    def __init__(self, teacher: AnomalyNet, students: Sequence[AnomalyNet], mean: Tensor, deviation: Tensor):
        super().__init__()
        self.patch_size = teacher.patch_size
        self.teacher = teacher
        self.students = nn.ModuleList(students)
        self.register_buffer("mean", mean.double())
        self.register_buffer("deviation", deviation.double())
        for name in ("error_mean", "variance_mean"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))
        for name in ("error_deviation", "variance_deviation"):
            self.register_buffer(name, torch.ones((), dtype=torch.float64))

    def dense(self, stride: int) -> tuple[FDFEAnomalyNet, list[FDFEAnomalyNet]]:
        """The normalised teacher and the students, describing every `stride`-th pixel."""
        teacher = self.teacher.with_normalised_descriptors(self.mean, self.deviation)
        dense, *students = (FDFEAnomalyNet(net, stride, padding=PADDING) for net in (teacher, *self.students))
        return dense, students

    def calibrate(self, errors: Moments, variances: Moments) -> None:
        """Take mean and deviation of error and variance over the pixels of anomaly-free images."""
        for name, found in (("error", errors), ("variance", variances)):
            getattr(self, f"{name}_mean").fill_(found.mean.item())
            getattr(self, f"{name}_deviation").fill_(found.deviation.item())

    def combine(self, error: Tensor, variance: Tensor) -> Tensor:
        """The anomaly score of section 3.2: normalised error plus normalised variance. 0 is usual, in deviations."""
        return (error - self.error_mean.float()) / self.error_deviation.float() + (
            variance - self.variance_mean.float()
        ) / self.variance_deviation.float()


class AnomalyDetector(nn.Module):
    """One Scale or several: uint8 images (N,3,H,W) -> anomaly maps (N,H,W), float32.

    Scores of several scales are normalised each by itself and averaged (section 3.3). `stride`: a descriptor at every
    `stride`-th pixel, interpolated between.
    """

    def __init__(self, scales: Sequence[Scale], stride: int = 1):
        super().__init__()
        self.scales = nn.ModuleList(scales)
        self.stride = stride
        self._dense = [scale.dense(stride) for scale in scales]

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        pixels = preprocessing.normalise(images)
        total = torch.zeros(1, device=images.device)
        for scale, (teacher, students) in zip(self.scales, self._dense, strict=True):
            total = total + scale.combine(*scoring.error_and_variance(teacher, students, pixels))
        return scoring.at_every_pixel(total / len(self.scales), self.stride, images.shape[2:])

    def _apply(self, fn, *args, **kwargs) -> Self:
        super()._apply(fn, *args, **kwargs)
        self._dense = [scale.dense(self.stride) for scale in self.scales]
        return self


def scale_to_checkpoint(scale: Scale) -> dict[str, Any]:
    """What rebuilds a Scale, in tensors and numbers."""
    return {"patch_size": scale.patch_size, "students": len(scale.students), "state": scale.state_dict()}


def scale_from_checkpoint(content: dict[str, Any]) -> Scale:
    """The Scale that scale_to_checkpoint wrote."""
    teacher, *students = (AnomalyNet(content["patch_size"]) for _ in range(content["students"] + 1))
    scale = Scale(teacher, students, torch.zeros(512), torch.ones(512))
    scale.load_state_dict(content["state"])
    return scale.eval()
