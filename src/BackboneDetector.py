"""A frozen backbone and its students together: images in, anomaly maps out."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from AnomalyDetector import Found
from BackboneTeacher import FINEST_STRIDE, BackboneTeacher
from GlobalStudent import GlobalStudent
from LocalStudent import LocalStudent, neighbourhoods

BORDER = 48  # pixels from the image's border within which students see less than elsewhere
COARSE_STRIDE = 32  # levels of this stride tell that there is a defect, not where
SHARPNESS = 4  # of the turn from local to global students in the map, as global ones explain more than half
LEAST_SHARE, SCORE_SHARE = 0.3, 0.7  # of the global students, in map and score: chosen on five sets, one for all
GLOBAL, LOCAL = KINDS = "global", "local"  # students
MAP, SCORE = "map", "score"  # what errors are standardised for


class Standardisation(nn.Module):
    """Errors (N,h,w) -> deviations from what is usual on good images: (error / factor - mean) / std.

    One mean and one std for all places, as in section 3.2 of the paper. `factor` (h,w) is 1, or at the border what
    errors are there, as a multiple of those within, where that is more than 1.
    """

    def __init__(self, factor: Tensor, mean: Tensor, std: Tensor):
        super().__init__()
        self.register_buffer("factor", factor)
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, errors: Tensor) -> Tensor:
        return (errors / self.factor - self.mean) / self.std

    @classmethod
    def fit(cls, errors: Tensor, classes: Tensor) -> tuple[Self, Tensor]:
        """From good images' errors (n,h,w); places of one of the `classes` (h,w), integers, share a factor.

        Returns with it those errors, each image's standardised by all other images.
        """
        classes = classes.to(errors.device)
        onehot = F.one_hot(classes.flatten()).to(errors.dtype)
        flat = errors.flatten(1)
        counts, sums, squares = onehot.sum(0), flat @ onehot, flat.square() @ onehot
        number = len(errors)
        own, own_squares = F.pad(sums, (0, 0, 1, 0)), F.pad(squares, (0, 0, 1, 0))  # first of no image, then of each
        images = torch.tensor([number] + [max(1, number - 1)] * number, device=errors.device)[:, None]
        means = ((sums.sum(0) - own) / images / counts).clamp_min(1e-12)
        factors = (means / means[:, -1:]).clamp_min(1)
        mean = ((means / factors) * counts).sum(1) / counts.sum()
        mean_square = ((squares.sum(0) - own_squares) / images / factors.square()).sum(1) / counts.sum()
        std = (mean_square - mean.square()).clamp_min(1e-12).sqrt()
        left_out = (errors / factors[1:, classes] - mean[1:, None, None]) / std[1:, None, None]
        return cls(factors[0, classes], mean[0], std[0]), left_out


def border_classes(size: Sequence[int], stride: int | None) -> Tensor:
    """How many places each of (h,w) lies from the border, up to those BORDER pixels within; for no stride 0 for all."""
    most = 0 if stride is None else min(max(1, BORDER // stride), (min(size) - 1) // 2)
    rows, columns = (torch.minimum(torch.arange(length), length - 1 - torch.arange(length)) for length in size)
    return torch.minimum(rows[:, None], columns).clamp_max(most)


class BackboneDetector(nn.Module):
    """uint8 images (N,3,H,W) of `size` -> anomaly maps, a score at every 8th pixel: (N,H/8,W/8), float32.

    For each level of the teacher there is a global student and, but for the first, a local one or several. Their errors
    are standardised and averaged over levels, and then both kinds averaged. In the map the global ones weigh the
    more, the larger the share s of the variance is that they explain on good images: s^4 / (s^4 + (1 - s)^4), and
    LEAST_SHARE at least; the local ones have the rest. For the image's score global ones weigh SCORE_SHARE: they tell
    best whether there is a defect, local ones where.

    For the same reason levels of a stride of 32 count for the score alone, and in the score errors at the border are
    brought down to what they are within; in the map they stay, as defects at the border then show as well.

    `local_students` are M for each of `neighbourhoods(teacher.strides)`. `calibrate` makes the standardisations.
    """

    stride = FINEST_STRIDE

    def __init__(
        self,
        teacher: BackboneTeacher,
        global_students: Sequence[GlobalStudent],
        local_students: Sequence[Sequence[LocalStudent]],
    ):
        super().__init__()
        self.teacher = teacher
        self.global_students = nn.ModuleList(global_students)
        self.local_students = nn.ModuleList(nn.ModuleList(students) for students in local_students)
        around = neighbourhoods(teacher.strides)
        self.strides = {GLOBAL: teacher.strides, LOCAL: tuple(n.stride for n in around for _ in n.levels)}
        self.standardisations = nn.ModuleDict()
        for use in (MAP, SCORE):
            self.standardisations[use] = nn.ModuleDict(
                {
                    kind: nn.ModuleList(_unknown(self._grid(stride)) for stride in strides)
                    for kind, strides in self.strides.items()
                }
            )

    def forward(self, images: Tensor) -> Tensor:
        return self.find(images).anomaly_maps

    @torch.inference_mode()
    def find(self, images: Tensor) -> Found:
        """Anomaly maps of uint8 images (N,3,H,W), and what their image scores are of; both (N,H/8,W/8)."""
        return self.found_of(self.errors(images))

    def found_of(self, errors: Mapping[str, Sequence[Tensor]]) -> Found:
        """What `find` finds, from what `errors` gives."""
        return Found(*(self._combined(use, self.standardised(use, errors)) for use in (MAP, SCORE)))

    def errors(self, images: Tensor) -> dict[str, list[Tensor]]:
        """Distances of students and teacher on uint8 images (N,3,H,W), as `errors_of` gives them."""
        return self.errors_of(self.teacher(images))

    def errors_of(self, maps: Sequence[Tensor]) -> dict[str, list[Tensor]]:
        """Distances of students and teacher, from the teacher's maps: for each kind of student and level (N,h,w).

        The root of the squared error; of several students of the mean over them, which is the paper's regression error
        plus predictive variance.
        """
        maps = [level.float() for level in maps]
        found = {GLOBAL: [student(level).sqrt() for student, level in zip(self.global_students, maps, strict=True)]}
        found[LOCAL] = []
        for around, students in zip(neighbourhoods(self.teacher.strides), self.local_students, strict=True):
            stacked, channels = around.of(maps)
            squares = zip(*(student.squared_errors(stacked, channels) for student in students), strict=True)
            found[LOCAL] += [(sum(level) / len(students)).sqrt() for level in squares]
        return found

    @torch.inference_mode()
    def calibrate(self, errors: Mapping[str, Sequence[Tensor]]) -> Found:
        """Take from good images what errors are usual: those of students that have not seen them, as `errors` gives.

        Returns what is found in those images, each standardised by all the others.
        """
        found = []
        for use in (MAP, SCORE):
            scores = {}
            for kind, strides in self.strides.items():
                parts = [
                    Standardisation.fit(error, border_classes(error.shape[1:], stride if use == SCORE else None))
                    for error, stride in zip(errors[kind], strides, strict=True)
                ]
                self.standardisations[use][kind] = nn.ModuleList(part for part, _ in parts)
                scores[kind] = [left_out for _, left_out in parts]
            found.append(self._combined(use, scores))
        return Found(*found)

    def standardised(self, use: str, errors: Mapping[str, Sequence[Tensor]]) -> dict[str, list[Tensor]]:
        """What `errors` gives, standardised for the map or for the score."""
        by = self.standardisations[use]
        return {kind: [s(e) for s, e in zip(by[kind], errors[kind], strict=True)] for kind in KINDS}

    def _combined(self, use, scores):
        """Standardised errors of both kinds, (N,h,w) a level -> (N,H/8,W/8)."""
        means = {
            kind: mean_of_levels(
                [level for level, stride in zip(scores[kind], strides, strict=True) if counts(use, stride)],
                self._grid(FINEST_STRIDE),
            )
            for kind, strides in self.strides.items()
        }
        return means[LOCAL].lerp(means[GLOBAL], self.shares[use])

    @property
    def explained(self) -> float:
        """The share of the variance that global students explain on good images, the mean of all levels."""
        return sum(student.explained for student in self.global_students) / len(self.global_students)

    @property
    def shares(self) -> dict[str, float]:
        """How much the global students weigh in the map and in the score."""
        explained, rest = self.explained**SHARPNESS, (1 - self.explained) ** SHARPNESS
        return {MAP: max(LEAST_SHARE, explained / (explained + rest)), SCORE: SCORE_SHARE}

    def _grid(self, stride):
        return tuple(length // stride for length in self.teacher.size)

    def to_checkpoint(self, backbone: str) -> dict[str, Any]:
        """What `of_checkpoint` rebuilds it from; `backbone`: the backbone's name."""
        return {
            "teacher": self.teacher.to_checkpoint(backbone),
            "global_students": [student.to_checkpoint() for student in self.global_students],
            "local_students": [[student.to_checkpoint() for student in students] for students in self.local_students],
            "standardisations": {name: value.cpu() for name, value in self.standardisations.state_dict().items()},
        }

    @classmethod
    def of_checkpoint(cls, content: dict[str, Any]) -> Self:
        """The BackboneDetector whose `to_checkpoint` that was."""
        found = cls(
            BackboneTeacher.of_checkpoint(content["teacher"]),
            [GlobalStudent.of_checkpoint(part) for part in content["global_students"]],
            [[LocalStudent.of_checkpoint(part) for part in students] for students in content["local_students"]],
        )
        found.standardisations.load_state_dict(content["standardisations"])
        return found.eval()


def mean_of_levels(levels: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Maps (N,h,w) of any sizes, interpolated to `size` and averaged."""
    return sum(F.interpolate(level[:, None], size, mode="bilinear")[:, 0] for level in levels) / len(levels)


def counts(use: str, stride: int) -> bool:
    """Whether levels of this stride have a part in the map, or in the score."""
    return use == SCORE or stride < COARSE_STRIDE


def _unknown(size):
    return Standardisation(torch.ones(size), torch.zeros(()), torch.ones(()))
