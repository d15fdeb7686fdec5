"""Teacher and students together: images in, anomaly maps out."""

from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import distributed
import preprocessing
import scoring
from AnomalyNet import AnomalyNet
from FDFEAnomalyNet import FDFEAnomalyNet
from moments import Moments

PADDING = "reflect"  # a mirrored border looks as the image does; the paper's zeros would be strange to every net
# A patch of 130 pixels is described by the network for 65 on the image at half its size: wide context at a low price.
SCALES = {17: (17, 1), 33: (33, 1), 65: (65, 1), 130: (65, 2), 260: (65, 4)}  # patch size: the network's, and the zoom
NORMALISATIONS = ("place", "image")  # the first is the default
PLACES = 32  # along each side of the image, whatever its size
PRIOR_IMAGES = 10  # what is usual everywhere counts as much as what this many images say of a place


def zoomed(pixels: Tensor, zoom: int) -> Tensor:
    """Normalised images (N,3,H,W) at the size that a scale's networks see: ceil(H/zoom) x ceil(W/zoom)."""
    return pixels if zoom == 1 else F.avg_pool2d(pixels, zoom, ceil_mode=True)


def zoomed_stride(stride: int, zoom: int) -> int:
    """Between descriptors on the zoomed image, where it is `stride` on the image; 1 at least."""
    return max(1, stride // zoom)


class Scale(nn.Module):
    """A teacher and M students of one patch size, with what normalises them.

    `mean` and `deviation` (512,) are those of the teacher's descriptors on anomaly-free images (section 3.2). The other
    buffers say what error and predictive variance are on such images, overall and at each place; `calibrate` sets them.
    With a `zoom` of 2 the networks see the image at half its size, so that a patch is twice as wide.
    """

    def __init__(
        self, teacher: AnomalyNet, students: Sequence[AnomalyNet], mean: Tensor, deviation: Tensor, zoom: int = 1
    ):
        super().__init__()
        self.zoom = zoom
        self.patch_size = teacher.patch_size * zoom
        self.teacher = teacher
        self.students = nn.ModuleList(students)
        self.register_buffer("mean", mean.double())
        self.register_buffer("deviation", deviation.double())
        for name in ("error_mean", "variance_mean"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))
        for name in ("error_deviation", "variance_deviation"):
            self.register_buffer(name, torch.ones((), dtype=torch.float64))
        self.register_buffer("place_mean", torch.zeros(PLACES, PLACES))
        self.register_buffer("place_deviation", torch.ones(PLACES, PLACES))

    def dense(self, stride: int) -> tuple[FDFEAnomalyNet, list[FDFEAnomalyNet]]:
        """The normalised teacher and the students, describing every `stride`-th pixel of the image."""
        teacher = self.teacher.with_normalised_descriptors(self.mean, self.deviation)
        nets = teacher, *self.students
        dense, *students = (FDFEAnomalyNet(net, zoomed_stride(stride, self.zoom), padding=PADDING) for net in nets)
        return dense, students

    def calibrate(self, statistics: "Statistics") -> None:
        """Take what is usual from anomaly-free images."""
        for name, found in (("error", statistics.errors), ("variance", statistics.variances)):
            getattr(self, f"{name}_mean").fill_(found.mean.item())
            getattr(self, f"{name}_deviation").fill_(found.deviation.item())
        mean, deviation = statistics.of_places()
        self.place_mean.copy_(mean)
        self.place_deviation.copy_(deviation)

    def combine(self, error: Tensor, variance: Tensor, normalisation: str = NORMALISATIONS[0]) -> Tensor:
        """The anomaly score (N,h,w) of error and variance. 0 is usual, in deviations.

        "image": that of section 3.2, normalised error plus normalised variance, each by one mean and deviation.
        "place": error plus variance, which is the students' mean squared distance to the teacher, by the mean and
        deviation of the place in the image. Edges and highlights that are often hard to predict don't hide a defect.
        """
        if normalisation == "image":
            return (error - self.error_mean.float()) / self.error_deviation.float() + (
                variance - self.variance_mean.float()
            ) / self.variance_deviation.float()
        mean, deviation = F.interpolate(
            torch.stack([self.place_mean, self.place_deviation])[None], error.shape[1:], mode="bilinear"
        )[0]
        return (error + variance - mean) / deviation


class Statistics:
    """Error and variance on anomaly-free images, gathered image by image."""

    def __init__(self):
        self.errors, self.variances = Moments(), Moments()
        self._images = 0
        self._sum = self._squares = torch.zeros(PLACES, PLACES, dtype=torch.float64)

    def update(self, error: Tensor, variance: Tensor) -> None:
        """Take in error and variance of images, (N,h,w) each."""
        self.errors.update(error.flatten()[:, None])
        self.variances.update(variance.flatten()[:, None])
        both = (error + variance).double().cpu()
        self._images += len(both)
        self._sum = self._sum + F.adaptive_avg_pool2d(both, PLACES).sum(0)
        self._squares = self._squares + F.adaptive_avg_pool2d(both.square(), PLACES).sum(0)

    def gather(self) -> None:
        """Take in what the other processes have taken in."""
        self.errors.gather()
        self.variances.gather()
        parts = distributed.gathered((self._images, self._sum, self._squares))
        self._images, self._sum, self._squares = (sum(values) for values in zip(*parts, strict=True))

    def of_places(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation (PLACES,PLACES) of error plus variance: smooth, and drawn to the overall ones if few."""
        mean = self._sum / self._images
        spread = (self._squares / self._images - mean.square()).clamp_min(0)
        mean, spread = (
            F.avg_pool2d(F.pad(values[None, None], (1, 1, 1, 1), mode="replicate"), 3, 1)[0, 0]
            for values in (mean, spread)
        )
        share = self._images / (self._images + PRIOR_IMAGES)
        overall = spread.mean() + (mean - mean.mean()).square().mean()
        mean = mean.mean() + share * (mean - mean.mean())
        deviation = (share * spread + (1 - share) * overall).sqrt()
        return mean.float(), torch.where(deviation > 1e-12 * (1 + mean), deviation, 1.0).float()


class AnomalyDetector(nn.Module):
    """One Scale or several: uint8 images (N,3,H,W) -> anomaly maps (N,H,W), float32.

    Scores of several scales are normalised each by itself and averaged (section 3.3). `stride`: a descriptor at every
    `stride`-th pixel, interpolated between. `normalisation` is one of NORMALISATIONS.
    """

    def __init__(self, scales: Sequence[Scale], stride: int = 1, normalisation: str = NORMALISATIONS[0]):
        super().__init__()
        self.scales = nn.ModuleList(scales)
        self.stride = stride
        self.normalisation = normalisation
        self._dense = [scale.dense(stride) for scale in scales]

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        pixels = preprocessing.normalise(images)
        total = torch.zeros(1, device=images.device)
        for scale, (teacher, students) in zip(self.scales, self._dense, strict=True):
            seen = zoomed(pixels, scale.zoom)
            found = scale.combine(*scoring.error_and_variance(teacher, students, seen), self.normalisation)
            found = scoring.at_every_pixel(found, zoomed_stride(self.stride, scale.zoom), seen.shape[2:])
            total = total + scoring.enlarged(found, scale.zoom, images.shape[2:])
        return total / len(self.scales)

    def _apply(self, fn, *args, **kwargs) -> Self:
        super()._apply(fn, *args, **kwargs)
        self._dense = [scale.dense(self.stride) for scale in self.scales]
        return self


def scale_to_checkpoint(scale: Scale) -> dict[str, Any]:
    """What rebuilds a Scale, in tensors and numbers."""
    return {
        "patch_size": scale.patch_size,
        "zoom": scale.zoom,
        "students": len(scale.students),
        "state": scale.state_dict(),
    }


def scale_from_checkpoint(content: dict[str, Any]) -> Scale:
    """The Scale that scale_to_checkpoint wrote."""
    size = content["patch_size"] // content["zoom"]
    teacher, *students = (AnomalyNet(size) for _ in range(content["students"] + 1))
    scale = Scale(teacher, students, torch.zeros(512), torch.ones(512), content["zoom"])
    scale.load_state_dict(content["state"])
    return scale.eval()
