"""Stage 3 with a frozen backbone as teacher: global students in closed form, local ones trained in about a minute.

All good images are used for training. The errors that calibrate the detector are still those of students that have not
seen the image: global students leave it out exactly (GlobalStudent.fit), local ones are cross-fitted, each trained on
all folds but one. Images that look alike, such as photographs of the same part, are left out together.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from tqdm import tqdm

from student_teacher.detection import scoring
from student_teacher.detection.BackboneDetector import GLOBAL, LOCAL, BackboneDetector, Errors, sort_expected
from student_teacher.detection.Detector import Calibration
from student_teacher.images import ignored as ignoring
from student_teacher.images.store import ImageStore
from student_teacher.runtime import device, distributed
from student_teacher.runtime.bars import with_bar
from student_teacher.runtime.device import Compute
from student_teacher.students.GlobalStudent import GlobalStudent
from student_teacher.students.LocalStudent import (
    REACH,
    LocalStudent,
    Neighbourhood,
    log_distance,
    neighbourhoods,
)
from student_teacher.teachers.backbones import Backbone
from student_teacher.teachers.BackboneTeacher import STRIDE, BackboneTeacher
from student_teacher.training.loop import FinishedParts, evenly_spread, learning_rate
from student_teacher.training.optimiser import Optimiser

STATISTICS_IMAGES = 50  # for the mean and std of features, at most
MOST_IMAGES = 1_000  # to train on; of more, this many are taken, evenly spread
ALIKE = 0.6  # two images show the same part if their differences from the mean image correlate by this or more
FOLDS = 3  # and so many local students per level: each sees all folds but one
LOCAL_STEPS, COARSE_STEPS = 400, 200  # of local students at STRIDE; at larger strides, with a quarter of the places
CROPS, CROP = 32, 4  # crops per step, and places predicted along each side of a crop
LEARNING_RATE = 0.05  # Muon's, at its peak
BATCH = 8  # images at once


def fit(
    backbone: Backbone,
    size: tuple[int, int],
    store: ImageStore,
    compute: Compute,
    *,
    ignored: np.ndarray | None = None,
    parts: FinishedParts | None = None,
) -> tuple[BackboneDetector, Calibration]:
    """Fit teacher and students to the good images of the store, which have this `size`, and calibrate them.

    Regions to ignore (h,w) do not count in the calibration; the store's images have them painted over. Local students
    are kept in `parts`, and taken from there after a stop.
    """
    indices = evenly_spread(list(range(len(store))), MOST_IMAGES)
    if len(store) > MOST_IMAGES:
        print(f"training on {MOST_IMAGES:,} of {len(store):,} good images, evenly spread")
    backbone = compute.place(backbone)
    teacher = fit_teacher(backbone, size, store, compute, indices=evenly_spread(indices, STATISTICS_IMAGES))
    maps = teacher_maps(teacher, store, indices, compute)
    groups = look_alikes(maps, teacher.strides)
    if len(groups) < len(indices):
        print(f"{len(indices)} images of {len(groups)} parts: images that look alike are calibrated together")
    detector, calibration = calibrated(
        teacher, fit_students(teacher, maps, groups, compute, parts=parts), ignored=ignored
    )
    print(
        f"global students explain {detector.explained:.0%} of the variance among good images, each left out of the fit"
    )
    return detector, calibration


class Fitted(NamedTuple):
    """Students and their errors on the n good images that they were fitted to."""

    global_students: Sequence[GlobalStudent]
    local_students: Sequence[Sequence[LocalStudent]]  # as BackboneDetector takes them
    errors: Errors  # the global students' without the image and its look-alikes, the local ones' of all M
    unseen_by: Tensor  # (n,): which local student has not seen the image


def fit_students(
    teacher: BackboneTeacher,
    maps: Sequence[Tensor],
    groups: Sequence[Sequence[int]],
    compute: Compute,
    *,
    parts: FinishedParts | None = None,
) -> Fitted:
    """Fit students to the teacher's maps of good images, (n,K,h,w) per level.

    Images of the same group of `groups` are left out together. `parts` is as for `fit`.
    """
    bar = tqdm(maps, "global students", leave=False, dynamic_ncols=True)
    students, left_out = zip(*(GlobalStudent.fit(level.to(compute.where), groups) for level in bar), strict=True)
    left_out = [errors.sqrt()[:, None] for errors in left_out]
    folds = folds_of(groups, FOLDS)
    unseen_by = torch.empty(len(maps[0]), dtype=torch.long)
    for number, fold in enumerate(folds):
        unseen_by[fold] = number
    cross_fitting = CrossFitting(folds, compute, parts)
    local_students, errors = _local_students(maps, left_out, neighbourhoods(teacher.strides), cross_fitting)
    return Fitted(students, local_students, errors, unseen_by)


def calibrated(
    teacher: BackboneTeacher, fitted: Fitted, *, ignored: np.ndarray | None = None
) -> tuple[BackboneDetector, Calibration]:
    """The detector of these students, calibrated with their errors on good images; what is `ignored` does not count."""
    detector = BackboneDetector(teacher, fitted.global_students, fitted.local_students)
    detector.to(teacher.normalisations[0].mean.device).eval()
    maps = detector.calibrate(fitted.errors.by(fitted.unseen_by), ignored)
    return detector, Calibration([maps], ignored, gains=ensemble_gains(detector, fitted.errors, ignored))


@torch.inference_mode()
def ensemble_gains(detector: BackboneDetector, errors: Errors, ignored: np.ndarray | None) -> dict[str, float]:
    """What image scores gain, on average over these images, where all local students score together and not one alone.

    A new image is scored by all together, but a good image must be calibrated by the one that has not seen it. Together
    their errors vary less from place to place, so scores are lower, and without this correction decisions too careful.
    """
    students = len(detector.local_students[0])
    alone = map(errors.by, range(students))
    all_maps = [detector.maps_of(which).scored_maps for which in (errors, *alone)]
    seen = ignoring.seen(ignored, tuple(all_maps[0].shape[1:]))
    found = {}
    for name in scoring.IMAGE_SCORES:
        together, *by_one = (scoring.image_scores(maps, name, seen).double().mean().item() for maps in all_maps)
        found[name] = together - sum(by_one) / students
    return found


def look_alikes(maps: Sequence[Tensor], strides: Sequence[int]) -> list[list[int]]:
    """Groups of images that look alike, as lists of indices, from the teacher's maps (n,K,h,w) of all levels.

    Two images look alike if the differences of their maps from the mean map correlate by ALIKE or more, on average over
    the levels with stride STRIDE or more. Groups are the connected components of such pairs; most are a single image.
    If a group had more than half of all images, too few would be left to fit to: then each image is its own group.
    """
    coarse = [level for level, stride in zip(maps, strides, strict=True) if stride >= STRIDE]
    similarity = sum(map(_correlations, coarse)) / len(coarse)
    number, labels = connected_components((similarity >= ALIKE).cpu().numpy())
    groups = [np.flatnonzero(labels == label).tolist() for label in range(number)]
    if max(map(len, groups)) > len(labels) / 2:
        return [[index] for index in range(len(labels))]
    return groups


def folds_of(groups: Sequence[Sequence[int]], number: int) -> list[list[int]]:
    """All images in at most `number` folds of about the same size. No group is split, and no fold is empty."""
    folds: list[list[int]] = [[] for _ in range(min(number, len(groups)))]
    for group in sorted(groups, key=len, reverse=True):
        min(folds, key=len).extend(group)
    return folds


@dataclass(frozen=True)
class CrossFitting:
    """Local students, one per fold: each is trained on all folds but its own.

    Attributes:
        folds: the indices of their images.
        compute: where and how to compute, and the seed.
        parts: keeps the students that are trained, if given.
    """

    folds: Sequence[Sequence[int]]
    compute: Compute
    parts: FinishedParts | None = None

    def student(self, number: int, stride: int, targets: "Targets") -> LocalStudent:
        """The student of a fold and a neighbourhood's stride: trained as `train_local` does, or taken from `parts`."""
        if self.parts is None:
            return self._train(number, stride, targets)
        name = f"local student, stride {stride}, fold {number}"
        content = self.parts.get(name, lambda: self._train(number, stride, targets).to_checkpoint())
        return LocalStudent.of_checkpoint(content).to(targets.maps.device)

    def _train(self, number, stride, targets):
        fold = self.folds[number]
        seen = sorted(set(range(len(targets.maps))) - set(fold)) or fold
        maps, log_errors = targets.maps[seen], targets.log_errors[seen]
        seed = device.seed_of(self.compute.seed, "local student", stride, number)
        torch.manual_seed(seed)
        student = LocalStudent(targets.channels, log_errors.shape[1]).to(maps.device).train()
        own = [part.square().sum(1).mean().sqrt() for part in maps.float().split(targets.channels, 1)]
        student.expect(torch.cat([log_errors.mean((0, 2, 3)), log_distance(torch.stack(own))]))
        steps = LOCAL_STEPS if stride == STRIDE else COARSE_STEPS
        description = f"local student, stride {stride}, {number + 1} of {len(self.folds)}"
        return train_local(student, maps, log_errors, steps=steps, seed=seed, description=description)


class Targets(NamedTuple):
    """What the local students of a neighbourhood learn to predict, of all images."""

    maps: Tensor  # (n,K,h,w): the teacher's maps of its levels, stacked
    channels: list[int]  # of each level; their sum is K
    log_errors: Tensor  # (n,G,h,w): of the global students


def train_local(
    student: LocalStudent, inputs: Tensor, log_errors: Tensor, *, steps: int, seed: int, description: str
) -> LocalStudent:
    """Train a student on random crops of maps (n,K,h,w) of good images, and global students' log errors (n,G,h,w).

    Returns it with batch normalisation folded.
    """
    where = inputs.device
    optimiser = Optimiser([student], "muon", LEARNING_RATE)
    random = device.generator(seed)
    padded = F.pad(inputs, (REACH, REACH, REACH, REACH), mode="reflect").permute(0, 2, 3, 1).contiguous()
    log_errors = log_errors.permute(0, 2, 3, 1).contiguous()
    number, rows, columns = len(inputs), *inputs.shape[2:]
    side = torch.arange(CROP + 2 * REACH, device=where)
    for step in tqdm(range(steps), description, leave=False, dynamic_ncols=True):
        image, row, column = (
            torch.randint(most, (CROPS,), generator=random).to(where)[:, None, None]
            for most in (number, rows - CROP + 1, columns - CROP + 1)
        )
        crops = padded[image, row + side[:, None], column + side].permute(0, 3, 1, 2).float()
        targets = log_errors[image, row + side[:CROP, None], column + side[:CROP]].permute(0, 3, 1, 2)
        loss = student.loss(crops, targets)
        loss = loss / distributed.processes()  # every process computes the same, and the optimiser sums the gradients
        optimiser.zero_grad()
        loss.backward()
        optimiser.step(learning_rate(step, steps))
    return student.folded()


def _batches(indices):
    return [indices[start : start + BATCH] for start in range(0, len(indices), BATCH)]


def fit_teacher(
    backbone: Backbone, size: tuple[int, int], store: ImageStore, compute: Compute, *, indices: Sequence[int]
) -> BackboneTeacher:
    """The backbone as a teacher, normalised by good images of the store."""

    def images() -> Iterator[Tensor]:
        batches = _batches(indices)
        for batch in with_bar(store.batches(batches), len(batches), "teacher's statistics"):
            yield from (group.to(compute.where) for group in batch)

    with compute.autocast():
        return BackboneTeacher.fit(backbone, size, images())


@torch.inference_mode()
def teacher_maps(teacher: BackboneTeacher, store: ImageStore, indices: Sequence[int], compute: Compute) -> list[Tensor]:
    """The teacher's maps of images of the store: per level one float16 tensor (n,K,h,w), on the CPU."""
    own = distributed.share(indices)
    batches = _batches(own)
    found = []
    for (images,) in with_bar(store.batches(batches), len(batches), "teacher's maps"):
        with compute.autocast():
            levels = [level.half().cpu() for level in teacher(images.to(compute.where))]
        found += list(zip(*levels, strict=True))
    found = distributed.in_order(found)
    return [torch.stack([image[level] for image in found]) for level in range(len(teacher.strides))]


def _correlations(maps):
    """Correlations (n,n) between n images' maps (n,K,h,w), after the mean map is subtracted."""
    gram = 0.0
    for channel in maps.unbind(1):
        centred = (channel.float() - channel.float().mean(0)).flatten(1)
        gram = gram + centred @ centred.T
    norms = gram.diagonal().clamp_min(1e-12).sqrt()
    return gram / norms[:, None] / norms


def _local_students(maps, global_errors, all_around: Sequence[Neighbourhood], cross_fitting: CrossFitting):
    """For each neighbourhood its students, one per fold, and the errors of all students on all images.

    `global_errors`, (n,1,h,w) per level, are those of the global students.
    """
    where = cross_fitting.compute.where
    students, found, expected = [], [], {GLOBAL: [None] * len(maps), LOCAL: []}
    for around in all_around:
        stacked, channels = around.of(maps)
        size = stacked.shape[2:]
        log_errors = [log_distance(F.adaptive_avg_pool2d(global_errors[level], size)) for level in around.global_levels]
        targets = Targets(stacked.to(where), channels, torch.cat(log_errors, 1))
        trained = [cross_fitting.student(fold, around.stride, targets) for fold in range(len(cross_fitting.folds))]
        squared, logs = zip(*(_errors(student, targets.maps) for student in trained), strict=True)
        students.append(trained)
        found += list(torch.stack(squared, 2).sqrt().to(where))
        sort_expected(expected, around, torch.stack(logs, 1).to(where))
    return students, Errors({GLOBAL: list(global_errors), LOCAL: found}, expected)


@torch.inference_mode()
def _errors(student, inputs):
    """LocalErrors for maps (n,K,h,w), as tensors (levels,n,h,w) and (n,E,h,w) on the CPU."""
    found = [student.errors(part.float()) for part in inputs.split(BATCH)]
    squared = torch.cat([torch.stack(errors.squared) for errors in found], 1)
    return squared.cpu(), torch.cat([errors.expected for errors in found]).cpu()
