"""Teacher and students together: images in, anomaly maps out."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from AnomalyNet import AnomalyNet
from FDFE import PADDING
from FDFEAnomalyNet import FDFEAnomalyNet
from student_teacher.detection import scoring
from student_teacher.detection.score_statistics import PLACES, ScoreStatistics, standardise
from student_teacher.images import preprocessing

NORMALISATIONS = ("place", "image")  # the first is the default


class Scale(nn.Module):
    """A teacher and M students of one patch size, with what normalises them.

    `mean` and `deviation` (C,) are those of the teacher's descriptors on anomaly-free images (section 3.2). The other
    buffers say what error and predictive variance are on such images, overall and at each place; `calibrate` sets them.
    `padding` says what stands round images, as in padding.pad.
    """

    def __init__(
        self,
        teacher: AnomalyNet,
        students: Sequence[AnomalyNet],
        mean: Tensor,
        std: Tensor,
        *,
        padding: str = PADDING,
    ):
        super().__init__()
        self.patch_size, self.padding = teacher.patch_size, padding
        self.teacher = teacher
        self.students = nn.ModuleList(students)
        self.register_buffer("mean", mean.double())
        self.register_buffer("std", std.double())
        for name in ("error_mean", "variance_mean"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))
        for name in ("error_std", "variance_std"):
            self.register_buffer(name, torch.ones((), dtype=torch.float64))
        self.register_buffer("place_mean", torch.zeros(PLACES, PLACES))
        self.register_buffer("place_std", torch.ones(PLACES, PLACES))

    def normalised_teacher(self) -> AnomalyNet:
        """The teacher as it describes in normalised form: what students learn to say."""
        return self.teacher.with_normalised_descriptors(self.mean, self.std)

    def dense(self, stride: int) -> tuple[FDFEAnomalyNet, list[FDFEAnomalyNet]]:
        """The normalised teacher and the students, describing every `stride`-th pixel of the image."""
        nets = self.normalised_teacher(), *self.students
        dense, *students = (FDFEAnomalyNet(net, stride, padding=self.padding) for net in nets)
        return dense, students

    def calibrate(self, statistics: ScoreStatistics) -> None:
        """Take what is usual from anomaly-free images."""
        for name, found in (("error", statistics.errors), ("variance", statistics.variances)):
            getattr(self, f"{name}_mean").fill_(found.mean.item())
            getattr(self, f"{name}_std").fill_(found.std.item())
        mean, std = statistics.of_places()
        self.place_mean.copy_(mean)
        self.place_std.copy_(std)

    def combine(self, error: Tensor, variance: Tensor, normalisation: str = NORMALISATIONS[0]) -> Tensor:
        """The anomaly score (N,h,w) of error and variance. 0 is usual, in deviations.

        "image": that of section 3.2, normalised error plus normalised variance, each by one mean and deviation.
        "place": error plus variance, which is the students' mean squared distance to the teacher, by the mean and
        deviation of the place in the image. Edges and highlights that are often hard to predict don't hide a defect.
        """
        if normalisation == "image":
            return (error - self.error_mean.float()) / self.error_std.float() + (
                variance - self.variance_mean.float()
            ) / self.variance_std.float()
        return standardise(error + variance, self.place_mean, self.place_std)


class Maps(NamedTuple):
    """What a detector finds in images. Of patch students both are the same."""

    anomaly_maps: Tensor  # float32 (N,h,w), over the whole image: where something is
    scored_maps: Tensor  # the same shape: what image scores are of


class AnomalyDetector(nn.Module):
    """One Scale or several: uint8 images (N,3,H,W) -> anomaly maps (N,H,W), float32. For image scores see `maps`.

    Scores of several scales are normalised each by itself and averaged (section 3.3). `stride`: a descriptor at every
    `stride`-th pixel, interpolated between. `normalisation` is one of NORMALISATIONS.
    """

    def __init__(self, scales: Sequence[Scale], stride: int = 1, normalisation: str = NORMALISATIONS[0]):
        super().__init__()
        self.scales = nn.ModuleList(scales)
        self.stride = stride
        self.normalisation = normalisation
        self._make_dense()

    def _make_dense(self):
        self._dense = [scale.dense(self.stride) for scale in self.scales]

    def forward(self, images: Tensor) -> Tensor:
        return self.maps(images).anomaly_maps

    @torch.inference_mode()
    def maps(self, images: Tensor) -> Maps:
        """Anomaly maps of uint8 images (N,3,H,W), and what their image scores are of."""
        pixels = preprocessing.normalise(images)
        total = 0
        for scale, (teacher, students) in zip(self.scales, self._dense, strict=True):
            scores = scale.combine(*scoring.error_and_variance(teacher, students, pixels), self.normalisation)
            total = total + scoring.at_every_pixel(scores, self.stride, images.shape[2:])
        maps = total / len(self.scales)
        return Maps(maps, maps)

    def _apply(self, fn, *args, **kwargs) -> Self:
        super()._apply(fn, *args, **kwargs)
        self._make_dense()
        return self


def scale_to_checkpoint(scale: Scale) -> dict[str, Any]:
    """What rebuilds a Scale, in tensors and numbers."""
    content = {"patch_size": scale.patch_size, "students": len(scale.students), "padding": scale.padding}
    return content | {"state": scale.state_dict()}


def scale_from_checkpoint(content: dict[str, Any]) -> Scale:
    """The Scale that scale_to_checkpoint wrote."""
    mean, std = (content["state"][name] for name in ("mean", "std"))
    teacher, *students = (
        AnomalyNet(content["patch_size"], descriptor_size=len(mean)) for _ in range(content["students"] + 1)
    )
    scale = Scale(teacher, students, mean, std, padding=content.get("padding", PADDING))
    scale.load_state_dict(content["state"])
    return scale.eval()
