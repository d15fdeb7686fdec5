"""A frozen backbone and its students together: images in, anomaly maps out."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from student_teacher.detection.AnomalyDetector import Maps
from student_teacher.students.GlobalStudent import GlobalStudent
from student_teacher.students.LocalStudent import LocalStudent, Neighbourhood, neighbourhoods
from student_teacher.teachers.BackboneTeacher import FINEST_STRIDE, BackboneTeacher

COARSE_STRIDE = 32  # levels of this stride tell that there is a defect, not where
SHARPNESS = 4  # of the turn from local to global students in the map, as global ones explain more than half
LEAST_WEIGHT, SCORE_WEIGHT = 0.3, 0.6  # of the global students, in map and score: chosen on five sets, one for all
GLOBAL, LOCAL = KINDS = "global", "local"  # students
MAP, SCORE = "map", "score"  # what errors are standardised for


class Errors(NamedTuple):
    """Of students, by their kind, for each level: (N,h,w)."""

    actual: dict[str, list[Tensor]]  # distances of their predictions to the teacher's maps
    expected: dict[str, list[Tensor]]  # what local students expect these to be where nothing is wrong

    def of(self, use: str) -> dict[str, list[Tensor]]:
        """What the map is made of, the errors; or what the score is: by how much they are more than expected."""
        if use == MAP:
            return self.actual
        return {
            kind: [
                error - F.interpolate(expected[:, None], error.shape[1:], mode="bilinear")[:, 0]
                for error, expected in zip(self.actual[kind], self.expected[kind], strict=True)
            ]
            for kind in KINDS
        }


class Standardisation(nn.Module):
    """Values (N,h,w) -> (value - mean) / std of good images, of all places together (section 3.2 of the paper)."""

    def __init__(self, mean: Tensor, std: Tensor):
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, values: Tensor) -> Tensor:
        return (values - self.mean) / self.std

    @classmethod
    def fit(cls, values: Tensor) -> tuple[Self, Tensor]:
        """From good images' values (n,h,w). Returns with it those values, each image's standardised by all others."""
        parts = values.double().flatten(1)
        sums, squares, number = parts.sum(1), parts.square().sum(1), len(parts)
        own_sums, own_squares = F.pad(sums, (1, 0)), F.pad(squares, (1, 0))  # first of no image, then of each
        counts = torch.tensor([number] + [max(1, number - 1)] * number, device=values.device) * parts.shape[1]
        means = (sums.sum() - own_sums) / counts
        stds = ((squares.sum() - own_squares) / counts - means.square()).clamp_min(1e-12).sqrt()
        means, stds = means.to(values.dtype), stds.to(values.dtype)
        return cls(means[0], stds[0]), (values - means[1:, None, None]) / stds[1:, None, None]


class BackboneDetector(nn.Module):
    """uint8 images (N,3,H,W) of `size` -> anomaly maps, a score at every 8th pixel: (N,H/8,W/8), float32.

    For each level of the teacher there is a global student and, but for the first, a local one or several. Their errors
    are standardised and averaged over levels, and then both kinds averaged. In the map the global ones weigh the
    more, the larger the share s of the variance is that they explain on good images: s^4 / (s^4 + (1 - s)^4), and
    LEAST_WEIGHT at least; the local ones have the rest. For the image's score global ones weigh SCORE_WEIGHT: they tell
    best whether there is a defect, local ones where.

    For the same reason levels of a stride of 32 count for the score alone. And the score is made of what errors are
    beyond those that local students expect from the surroundings: at borders and edges, where parts lie anyhow, errors
    are large on good images, too. In the map errors stay as they are: around a large defect all is strange, and larger
    errors are expected there.

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
                    kind: nn.ModuleList(Standardisation(torch.zeros(()), torch.ones(())) for _ in strides)
                    for kind, strides in self.strides.items()
                }
            )

    def forward(self, images: Tensor) -> Tensor:
        return self.maps(images).anomaly_maps

    @torch.inference_mode()
    def maps(self, images: Tensor) -> Maps:
        """Anomaly maps of uint8 images (N,3,H,W), and what their image scores are of; both (N,H/8,W/8)."""
        return self.maps_of(self.errors(images))

    def maps_of(self, errors: Errors) -> Maps:
        """What `maps` gives, from what `errors` gives."""
        return Maps(*(self._combined(use, self.standardised(use, errors)) for use in (MAP, SCORE)))

    def errors(self, images: Tensor) -> Errors:
        """Errors of all students on uint8 images (N,3,H,W)."""
        return self.errors_of(self.teacher(images))

    def errors_of(self, maps: Sequence[Tensor]) -> Errors:
        """Errors of all students, from the teacher's maps.

        The root of the squared error; of several students of the mean over them, which is the paper's regression error
        plus predictive variance.
        """
        maps = [level.float() for level in maps]
        found = {GLOBAL: [student(level).sqrt() for student, level in zip(self.global_students, maps, strict=True)]}
        found[LOCAL] = []
        expected = {GLOBAL: [None] * len(maps), LOCAL: []}
        for around, students in zip(neighbourhoods(self.teacher.strides), self.local_students, strict=True):
            stacked = around.of(maps)[0]
            squared, logs = zip(*(student.errors(stacked) for student in students), strict=True)
            found[LOCAL] += [(sum(level) / len(students)).sqrt() for level in zip(*squared, strict=True)]
            sort_expected(expected, around, sum(logs) / len(students))
        return Errors(found, expected)

    @torch.inference_mode()
    def calibrate(self, errors: Errors) -> Maps:
        """Take from good images what errors are usual: those of students that have not seen them, as `errors` gives.

        Returns what is found in those images, each standardised by all the others.
        """
        found = []
        for use in (MAP, SCORE):
            scores = {}
            for kind, levels in errors.of(use).items():
                parts, scores[kind] = zip(*map(Standardisation.fit, levels), strict=True)
                self.standardisations[use][kind] = nn.ModuleList(parts)
            found.append(self._combined(use, scores))
        return Maps(*found)

    def standardised(self, use: str, errors: Errors) -> dict[str, list[Tensor]]:
        """What `errors` gives, standardised for the map or for the score."""
        by, values = self.standardisations[use], errors.of(use)
        return {kind: [s(v) for s, v in zip(by[kind], values[kind], strict=True)] for kind in KINDS}

    def _combined(self, use, scores):
        """Standardised errors of both kinds, (N,h,w) a level -> (N,H/8,W/8)."""
        means = {
            kind: mean_of_levels(
                [level for level, stride in zip(scores[kind], strides, strict=True) if counts(use, stride)],
                self._grid(FINEST_STRIDE),
            )
            for kind, strides in self.strides.items()
        }
        return means[LOCAL].lerp(means[GLOBAL], self.global_weights[use])

    @property
    def explained(self) -> float:
        """The share of the variance that global students explain on good images, the mean of all levels."""
        return sum(student.explained for student in self.global_students) / len(self.global_students)

    @property
    def global_weights(self) -> dict[str, float]:
        """How much the global students weigh in the map and in the score."""
        explained, rest = self.explained**SHARPNESS, (1 - self.explained) ** SHARPNESS
        return {MAP: max(LEAST_WEIGHT, explained / (explained + rest)), SCORE: SCORE_WEIGHT}

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


def sort_expected(expected: dict[str, list], around: Neighbourhood, logs: Tensor) -> None:
    """Put what local students of a neighbourhood expect, (N,E,h,w), where `Errors` has it."""
    for level, log in zip(around.global_levels, logs.unbind(1), strict=False):
        expected[GLOBAL][level] = log.exp()
    expected[LOCAL] += list(logs[:, len(around.global_levels) :].exp().unbind(1))


def mean_of_levels(levels: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Maps (N,h,w) of any sizes, interpolated to `size` and averaged."""
    return sum(F.interpolate(level[:, None], size, mode="bilinear")[:, 0] for level in levels) / len(levels)


def counts(use: str, stride: int) -> bool:
    """Whether levels of this stride have a part in the map, or in the score."""
    return use == SCORE or stride < COARSE_STRIDE
