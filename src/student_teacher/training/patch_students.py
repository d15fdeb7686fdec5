"""Stage 3 with a patch network as teacher: M students imitate it (section 3.2 of "Uninformed Students").

All students are trained in one pass over the images, so that the teacher is computed once for all of them. A part of
train/good is set aside: it validates the training, and calibrates the scores on good images not used for training.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from AnomalyNet import DESCRIPTOR_SIZE, PATCH_SIZES, AnomalyNet
from FDFE import PADDING
from FDFEAnomalyNet import FDFEAnomalyNet
from student_teacher.detection import scoring
from student_teacher.detection.AnomalyDetector import (
    NORMALISATIONS,
    AnomalyDetector,
    Maps,
    Scale,
    scale_from_checkpoint,
    scale_to_checkpoint,
)
from student_teacher.detection.Detector import VERSION, Calibration
from student_teacher.detection.score_statistics import ScoreStatistics
from student_teacher.images import preprocessing
from student_teacher.images.category import GoodImages
from student_teacher.images.ignored import ignore_option
from student_teacher.images.store import ImageStore
from student_teacher.runtime import checkpoints, device, distributed
from student_teacher.runtime.bars import with_bar
from student_teacher.runtime.command_line import positive, positive_real
from student_teacher.runtime.device import Compute
from student_teacher.runtime.errors import UserError
from student_teacher.runtime.paths import PRETRAINED, ROOT
from student_teacher.runtime.running_moments import RunningMoments
from student_teacher.runtime.settings import (
    TrainingStage,
    batch_size_option,
    learning_rate_option,
    option,
    stride_option,
)
from student_teacher.runtime.SyncBatchNorm2d import SyncBatchNorm2d
from student_teacher.training import losses, paper
from student_teacher.training.loop import SCHEDULES, Model, Training, evenly_spread, forget, shuffled_batches
from student_teacher.training.optimiser import WEIGHT_DECAY, Optimiser, optimiser_option

KIND = "students"
PATCHES = "with --teacher patches, like --batch-size, --learning-rate and --optimiser"  # options in the help
LEARNING_RATES = {"muon": 0.05, "adam": 1e-3}
VISITS = 1_000  # images that each student sees, counting repetitions, if --epochs is not given
CALIBRATED_IMAGES = 200  # training images for the mean and std of descriptors and errors, at most
PARTS = {17: 128}  # side of the crop that a step sees: for the net without pooling, which is the slowest
REPORTED_IMAGES = 8  # validation images for the loss that is shown after each epoch


@dataclass(frozen=True, kw_only=True)
class PatchSettings(TrainingStage):
    """The options for patch students, None where another value depends on them, and what --paper changes besides."""

    batch_size: int | None = batch_size_option(None, "4")
    learning_rate: float | None = learning_rate_option(None, "0.05; of adam 1e-3")
    optimiser: str | None = optimiser_option(None)
    patch_size: tuple[int, ...] | None = option(
        None,
        "side of a patch in pixels; several make a detector of several scales (default 33 65)",
        group=PATCHES,
        type=int,
        choices=PATCH_SIZES,
        nargs="+",
    )
    students: int | None = option(
        None,
        "1 is fastest, but has no predictive variance; the paper takes 3 (default 3)",
        group=PATCHES,
        identity=True,
        type=positive,
    )
    epochs: float | None = option(
        None,
        "passes over the images, may be fractional; raise it while the validation loss still falls; the paper takes "
        f"100 (default: as many as make {VISITS:,} images in all)",
        group=PATCHES,
        identity=True,
        type=positive_real,
    )
    stride: int | None = stride_option(None, "4", group=PATCHES, identity=True)
    ignore: Path | None = ignore_option()
    whole_images: bool = False  # a step sees a crop: for the net without pooling, as much is learned in less time
    batch_normalisation: bool = True
    literal_losses: bool = False
    weight_decay: float = WEIGHT_DECAY
    all_descriptors: bool = False  # some images suffice for their mean and std
    validation: bool = False  # mean and std of errors are those of training images: the others calibrate p-values
    normalisation: str = NORMALISATIONS[0]
    padding: str = PADDING
    schedule: str = "cosine"
    image_score: str = scoring.TOP


class Fitted(NamedTuple):
    """Patch students with their teachers."""

    networks: AnomalyDetector
    calibrate: Callable[[], Calibration]
    made_from: list[dict]
    changed: list[str]  # settings of teachers trained with --paper that differ from the published ones, as texts


def load_teacher(settings: PatchSettings, patch_size: int, published: bool) -> tuple[AnomalyNet, list[str]]:
    """The category's own teacher if stage 2 has made one, else the one that ships with the project.

    If `published`, it must have been trained with --paper. Also returns those of its settings that differ from the
    published ones, as texts. Raises UserError if there is no such teacher.
    """
    own, *shipped = (
        folder / f"teacher_{patch_size}.pt"
        for folder in (settings.models, settings.model / PRETRAINED, ROOT / "model" / PRETRAINED)
    )
    for path in filter(Path.exists, (own, *shipped)):
        content = checkpoints.load(path, "teacher", category=path.parent.name, patch_size=patch_size)
        if not published or content.get("paper") is not None:
            break
    else:
        command = f"teacher_training.py {settings.category} --patch-size {patch_size}"
        if published:
            raise UserError(
                f"no teacher of {patch_size} pixels was trained as in the paper: run {command} --paper --images DIR "
                "first, or add --teacher patches to take another"
            )
        raise UserError(f"{own} is not there: run {command} first")
    changed = [f"teacher of {patch_size} pixels: {change}" for change in content.get("paper") or ()]
    print(f"teacher: {path}")
    paper.say("not as published", changed)
    net = AnomalyNet(patch_size, descriptor_size=content.get("descriptor_size", DESCRIPTOR_SIZE))
    net.load_state_dict(content["net"])
    return net.eval().requires_grad_(False), changed


class Lessons(NamedTuple):
    """The students' training data."""

    store: ImageStore
    batches: list[list[int]]  # indices into the store, one batch per step
    validation: list[int]  # indices of images that are not trained on


class Students:
    """M students of a patch teacher, and a step of their training.

    The `teacher`'s descriptors are normalised, at its stride; `nets` are trained to predict them.
    """

    def __init__(self, teacher: FDFEAnomalyNet, nets: Sequence[AnomalyNet], compute: Compute, literal_losses=False):
        self.teacher, self.nets = teacher, nets
        self.dense = [FDFEAnomalyNet(net, teacher.stride, padding=teacher.padding) for net in nets]
        self._compute, self._literal_losses = compute, literal_losses

    def learn(
        self, images: Tensor, share: float, offset: tuple[int, int] = (0, 0), place: tuple[float, float] | None = None
    ) -> list[float]:
        """Add the gradients of each student's loss on uint8 images (N,3,H,W), times `share`. Returns the losses.

        Descriptors start at the pixel `offset`. With a `place`, patch sizes in PARTS see only a crop of the image: see
        `part`.
        """
        pixels, found = self.teacher.pad(self._seen(images), offset), []
        if self.teacher.patch_size in PARTS and place is not None:
            pixels = part(pixels, PARTS[self.teacher.patch_size] + self.teacher.patch_size - 1, place)
        with self._compute.autocast(), torch.no_grad():
            target = self.teacher.describe_padded(pixels).float()
        for student in self.dense:  # one after another: only one student's activations are in memory
            with self._compute.autocast():
                descriptors = student.describe_padded(pixels)
            loss = losses.regression(descriptors.float(), target, self._literal_losses)
            (loss * share).backward()
            found.append(loss.item())
        return found

    @torch.inference_mode()
    def validation_loss(self, store: ImageStore, indices: list[int]) -> float:
        """Mean loss of the students on validation images of the store."""
        total = 0.0
        for net in self.nets:
            net.eval()
        for groups in store.batches([index] for index in distributed.share(indices)):
            with self._compute.autocast():
                images = self._seen(groups[0])
                target = self.teacher(images).float()
                total += sum(losses.regression(student(images).float(), target).item() for student in self.dense)
        for net in self.nets:
            net.train()
        return distributed.summed(total) / (len(indices) * len(self.nets))

    def _seen(self, images):
        return preprocessing.normalise(images.to(self._compute.where))


@torch.inference_mode()
def descriptor_moments(
    teacher: FDFEAnomalyNet, store: ImageStore, indices: list[int], compute: Compute
) -> RunningMoments:
    """Mean and std of the teacher's descriptors (C,), over all pixels that `teacher` describes."""
    found = RunningMoments()
    indices = distributed.share(indices)
    for groups in with_bar(store.batches([index] for index in indices), len(indices), "teacher's descriptors"):
        with compute.autocast():
            descriptors = teacher(preprocessing.normalise(groups[0].to(compute.where)))
        found.update(descriptors.permute(0, 2, 3, 1).flatten(0, 2))
    found.gather()
    return found


@torch.inference_mode()
def calibrate(
    scale: Scale, store: ImageStore, indices: list[int], settings: PatchSettings, *, ignored: np.ndarray | None
) -> None:
    """Measure mean and std of error and variance on good images, which normalise the maps, without what is ignored."""
    teacher, students = scale.dense(settings.stride)
    statistics, compute = ScoreStatistics(), settings.compute
    indices = distributed.share(indices)
    for groups in with_bar(store.batches([index] for index in indices), len(indices), "errors of good images"):
        with compute.autocast():
            images = preprocessing.normalise(groups[0].to(compute.where))
            statistics.update(*scoring.error_and_variance(teacher, students, images), ignored)
    statistics.gather()
    scale.calibrate(statistics)


def score_calibration(
    networks: AnomalyDetector, images: GoodImages, indices: list[int], settings: PatchSettings
) -> Calibration:
    """Measure the scores of the good images `indices`, which were not trained on."""
    compute, store = settings.compute, images.decoded(settings.size)
    compute.place(networks)
    indices = distributed.share(indices)

    def maps() -> Iterator[Maps]:  # one image's at a time: those of all, at native size, would fill the memory
        for groups in with_bar(store.batches([index] for index in indices), len(indices), "scores of good images"):
            with compute.autocast():
                found = networks.maps(groups[0].to(compute.where))
            yield found

    return Calibration(maps(), images.ignored, shared=True)


def part(pixels: Tensor, side: int, place: tuple[float, float]) -> Tensor:
    """A square crop of (N,C,H,W), at most `side` long; `place`: its position down and to the right, each 0 to 1."""
    rows, columns = (
        slice(start := int(where * max(1, length - side + 1)), start + side)
        for length, where in zip(pixels.shape[2:], place, strict=True)
    )
    return pixels[:, :, rows, columns]


def train(settings: PatchSettings, teacher_net: AnomalyNet, images: GoodImages, replaced: Iterable[Path]) -> Path:
    """Train a teacher's students and return where they were saved; remove `replaced` when the training begins."""
    learned, validation = images.split(settings.seed)
    model = model_of(settings, images, teacher_net)
    if not settings.restart and model.is_trained():
        return model.path
    compute, store = settings.compute, images.decoded(settings.size)
    compute.place(teacher_net)
    dense = partial(FDFEAnomalyNet, stride=settings.stride, padding=settings.padding)
    some = evenly_spread(learned, CALIBRATED_IMAGES)
    moments = descriptor_moments(dense(teacher_net), store, learned if settings.all_descriptors else some, compute)
    teacher = dense(teacher_net.with_normalised_descriptors(moments.mean, moments.std))
    students = Students(teacher, new_students(settings, teacher_net), compute, settings.literal_losses)
    batches = shuffled_batches(learned, settings.batch_size, model.settings["epochs"], settings.seed)
    forget(replaced)
    training = learn(students, model, Lessons(store, batches, validation), settings)

    folded = [net.folded() for net in students.nets]
    scale = Scale(teacher_net, folded, moments.mean, moments.std, padding=settings.padding).to(compute.where)
    # The p-values use the validation images. If these also normalise, four numbers per scale depend on them.
    calibrate(scale, store, validation if settings.validation else some, settings, ignored=images.ignored)
    left = students.validation_loss(store, validation)
    print(f"students leave {left:.3f} of the teacher's variance unexplained on {len(validation)} validation images")
    content = {
        "patch_size": teacher_net.patch_size,
        "scale": scale_to_checkpoint(scale.cpu()),
        "validation_loss": left,
    }
    model.save(content, training)
    return model.path


def students_path(settings: PatchSettings, patch_size: int) -> Path:
    """The file of the students of one patch size."""
    return settings.models / f"students_{patch_size}.pt"


def model_of(settings: PatchSettings, images: GoodImages, teacher: AnomalyNet) -> Model:
    """The file of a teacher's students, and what it was made from. Raises UserError if images are too small."""
    size, patch_size = settings.size, teacher.patch_size
    if size and min(size) < 2 * settings.stride:
        raise UserError(
            f"--image-size {min(size)}: too small for patches of {patch_size} pixels with --stride {settings.stride}"
        )
    if size is None:
        images.require_sides(2 * settings.stride)
    learned, _ = images.split(settings.seed)
    made_from = settings.identity() | {
        "detector_version": VERSION,
        "epochs": settings.epochs or float(f"{VISITS / len(learned):.3g}"),
        "teacher": checkpoints.fingerprint(teacher.state_dict()),
        **images.identity,
        **paper.STUDENTS.identity(settings),
    }
    return Model(students_path(settings, patch_size), KIND, settings.category, made_from)


def new_students(settings: PatchSettings, teacher: AnomalyNet) -> nn.ModuleList:
    """M networks like the teacher, each with its own random weights."""
    nets = nn.ModuleList()
    for number in range(settings.students):
        torch.manual_seed(device.seed_of(settings.seed, "student", teacher.patch_size, number))
        nets.append(AnomalyNet(teacher.patch_size, settings.batch_normalisation, teacher.descriptor_size))
    SyncBatchNorm2d.convert(nets)
    return settings.compute.place(nets)


def learn(students: Students, model: Model, lessons: Lessons, settings: PatchSettings) -> Training:
    """Train the students, from the start or from the last checkpoint."""
    store, batches, validation = lessons
    patch_size, stride = students.teacher.patch_size, students.teacher.stride
    optimiser = Optimiser(students.nets, settings.optimiser, settings.learning_rate, settings.weight_decay)
    parts = {"students": students.nets, "optimiser": optimiser}
    training = model.training(f"{KIND} training, {patch_size} pixels", parts, len(batches))
    per_epoch = math.ceil(len(batches) / model.settings["epochs"])
    for step, groups in zip(training, store.batches(batches[training.step :]), strict=False):
        optimiser.zero_grad()
        # A random offset per step, so that every position is learned at any stride.
        random = device.generator(settings.seed, "offset", patch_size, step)
        offset = tuple(torch.randint(stride, (2,), generator=random).tolist())
        place = tuple(torch.rand(2, generator=random).tolist())
        total = 0.0
        for images in map(distributed.share, groups):  # even if empty: all processes take part in batch normalisation
            share = len(images) / len(batches[step])
            found = students.learn(images, share, offset, None if settings.whole_images else place)
            total += share * sum(found) / len(found) if len(images) else 0.0
        optimiser.step(SCHEDULES[settings.schedule](step, len(batches)))
        training.report(distributed.summed(total))
        if (step + 1) % per_epoch == 0:
            training.note(validation=students.validation_loss(store, validation[:REPORTED_IMAGES]))
    return training


def fit(settings: PatchSettings, images: GoodImages, published: bool) -> Fitted:
    """Train the students of all patch sizes that are not trained yet; `published`: as for load_teacher."""
    sizes = sorted(set(settings.patch_size))
    # All teachers first: a missing or broken one should not be noticed only after half an hour.
    teachers = [load_teacher(settings, patch_size, published) for patch_size in sizes]
    # All sizes at once, so that after a stop the others are trained again, too.
    replaced = [students_path(settings, patch_size) for patch_size in sizes] if settings.restart else []
    contents = []
    for teacher, _ in teachers:
        path = train(settings, teacher, images, replaced)
        contents.append(checkpoints.load(path, KIND, category=settings.category))
        replaced = []
    made_from = [
        content["settings"] | {"weights": checkpoints.fingerprint(content["scale"]["state"])} for content in contents
    ]
    scales = [scale_from_checkpoint(content["scale"]) for content in contents]
    networks = AnomalyDetector(scales, settings.stride, settings.normalisation)

    def calibrated() -> Calibration:
        _, validation = images.split(settings.seed)
        return score_calibration(networks, images, validation, settings)

    return Fitted(networks, calibrated, made_from, [change for _, changes in teachers for change in changes])
