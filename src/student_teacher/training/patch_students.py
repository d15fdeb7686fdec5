"""Stage 3 with a patch network as teacher: M students imitate it (section 3.2 of "Uninformed Students").

All students are trained in one pass over the images, so that the teacher is computed once for all of them. A part of
train/good is set aside: it validates the training, and calibrates the scores on good images not used for training.
"""

import math
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from AnomalyDataset import AnomalyDataset
from AnomalyNet import DESCRIPTOR_SIZE, AnomalyNet
from FDFEAnomalyNet import FDFEAnomalyNet
from student_teacher.detection import scoring
from student_teacher.detection.AnomalyDetector import (
    AnomalyDetector,
    Maps,
    Scale,
    scale_from_checkpoint,
    scale_to_checkpoint,
)
from student_teacher.detection.Detector import VERSION, Calibration
from student_teacher.detection.score_statistics import ScoreStatistics
from student_teacher.images import category, preprocessing
from student_teacher.images.store import ImageStore
from student_teacher.runtime import checkpoints, command_line, device, distributed
from student_teacher.runtime.bars import with_bar
from student_teacher.runtime.errors import UserError
from student_teacher.runtime.paths import PRETRAINED, ROOT
from student_teacher.runtime.prefetch import prefetched
from student_teacher.runtime.running_moments import RunningMoments
from student_teacher.runtime.SyncBatchNorm2d import SyncBatchNorm2d
from student_teacher.training import losses, paper
from student_teacher.training.loop import SCHEDULES, Model, Training, evenly_spread, forget, shuffled_batches
from student_teacher.training.optimiser import Optimiser

KIND = "students"
LEARNING_RATES = {"muon": 0.05, "adam": 1e-3}
VISITS = 1_000  # images that each student sees, counting repetitions, if --epochs is not given
CALIBRATED_IMAGES = 200  # training images for the mean and std of descriptors and errors, at most
PARTS = {17: 128}  # side of the crop that a step sees: for the net without pooling, which is the slowest
REPORTED_IMAGES = 8  # validation images for the loss that is shown after each epoch


class Fitted(NamedTuple):
    """Patch students with their teachers."""

    networks: AnomalyDetector
    calibrate: Callable[[], Calibration]
    made_from: list[dict]
    changed: list[str]  # settings of teachers trained with --paper that differ from the published ones, as texts


def load_teacher(args: Namespace, patch_size: int) -> tuple[AnomalyNet, list[str]]:
    """The category's own teacher if stage 2 has made one, else the one that ships with the project.

    With --paper it must have been trained with --paper. Also returns those of its settings that differ from the
    published ones, as texts. Raises UserError if there is no such teacher.
    """
    own, *shipped = (
        folder / f"teacher_{patch_size}.pt"
        for folder in (args.model / args.category, args.model / PRETRAINED, ROOT / "model" / PRETRAINED)
    )
    published = args.teacher == paper.TAUGHT
    for path in filter(Path.exists, (own, *shipped)):
        content = checkpoints.load(path, "teacher", category=path.parent.name, patch_size=patch_size)
        if not published or content.get("paper") is not None:
            break
    else:
        command = f"teacher_training.py {args.category} --patch-size {patch_size}"
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

    def __init__(self, teacher: FDFEAnomalyNet, nets: Sequence[AnomalyNet], precision: str, literal_losses=False):
        self.teacher, self.nets = teacher, nets
        self.dense = [FDFEAnomalyNet(net, teacher.stride, padding=teacher.padding) for net in nets]
        self._precision, self._literal_losses = precision, literal_losses
        self._where = next(teacher.net.parameters()).device

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
        with device.autocast(self._where, self._precision), torch.no_grad():
            target = self.teacher.describe_padded(pixels).float()
        for student in self.dense:  # one after another: only one student's activations are in memory
            with device.autocast(self._where, self._precision):
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
            with device.autocast(self._where, self._precision):
                images = self._seen(groups[0])
                target = self.teacher(images).float()
                total += sum(losses.regression(student(images).float(), target).item() for student in self.dense)
        for net in self.nets:
            net.train()
        return distributed.summed(total) / (len(indices) * len(self.nets))

    def _seen(self, images):
        return preprocessing.normalise(images.to(self._where))


@torch.inference_mode()
def descriptor_moments(
    teacher: FDFEAnomalyNet, store: ImageStore, indices: list[int], args: Namespace
) -> RunningMoments:
    """Mean and std of the teacher's descriptors (C,), over all pixels that `teacher` describes."""
    found, where = RunningMoments(), device.choose(args.device)
    indices = distributed.share(indices)
    for groups in with_bar(store.batches([index] for index in indices), len(indices), "teacher's descriptors"):
        with device.autocast(where, args.precision):
            descriptors = teacher(preprocessing.normalise(groups[0].to(where)))
        found.update(descriptors.permute(0, 2, 3, 1).flatten(0, 2))
    found.gather()
    return found


@torch.inference_mode()
def calibrate(scale: Scale, store: ImageStore, indices: list[int], args: Namespace, *, ignored=None) -> None:
    """Measure mean and std of error and variance on good images, which normalise the maps, without what is ignored."""
    teacher, students = scale.dense(args.stride)
    statistics, where = ScoreStatistics(), device.choose(args.device)
    indices = distributed.share(indices)
    for groups in with_bar(store.batches([index] for index in indices), len(indices), "errors of good images"):
        with device.autocast(where, args.precision):
            images = preprocessing.normalise(groups[0].to(where))
            statistics.update(*scoring.error_and_variance(teacher, students, images), ignored)
    statistics.gather()
    scale.calibrate(statistics)


def score_calibration(networks: AnomalyDetector, args: Namespace) -> Calibration:
    """Measure the scores of the images that were not trained on."""
    dataset = category.good_images(args, command_line.image_size(args))
    where = device.choose(args.device)
    networks.to(where, memory_format=device.memory_format(where))
    _, validation = category.validation_split(len(dataset), args.seed)
    found = []
    indices = distributed.share(validation)
    samples = prefetched(lambda index: dataset[index]["image"], indices)
    for image in with_bar(samples, len(indices), "scores of good images"):
        with device.autocast(where, args.precision):
            found.append(Maps(*(maps.cpu() for maps in networks.maps(image[None].to(where)))))
    return Calibration(distributed.in_order(found), dataset.ignored)


def part(pixels: Tensor, side: int, place: tuple[float, float]) -> Tensor:
    """A square crop of (N,C,H,W), at most `side` long; `place`: its position down and to the right, each 0 to 1."""
    rows, columns = (
        slice(start := int(where * max(1, length - side + 1)), start + side)
        for length, where in zip(pixels.shape[2:], place, strict=True)
    )
    return pixels[:, :, rows, columns]


def train(args: Namespace, patch_size: int, teacher_net: AnomalyNet) -> Path:
    """Train the students of one patch size and return where they were saved."""
    dataset = category.good_images(args, command_line.image_size(args))
    learned, validation = category.validation_split(len(dataset), args.seed)
    epochs = args.epochs or float(f"{VISITS / len(learned):.3g}")
    model = model_of(args, dataset, teacher_net, epochs)
    if not args.restart and model.is_trained():
        return model.path
    where = device.choose(args.device)
    store = ImageStore(lambda index: dataset[index]["image"], len(dataset))
    teacher_net.to(where, memory_format=device.memory_format(where))
    dense = partial(FDFEAnomalyNet, stride=args.stride, padding=args.padding)
    some = evenly_spread(learned, CALIBRATED_IMAGES)
    moments = descriptor_moments(dense(teacher_net), store, learned if args.all_descriptors else some, args)
    teacher = dense(teacher_net.with_normalised_descriptors(moments.mean, moments.std))
    students = Students(teacher, new_students(args, teacher_net, where), args.precision, args.literal_losses)
    if args.restart:  # all sizes at once, so that after a stop the others are trained again, too
        forget(model.path.with_name(f"students_{size}.pt") for size in args.patch_size)
        args.restart = False
    batches = shuffled_batches(learned, args.batch_size, epochs, args.seed)
    training = learn(students, model, Lessons(store, batches, validation), args)

    folded = [net.folded() for net in students.nets]
    scale = Scale(teacher_net, folded, moments.mean, moments.std, padding=args.padding).to(where)
    # The p-values use the validation images. If these also normalise, four numbers per scale depend on them.
    calibrate(scale, store, validation if args.validation else some, args, ignored=dataset.ignored)
    left = students.validation_loss(store, validation)
    print(f"students leave {left:.3f} of the teacher's variance unexplained on {len(validation)} validation images")
    content = {"patch_size": patch_size, "scale": scale_to_checkpoint(scale.cpu()), "validation_loss": left}
    model.save(content, training)
    return model.path


def model_of(args: Namespace, dataset: AnomalyDataset, teacher: AnomalyNet, epochs: float) -> Model:
    """The file of a teacher's students and its settings. Raises UserError if images are too small for the stride."""
    size, patch_size = command_line.image_size(args), teacher.patch_size
    if size and min(size) < 2 * args.stride:
        raise UserError(
            f"--image-size {min(size)}: too small for patches of {patch_size} pixels with --stride {args.stride}"
        )
    settings = {
        "detector_version": VERSION,
        "seed": args.seed,
        "image_size": command_line.sides(args),
        "precision": args.precision,
        "batch_size": args.batch_size,
        "epochs": epochs,
        "optimiser": args.optimiser,
        "learning_rate": args.learning_rate,
        "students": args.students,
        "stride": args.stride,
        "teacher": checkpoints.fingerprint(teacher.state_dict()),
        **category.identity_of(dataset),
    }
    path = args.model / args.category / f"students_{patch_size}.pt"
    return Model(path, KIND, args.category, settings | paper.STUDENTS.identity(args))


def new_students(args: Namespace, teacher: AnomalyNet, where: torch.device) -> nn.ModuleList:
    """M networks like the teacher, each with its own random weights."""
    nets = nn.ModuleList()
    for number in range(args.students):
        torch.manual_seed(device.seed_of(args.seed, "student", teacher.patch_size, number))
        nets.append(AnomalyNet(teacher.patch_size, args.batch_normalisation, teacher.descriptor_size))
    SyncBatchNorm2d.convert(nets)
    return nets.to(where, memory_format=device.memory_format(where))


def learn(students: Students, model: Model, lessons: Lessons, args: Namespace) -> Training:
    """Train the students, from the start or from the last checkpoint."""
    store, batches, validation = lessons
    patch_size, stride = students.teacher.patch_size, students.teacher.stride
    optimiser = Optimiser(students.nets, args.optimiser, args.learning_rate, args.weight_decay)
    parts = {"students": students.nets, "optimiser": optimiser}
    training = model.training(f"{KIND} training, {patch_size} pixels", parts, len(batches))
    per_epoch = math.ceil(len(batches) / model.settings["epochs"])
    for step, groups in zip(training, store.batches(batches[training.step :]), strict=False):
        optimiser.zero_grad()
        # A random offset per step, so that every position is learned at any stride.
        random = device.generator(args.seed, "offset", patch_size, step)
        offset = tuple(torch.randint(stride, (2,), generator=random).tolist())
        place = tuple(torch.rand(2, generator=random).tolist())
        total = 0.0
        for images in map(distributed.share, groups):  # even if empty: all processes take part in batch normalisation
            share = len(images) / len(batches[step])
            found = students.learn(images, share, offset, None if args.whole_images else place)
            total += share * sum(found) / len(found) if len(images) else 0.0
        optimiser.step(SCHEDULES[args.schedule](step, len(batches)))
        training.report(distributed.summed(total))
        if (step + 1) % per_epoch == 0:
            training.note(validation=students.validation_loss(store, validation[:REPORTED_IMAGES]))
    return training


def fit(args: Namespace) -> Fitted:
    """Train the students of all patch sizes that are not trained yet."""
    sizes = sorted(set(args.patch_size))
    # All teachers first: a missing or broken one should not be noticed only after half an hour.
    teachers = {patch_size: load_teacher(args, patch_size) for patch_size in sizes}
    paths = [train(args, patch_size, teachers[patch_size][0]) for patch_size in sizes]
    contents = [checkpoints.load(path, KIND, category=args.category) for path in paths]
    made_from = [
        content["settings"] | {"weights": checkpoints.fingerprint(content["scale"]["state"])} for content in contents
    ]
    scales = [scale_from_checkpoint(content["scale"]) for content in contents]
    networks = AnomalyDetector(scales, args.stride, args.normalisation)
    changed = [change for _, changes in teachers.values() for change in changes]
    return Fitted(networks, lambda: score_calibration(networks, args), made_from, changed)
