"""Stage 3 with a patch network for teacher: M students imitate it (section 3.2 of "Uninformed Students").

All students learn in one pass over the images, so that the teacher is computed once for all of them. A part of
train/good is held back: it shows how well they learn, and what scores are usual on good images that they don't know.
"""

import math
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from AnomalyNet import DESCRIPTOR_SIZE, AnomalyNet
from FDFEAnomalyNet import FDFEAnomalyNet
from student_teacher.detection import scoring
from student_teacher.detection.AnomalyDetector import (
    AnomalyDetector,
    Found,
    Scale,
    scale_from_checkpoint,
    scale_to_checkpoint,
)
from student_teacher.detection.Detector import Calibration
from student_teacher.detection.score_statistics import Statistics
from student_teacher.images import category as categories
from student_teacher.images import preprocessing
from student_teacher.images.store import ImageStore
from student_teacher.reports import figures
from student_teacher.runtime import checkpoints, command_line, device, distributed
from student_teacher.runtime.bars import with_bar
from student_teacher.runtime.errors import UserError
from student_teacher.runtime.paths import PRETRAINED, ROOT
from student_teacher.runtime.prefetch import prefetched
from student_teacher.runtime.running_moments import Moments
from student_teacher.runtime.SyncBatchNorm2d import SyncBatchNorm2d
from student_teacher.training import losses, paper
from student_teacher.training.loop import SCHEDULES, Training, already_trained, forget, shuffled_batches
from student_teacher.training.optimiser import Optimiser

See = Callable[[Tensor], Tensor]  # uint8 images (N,3,H,W) -> what the networks take
KIND = "students"
LEARNING_RATES = {"muon": 0.05, "adam": 1e-3}
VISITS = 1_000  # of images by each student, where --epochs doesn't say how many passes
CALIBRATED_IMAGES = 200  # learned ones that tell what descriptors and errors are usual, at most
PARTS = {17: 128}  # side of what a step sees of an image: for the net that pools nothing and so is the slowest
REPORTED_IMAGES = 8  # held-back images whose loss is shown at the end of each pass


class Fitted(NamedTuple):
    """Patch students with their teachers."""

    networks: AnomalyDetector
    calibrate: Callable[[], Calibration]
    made_from: list[dict]
    changed: list[str]  # settings of teachers taught with --paper that are not the published ones, as texts


def load_teacher(args: Namespace, patch_size: int) -> tuple[AnomalyNet, list[str]]:
    """The category's teacher where stage 2 has made one, else the one that ships; with --paper one taught with --paper.

    Returns with it those of its settings that are not the published ones. Raises UserError where there is none.
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
                f"no teacher of {patch_size} pixels was taught as in the paper: run {command} --paper --images DIR "
                "first, or add --teacher patches to take another"
            )
        raise UserError(f"{own} is not there: run {command} first")
    changed = [f"teacher of {patch_size} pixels: {change}" for change in content.get("paper") or ()]
    print(f"teacher: {path}")
    paper.say("not as published", changed)
    net = AnomalyNet(patch_size, descriptor_size=content.get("descriptor_size", DESCRIPTOR_SIZE))
    net.load_state_dict(content["net"])
    return net.eval().requires_grad_(False), changed


@torch.inference_mode()
def descriptor_moments(
    teacher: FDFEAnomalyNet, seen: See, store: ImageStore, indices: list[int], args: Namespace, where: torch.device
) -> Moments:
    """Mean and deviation of the teacher's descriptors over all pixels that `teacher` visits."""
    found = Moments()
    indices = distributed.share(indices)
    for groups in with_bar(store.batches([index] for index in indices), len(indices), "teacher's descriptors"):
        with device.autocast(where, args.precision):
            descriptors = teacher(seen(groups[0]))
        found.update(descriptors.permute(0, 2, 3, 1).flatten(0, 2))
    found.gather()
    return found


@torch.inference_mode()
def held_back_loss(
    teacher: FDFEAnomalyNet,
    students: Sequence[FDFEAnomalyNet],
    seen: See,
    store: ImageStore,
    indices: list[int],
    args: Namespace,
    where: torch.device,
) -> float:
    """Mean loss of the students on held-back images."""
    total = 0.0
    for student in students:
        student.eval()
    for groups in store.batches([index] for index in distributed.share(indices)):
        with device.autocast(where, args.precision):
            images = seen(groups[0])
            target = teacher(images).float()
            total += sum(losses.regression(student(images).float(), target).item() for student in students)
    for student in students:
        student.train()
    return distributed.summed(total) / (len(indices) * len(students))


@torch.inference_mode()
def calibrate(scale: Scale, store: ImageStore, indices: list[int], args: Namespace, where: torch.device) -> None:
    """Measure error and variance on good images, so that maps are normalised by them."""
    teacher, students = scale.dense(args.stride)
    statistics = Statistics()
    indices = distributed.share(indices)
    for groups in with_bar(store.batches([index] for index in indices), len(indices), "usual errors"):
        with device.autocast(where, args.precision):
            images = preprocessing.normalise(groups[0].to(where))
            statistics.update(*scoring.error_and_variance(teacher, students, images))
    statistics.gather()
    scale.calibrate(statistics)


def usual_scores(networks: AnomalyDetector, args: Namespace) -> Calibration:
    """Measure the scores of the images that were held back."""
    dataset = categories.good_images(args, command_line.image_size(args))
    where = device.choose(args.device)
    networks.to(where, memory_format=device.memory_format(where))
    _, held_back = categories.held_back_split(len(dataset), args.seed)
    found = []
    indices = distributed.share(held_back)
    samples = prefetched(lambda index: dataset[index]["image"], indices)
    for image in with_bar(samples, len(indices), "usual scores"):
        with device.autocast(where, args.precision):
            found.append(Found(*(maps.cpu() for maps in networks.find(image[None].to(where)))))
    return Calibration(distributed.in_order(found))


def part(pixels: Tensor, side: int, place: tuple[float, float]) -> Tensor:
    """A square of (N,C,H,W), `side` along each side at most; `place`: how far down and to the right, from 0 to 1."""
    rows, columns = (
        slice(start := int(where * max(1, length - side + 1)), start + side)
        for length, where in zip(pixels.shape[2:], place, strict=True)
    )
    return pixels[:, :, rows, columns]


def evenly(indices: list[int], number: int) -> list[int]:
    """At most `number` of the indices, evenly spread."""
    return indices[:: -(-len(indices) // number)]


def train(args: Namespace, patch_size: int, teacher_net: AnomalyNet) -> Path:
    """Train the students of one patch size and return where they were saved."""
    path = args.model / args.category / f"students_{patch_size}.pt"
    size = command_line.image_size(args)
    dataset = categories.good_images(args, size)
    learned, held_back = categories.held_back_split(len(dataset), args.seed)
    epochs = args.epochs or float(f"{VISITS / len(learned):.3g}")
    settings = {
        "seed": args.seed,
        "image_size": command_line.sides(args),
        "precision": args.precision,
        "batch_size": args.batch_size,
        "epochs": epochs,
        "optimiser": args.optimiser,
        "learning_rate": args.learning_rate,
        "students": args.students,
        "stride": args.stride,
        "teacher": checkpoints.fingerprint(teacher_net.state_dict()),
        **categories.identity_of(dataset),
    } | paper.STUDENTS.identity(args)
    if not args.restart and already_trained(path, KIND, args.category, settings):
        return path
    where = device.choose(args.device)
    store = ImageStore(lambda index: dataset[index]["image"], len(dataset))
    stride = args.stride
    if size and min(size) < 2 * stride:
        raise UserError(f"--image-size {min(size)}: too small for patches of {patch_size} at a stride of {args.stride}")

    def seen(images: Tensor) -> Tensor:
        return preprocessing.normalise(images.to(where))

    teacher_net.to(where, memory_format=device.memory_format(where))
    dense = partial(FDFEAnomalyNet, stride=stride, padding=args.padding)
    some = evenly(learned, CALIBRATED_IMAGES)
    described = learned if args.all_descriptors else some
    found = descriptor_moments(dense(teacher_net), seen, store, described, args, where)
    teacher = dense(teacher_net.with_normalised_descriptors(found.mean, found.deviation))
    student_nets = nn.ModuleList()
    for number in range(args.students):
        torch.manual_seed(device.seed_of(args.seed, "student", patch_size, number))
        student_nets.append(AnomalyNet(patch_size, args.batch_normalisation, teacher_net.descriptor_size))
    student_nets.to(where, memory_format=device.memory_format(where))
    SyncBatchNorm2d.convert(student_nets)
    students = [dense(net) for net in student_nets]

    optimiser = Optimiser(student_nets, args.optimiser, args.learning_rate, args.weight_decay)
    wanted = shuffled_batches(learned, args.batch_size, epochs, args.seed)
    if args.restart:  # all sizes at once, so that after a stop the others are trained again, too
        forget(path.with_name(f"students_{size}.pt") for size in args.patch_size)
        args.restart = False
    training = Training(
        path,
        f"{KIND} training, {patch_size} pixels",
        args.category,
        settings,
        {"students": student_nets, "optimiser": optimiser},
        len(wanted),
    )
    per_epoch = math.ceil(len(learned) / args.batch_size)
    for step, groups in zip(training, store.batches(wanted[training.step :]), strict=False):
        optimiser.zero_grad()
        # A random offset a step: every position is learned, whatever the stride.
        random = device.generator(args.seed, "offset", patch_size, step)
        offset = tuple(torch.randint(stride, (2,), generator=random).tolist())
        place = tuple(torch.rand(2, generator=random).tolist())
        total = 0.0
        for images in map(distributed.share, groups):  # even where none is left: the batch's statistics are of all
            share = len(images) / (len(wanted[step]) * args.students)
            pixels = teacher.pad(seen(images), offset)
            if patch_size in PARTS and not args.whole_images:
                pixels = part(pixels, PARTS[patch_size] + patch_size - 1, place)
            with device.autocast(where, args.precision), torch.no_grad():
                target = teacher.describe_padded(pixels).float()
            for student in students:  # one after another: the memory of one student's activations, not of all
                with device.autocast(where, args.precision):
                    descriptors = student.describe_padded(pixels)
                loss = losses.regression(descriptors.float(), target, args.literal_losses)
                (loss * len(images) / len(wanted[step])).backward()
                total += loss.item() * share if len(images) else 0.0
        optimiser.step(SCHEDULES[args.schedule](step, len(wanted)))
        training.report(distributed.summed(total))
        if (step + 1) % per_epoch == 0:
            shown = held_back[:REPORTED_IMAGES]
            training.note(held_back=held_back_loss(teacher, students, seen, store, shown, args, where))

    folded = [net.folded() for net in student_nets]
    scale = Scale(teacher_net, folded, found.mean, found.deviation, padding=args.padding).to(where)
    # The held-back images give the p-values, too. Where they also normalise, four numbers of a scale have seen them.
    calibrate(scale, store, held_back if args.validation else some, args, where)
    left = held_back_loss(teacher, students, seen, store, held_back, args, where)
    content = {"patch_size": patch_size, "settings": settings, "scale": scale_to_checkpoint(scale.cpu())}
    checkpoints.save(path, KIND, args.category, content | {"held_back_loss": left})
    if distributed.is_first():
        figures.save_training_curve(path.with_name(f"students_{patch_size}_training.png"), *training.curve("loss"))
    training.finish()
    print(f"students leave {left:.3f} of the teacher's variance unexplained on {len(held_back)} held-back images")
    print(f"saved {path}")
    return path


def fit(args: Namespace) -> Fitted:
    """Train what is not trained yet."""
    sizes = sorted(set(args.patch_size))
    # All of them before any student: one that is missing or broken must not show after half an hour.
    teachers = {patch_size: load_teacher(args, patch_size) for patch_size in sizes}
    paths = [train(args, patch_size, teachers[patch_size][0]) for patch_size in sizes]
    contents = [checkpoints.load(path, KIND, category=args.category) for path in paths]
    made_from = [
        content["settings"] | {"weights": checkpoints.fingerprint(content["scale"]["state"])} for content in contents
    ]
    scales = [scale_from_checkpoint(content["scale"]) for content in contents]
    networks = AnomalyDetector(scales, args.stride, args.normalisation)
    changed = [change for _, changes in teachers.values() for change in changes]
    return Fitted(networks, lambda: usual_scores(networks, args), made_from, changed)
