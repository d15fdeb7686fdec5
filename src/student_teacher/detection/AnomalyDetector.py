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
    """A teacher and M students of one patch size, with the statistics that normalise them.

    `mean` and `std` (C,) are those of the teacher's descriptors on anomaly-free images (section 3.2 of the paper). The
    other buffers are means and stds of error and predictive variance on such images, over all pixels and at each place;
    `calibrate` sets them. `padding` is one of FDFE.PADDINGS: what surrounds the images.
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
        """The teacher with normalised descriptors: the students' target."""
        return self.teacher.with_normalised_descriptors(self.mean, self.std)

    def dense(self, stride: int) -> tuple[FDFEAnomalyNet, list[FDFEAnomalyNet]]:
        """The normalised teacher and the students, describing every `stride`-th pixel of the image."""
        nets = self.normalised_teacher(), *self.students
        dense, *students = (FDFEAnomalyNet(net, stride, padding=self.padding) for net in nets)
        return dense, students

    def calibrate(self, statistics: ScoreStatistics) -> None:
        """Set means and stds to those of anomaly-free images."""
        for name, found in (("error", statistics.errors), ("variance", statistics.variances)):
            getattr(self, f"{name}_mean").fill_(found.mean.item())
            getattr(self, f"{name}_std").fill_(found.std.item())
        mean, std = statistics.of_places()
        self.place_mean.copy_(mean)
        self.place_std.copy_(std)

    def combine(self, error: Tensor, variance: Tensor, normalisation: str = NORMALISATIONS[0]) -> Tensor:
        """The anomaly score (N,h,w) of error and variance (N,h,w): in stds above the mean of good images.

        "image" is equation (11) of section 3.2: normalised error plus normalised variance, each with one mean and std
        for all pixels. "place" is error plus variance, the students' mean squared distance to the teacher, normalised
        with the mean and std of the place in the image. Edges and highlights, hard to predict on good images too, then
        don't hide a defect.
        """
        if normalisation == "image":
            return (error - self.error_mean.float()) / self.error_std.float() + (
                variance - self.variance_mean.float()
            ) / self.variance_std.float()
        return standardise(error + variance, self.place_mean, self.place_std)


class Maps(NamedTuple):
    """What a detector computes for images. With patch students both are the same."""

    anomaly_maps: Tensor  # float32 (N,h,w), over the whole image: where the defects are
    scored_maps: Tensor  # the same shape: image scores are computed from these


class AnomalyDetector(nn.Module):
    """One Scale or several: uint8 images (N,3,H,W) -> anomaly maps (N,H,W), float32. For image scores see `maps`.

    Each scale's scores are normalised, then averaged over the scales (section 3.3). Descriptors are computed at every
    `stride`-th pixel, and scores interpolated between. `normalisation` is one of NORMALISATIONS.
    """

    image_score = scoring.TOP  # by default

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
        """Anomaly maps of uint8 images (N,3,H,W)."""
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

    def load_state_dict(self, *args, **kwargs) -> NamedTuple:
        """As nn.Module's; the dense networks follow, which hold normalised copies of the teachers."""
        found = super().load_state_dict(*args, **kwargs)
        self._make_dense()
        return found


def scale_to_checkpoint(scale: Scale) -> dict[str, Any]:
    """A Scale as tensors and numbers, for `scale_from_checkpoint`."""
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
