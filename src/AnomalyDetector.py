"""Teacher and students together: images in, anomaly maps out."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

import preprocessing
import scoring
from AnomalyNet import AnomalyNet
from FDFEAnomalyNet import FDFEAnomalyNet
from GlobalStudent import GlobalStudent
from scales import PADDING, zoomed, zoomed_stride
from usual import PLACES, Statistics, by_place

NORMALISATIONS = ("place", "image")  # the first is the default


class Scale(nn.Module):
    """A teacher and M students of one patch size, with what normalises them.

    `mean` and `deviation` (512,) are those of the teacher's descriptors on anomaly-free images (section 3.2). The other
    buffers say what error and predictive variance are on such images, overall and at each place; `calibrate` sets them.
    With a `zoom` of 2 the networks see the image at half its size, so that a patch is twice as wide. A `global_student`
    may join the students.
    """

    def __init__(
        self,
        teacher: AnomalyNet,
        students: Sequence[AnomalyNet],
        mean: Tensor,
        deviation: Tensor,
        zoom: int = 1,
        global_student: GlobalStudent | None = None,
    ):
        super().__init__()
        self.zoom = zoom
        self.patch_size = teacher.patch_size * zoom
        self.teacher = teacher
        self.students = nn.ModuleList(students)
        self.global_student = global_student
        self.register_buffer("mean", mean.double())
        self.register_buffer("deviation", deviation.double())
        for name in ("error_mean", "variance_mean"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))
        for name in ("error_deviation", "variance_deviation"):
            self.register_buffer(name, torch.ones((), dtype=torch.float64))
        self.register_buffer("place_mean", torch.zeros(PLACES, PLACES))
        self.register_buffer("place_deviation", torch.ones(PLACES, PLACES))

    def normalised_teacher(self) -> AnomalyNet:
        """The teacher as it describes in normalised form: what students learn to say."""
        return self.teacher.with_normalised_descriptors(self.mean, self.deviation)

    def dense(self, stride: int) -> tuple[FDFEAnomalyNet, list[FDFEAnomalyNet]]:
        """The normalised teacher and the students, describing every `stride`-th pixel of the image."""
        nets = self.normalised_teacher(), *self.students
        dense, *students = (FDFEAnomalyNet(net, zoomed_stride(stride, self.zoom), padding=PADDING) for net in nets)
        return dense, students

    def dense_global(self) -> FDFEAnomalyNet:
        """The teacher as the global student wants it."""
        return self.global_student.described_by(self.normalised_teacher(), self.zoom)

    def calibrate(self, statistics: Statistics) -> None:
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
        return by_place(error + variance, self.place_mean, self.place_deviation)


class Found(NamedTuple):
    """What an AnomalyDetector finds in images. Of one scale without a global student both are the same."""

    anomaly_maps: Tensor  # float32 (N,H,W): where something is
    scored_maps: Tensor  # the same shape, neither levelled nor weighted: image scores are of these


class AnomalyDetector(nn.Module):
    """One Scale or several: uint8 images (N,3,H,W) -> anomaly maps (N,H,W), float32. For image scores see `find`.

    Scores of several scales are normalised each by itself and averaged (section 3.3). A scale's global student has a
    part in its scores, as large as the share of variance that it explains, unless `global_students` is False.

    To say where a defect is takes more care than to say whether there is one. On a part that it has never seen a global
    student errs everywhere, and as much more at some places as at others: in the anomaly map its scores are levelled,
    divided by the root of 1 + their level. And a scale's scores reach half a patch past the defect, so that in the map
    it weighs as 1 / patch size; not with the paper's normalisation. The image's score counts all as it is.

    `stride`: a descriptor at every `stride`-th pixel, interpolated between. `normalisation` is one of NORMALISATIONS,
    for the students of patches.
    """

    def __init__(
        self,
        scales: Sequence[Scale],
        stride: int = 1,
        normalisation: str = NORMALISATIONS[0],
        global_students: bool = True,
    ):
        super().__init__()
        self.scales = nn.ModuleList(scales)
        self.stride = stride
        self.normalisation = normalisation
        self.global_students = global_students
        self._make_dense()

    def _make_dense(self):
        self._dense = [scale.dense(self.stride) for scale in self.scales]
        self._globals = [
            scale.dense_global() if self.global_students and scale.global_student else None for scale in self.scales
        ]

    def forward(self, images: Tensor) -> Tensor:
        return self.find(images).anomaly_maps

    @torch.inference_mode()
    def find(self, images: Tensor) -> Found:
        """Anomaly maps of uint8 images (N,3,H,W), and what their image scores are of."""
        pixels = preprocessing.normalise(images)
        anomaly_maps = scored_maps = 0
        parts = zip(self.scales, self.map_weights, self._dense, self._globals, strict=True)
        for scale, weight, (teacher, students), whole in parts:
            seen = zoomed(pixels, scale.zoom)
            found = scale.combine(*scoring.error_and_variance(teacher, students, seen), self.normalisation)
            found = scoring.at_every_pixel(found, zoomed_stride(self.stride, scale.zoom), seen.shape[2:])
            found = scoring.enlarged(found, scale.zoom, images.shape[2:])
            levelled = found
            if whole:
                scores, level = scale.global_student(whole, pixels, scale.zoom)
                share = scale.global_student.explained
                levelled = found.lerp(scores / (1 + level[:, None, None]).sqrt(), share)
                found = found.lerp(scores, share)
            anomaly_maps = anomaly_maps + weight * levelled
            scored_maps = scored_maps + found / len(self.scales)
        return Found(anomaly_maps, scored_maps)

    @property
    def map_weights(self) -> list[float]:
        """What each scale counts for in the anomaly map; together 1."""
        paper = self.normalisation == "image"
        weights = [1.0 if paper else 1 / scale.patch_size for scale in self.scales]
        return [weight / sum(weights) for weight in weights]

    def _apply(self, fn, *args, **kwargs) -> Self:
        super()._apply(fn, *args, **kwargs)
        self._make_dense()
        return self


def scale_to_checkpoint(scale: Scale) -> dict[str, Any]:
    """What rebuilds a Scale, in tensors and numbers."""
    remembered = scale.global_student
    return {
        "patch_size": scale.patch_size,
        "zoom": scale.zoom,
        "students": len(scale.students),
        "state": {name: value for name, value in scale.state_dict().items() if not name.startswith("global_student.")},
        "global_student": remembered and remembered.to_checkpoint(),
    }


def scale_from_checkpoint(content: dict[str, Any]) -> Scale:
    """The Scale that scale_to_checkpoint wrote."""
    size = content["patch_size"] // content["zoom"]
    teacher, *students = (AnomalyNet(size) for _ in range(content["students"] + 1))
    scale = Scale(teacher, students, torch.zeros(512), torch.ones(512), content["zoom"])
    scale.load_state_dict(content["state"])
    if content.get("global_student"):
        scale.global_student = GlobalStudent.of_checkpoint(content["global_student"])
    return scale.eval()
