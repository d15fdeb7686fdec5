"""A frozen backbone and its students together: images in, anomaly maps out."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from student_teacher.detection import scoring
from student_teacher.detection.AnomalyDetector import Maps
from student_teacher.images.ignored import seen
from student_teacher.students.GlobalStudent import GlobalStudent
from student_teacher.students.LocalStudent import LocalStudent, Neighbourhood, neighbourhoods
from student_teacher.teachers.BackboneTeacher import FINEST_STRIDE, BackboneTeacher, Normalisation

COARSE_STRIDE = 32  # levels with this stride or a larger one show that there is a defect, but not where
SHARPNESS = 4  # of the step in the map from local to global students, where global ones explain half of the variance
LEAST_WEIGHT, SCORE_WEIGHT = 0.4, 0.7  # of global students in map and score: chosen on five data sets, used for all
GLOBAL, LOCAL = KINDS = "global", "local"  # students
MAP, SCORE = "map", "score"  # what errors are standardised for


class Errors(NamedTuple):
    """The students' errors: for GLOBAL and LOCAL a list of levels, (N,M,h,w) each; for GLOBAL M is 1."""

    actual: dict[str, list[Tensor]]  # distances between each student's prediction and the teacher
    expected: dict[str, list[Tensor]]  # the distances that each of M local students expects without a defect

    def of(self, use: str) -> dict[str, list[Tensor]]:
        """For the map the actual errors; for the score the actual minus the expected ones."""
        if use == MAP:
            return self.actual
        return {
            kind: [
                error - F.interpolate(expected, error.shape[2:], mode="bilinear")
                for error, expected in zip(self.actual[kind], self.expected[kind], strict=True)
            ]
            for kind in KINDS
        }

    def together(self) -> Self:
        """The errors of all local students together: M = 1.

        The root of the mean squared error, which is the paper's regression error plus predictive variance; and the mean
        of what they expect.
        """
        return Errors(
            _each_level(lambda level: level.square().mean(1, True).sqrt(), self.actual),
            _each_level(lambda level: level.mean(1, True), self.expected),
        )

    def by(self, students: int | Sequence[int] | Tensor) -> Self:
        """The errors of one local student: the same for all images, or one for each (N,). M = 1."""
        return Errors(
            *(_each_level(lambda level: level[torch.arange(len(level)), students][:, None], part) for part in self)
        )


def _each_level(function, part):
    """The part of Errors, with a function applied to each level that has several students."""
    return {
        kind: [level if level.shape[1] == 1 else function(level) for level in levels] for kind, levels in part.items()
    }


class Standardisation(Normalisation):
    """Normalises errors (N,1,h,w) by one mean and one std of good images (section 3.2 of the paper)."""

    @classmethod
    def fit(cls, values: Tensor, ignored: np.ndarray | None = None) -> tuple[Self, Tensor]:
        """Fit to good images' values (n,1,h,w), without regions to ignore.

        Also returns those values, each image standardised with mean and std of the other images.
        """
        parts = values.double()[:, 0, seen(ignored, tuple(values.shape[2:])).to(values.device)]
        sums, squares, number = parts.sum(1), parts.square().sum(1), len(parts)
        own_sums, own_squares = F.pad(sums, (1, 0)), F.pad(squares, (1, 0))  # left out: first nothing, then each image
        counts = torch.tensor([number] + [max(1, number - 1)] * number, device=values.device) * parts.shape[1]
        means = (sums.sum() - own_sums) / counts
        stds = ((squares.sum() - own_squares) / counts - means.square()).clamp_min(1e-12).sqrt()
        means, stds = means.to(values.dtype), stds.to(values.dtype)
        return cls(means[0], stds[0]), (values - means[1:, None, None, None]) / stds[1:, None, None, None]


class BackboneDetector(nn.Module):
    """uint8 images (N,3,H,W) at the teacher's size -> anomaly maps, a score at every 8th pixel: (N,H/8,W/8), float32.

    Each level of the teacher has a global student, and each but the first and the last also local ones. All errors are
    standardised, averaged over the levels, and then a weighted mean is taken of global and local students. In the image
    score the weight of the global ones is SCORE_WEIGHT. In the map it depends on s, the fraction of the variance that
    they explain on good images: it is s^4 / (s^4 + (1 - s)^4), but at least LEAST_WEIGHT. Then at each place both
    weights are divided by the square of the error that is expected there: whoever predicts a place better counts for
    more. Global students are better at whether there is a defect, local ones at where it is. Coarse levels are better
    at whether, too: those with stride 32 and more count for the score only.

    The score is computed from the errors minus those that local students expect from the surroundings. At the edges of
    parts whose position varies, errors are large on good images too. The map keeps the plain errors: around a large
    defect the surroundings are abnormal, and the expected errors are too high.

    `local_students` has a list of M students for each of `neighbourhoods(teacher.strides)`. `calibrate` sets the
    standardisations.
    """

    stride = FINEST_STRIDE
    image_score = scoring.SMOOTH  # by default

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
        """Anomaly maps of uint8 images (N,3,H,W), and the maps that image scores use; both (N,H/8,W/8)."""
        return self.maps_of(self.errors(images))

    def maps_of(self, errors: Errors) -> Maps:
        """As `maps`, from the result of `errors`."""
        errors = errors.together()
        return Maps(*(self._combined(use, self.standardised(use, errors), errors) for use in (MAP, SCORE)))

    def errors(self, images: Tensor) -> Errors:
        """Errors of all students on uint8 images (N,3,H,W)."""
        return self.errors_of(self.teacher(images))

    def errors_of(self, maps: Sequence[Tensor]) -> Errors:
        """Errors of all students, from the teacher's maps (N,K,h,w) of all levels."""
        maps = [level.float() for level in maps]
        pairs = zip(self.global_students, maps, strict=True)
        found = {GLOBAL: [student(level)[:, None].sqrt() for student, level in pairs], LOCAL: []}
        expected = {GLOBAL: [None] * len(maps), LOCAL: []}
        for around, students in zip(neighbourhoods(self.teacher.strides), self.local_students, strict=True):
            stacked = around.of(maps)[0]
            squared, logs = zip(*(student.errors(stacked) for student in students), strict=True)
            found[LOCAL] += [torch.stack(level, 1).sqrt() for level in zip(*squared, strict=True)]
            sort_expected(expected, around, torch.stack(logs, 1))
        return Errors(found, expected)

    @torch.inference_mode()
    def calibrate(self, errors: Errors, ignored: np.ndarray | None = None) -> Maps:
        """Set the standardisations from the `errors` on good images of students that have not seen them, M = 1.

        Regions to ignore (h,w) do not count.

        Returns the maps of those images, each standardised with mean and std of the others.
        """
        found = []
        for use in (MAP, SCORE):
            scores = {}
            for kind, levels in errors.of(use).items():
                parts, scores[kind] = zip(*(Standardisation.fit(level, ignored) for level in levels), strict=True)
                self.standardisations[use][kind] = nn.ModuleList(parts)
            found.append(self._combined(use, scores, errors))
        return Maps(*found)

    def standardised(self, use: str, errors: Errors) -> dict[str, list[Tensor]]:
        """The errors, M = 1, standardised for MAP or SCORE: for GLOBAL and LOCAL a list of levels, (N,1,h,w) each."""
        by, values = self.standardisations[use], errors.of(use)
        return {kind: [s(v) for s, v in zip(by[kind], values[kind], strict=True)] for kind in KINDS}

    def weights(self, use: str, errors: Errors) -> Tensor | float:
        """The weights of the global students, 0 to 1: for the map at each place, (N,1,H/8,W/8), for the score one.

        Of the errors, M = 1, the expected ones count.
        """
        if use == SCORE:
            return SCORE_WEIGHT
        expected = self._means(MAP, errors.expected)
        return 1 / (1 + (1 / self.map_weight - 1) * (expected[GLOBAL] / expected[LOCAL]).square())

    def _combined(self, use, scores, errors):
        """Standardised errors, (N,1,h,w) per level -> (N,H/8,W/8)."""
        means = self._means(use, scores)
        return (means[LOCAL] + self.weights(use, errors) * (means[GLOBAL] - means[LOCAL]))[:, 0]

    def _means(self, use, values):
        """For GLOBAL and LOCAL the means of the levels that count, (N,1,h,w) each -> (N,1,H/8,W/8)."""
        return {
            kind: mean_of_levels(
                [level for level, stride in zip(values[kind], strides, strict=True) if counts(use, stride)],
                self.grid(FINEST_STRIDE),
            )
            for kind, strides in self.strides.items()
        }

    @property
    def explained(self) -> float:
        """The fraction of good images' variance that global students explain, 0 to 1: the mean of the map's levels."""
        pairs = zip(self.global_students, self.strides[GLOBAL], strict=True)
        levels = [student.explained for student, stride in pairs if counts(MAP, stride)]
        return sum(levels) / len(levels)

    @property
    def map_weight(self) -> float:
        """The weight of the global students in the map, 0 to 1, where both kinds are expected to err alike."""
        explained, rest = self.explained**SHARPNESS, (1 - self.explained) ** SHARPNESS
        return max(LEAST_WEIGHT, explained / (explained + rest))

    def grid(self, stride: int) -> tuple[int, int]:
        """Rows and columns of maps with this stride."""
        return tuple(length // stride for length in self.teacher.size)

    def to_checkpoint(self, backbone: str) -> dict[str, Any]:
        """The detector as tensors and numbers, for `of_checkpoint`. `backbone` is the backbone's name."""
        return {
            "teacher": self.teacher.to_checkpoint(backbone),
            "global_students": [student.to_checkpoint() for student in self.global_students],
            "local_students": [[student.to_checkpoint() for student in students] for students in self.local_students],
            "standardisations": {name: value.cpu() for name, value in self.standardisations.state_dict().items()},
        }

    @classmethod
    def of_checkpoint(cls, content: dict[str, Any]) -> Self:
        """The inverse of `to_checkpoint`."""
        detector = cls(
            BackboneTeacher.of_checkpoint(content["teacher"]),
            [GlobalStudent.of_checkpoint(part) for part in content["global_students"]],
            [[LocalStudent.of_checkpoint(part) for part in students] for students in content["local_students"]],
        )
        detector.standardisations.load_state_dict(content["standardisations"])
        return detector.eval()


def sort_expected(expected: dict[str, list], around: Neighbourhood, logs: Tensor) -> None:
    """Add the log errors (N,M,E,h,w) that a neighbourhood's M local students expect to `Errors.expected`."""
    for level, log in zip(around.global_levels, logs.unbind(2), strict=False):
        expected[GLOBAL][level] = log.exp()
    expected[LOCAL] += list(logs[:, :, len(around.global_levels) :].exp().unbind(2))


def mean_of_levels(levels: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Maps (N,1,h,w) of any sizes, interpolated to `size` and averaged over the levels."""
    return sum(F.interpolate(level, size, mode="bilinear") for level in levels) / len(levels)


def counts(use: str, stride: int) -> bool:
    """Whether levels with this stride count for the `use`, MAP or SCORE."""
    return use == SCORE or stride < COARSE_STRIDE
