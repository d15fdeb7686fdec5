"""Stage 3: train M students to imitate the teacher on anomaly-free images (section 3.2 of "Uninformed Students").

All students learn in one pass over the images, so that the teacher is computed once for all of them. A part of
train/good is held back: it shows how well they learn, and what scores are usual on good images that they don't know.
The result, model/CATEGORY/detector.pt, holds all that detection needs.
"""

import math
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import checkpoints
import device
import distributed
import figures
import losses
import preprocessing
import scoring
import stages
from AnomalyDetector import AnomalyDetector, Found, Scale, scale_from_checkpoint, scale_to_checkpoint
from AnomalyNet import AnomalyNet
from command_line import PRETRAINED, ROOT, UserError
from Detector import VERSION, Calibration
from FDFEAnomalyNet import FDFEAnomalyNet
from GlobalStudent import FEWEST_IMAGES, GlobalStudent, seen_image, size_seen
from image_store import ImageStore
from moments import Moments
from optimiser import Optimiser
from prefetch import prefetched
from scales import DEFAULT_SCALES, PADDING, SCALES, zoomed, zoomed_stride
from SyncBatchNorm2d import SyncBatchNorm2d
from training import Training, already_trained, forget, learning_rate
from usual import Statistics

See = Callable[[Tensor], Tensor]  # uint8 images (N,3,H,W) -> what the networks take
KIND = "students"
LEARNING_RATES = {"muon": 0.05, "adam": 1e-3}
VISITS = 1_000  # of images by each student, where --epochs doesn't say how many passes; more by those that zoom out
CALIBRATED_IMAGES = 200  # learned ones that tell what descriptors and errors are usual, at most
PARTS = {17: 128}  # side of what a step sees of an image: for the net that pools nothing and so is the slowest
REPORTED_IMAGES = 8  # held-back images whose loss is shown at the end of each pass


def parse_arguments(arguments: list[str] | None = None) -> Namespace:
    """Read the command line."""
    options = stages.parser(__doc__)
    stages.add_image_size(options)
    stages.add_training(options, batch_size=4, learning_rate="0.05; of adam 1e-3")
    stages.add_optimiser(options)
    options.add_argument(
        "--patch-size",
        type=int,
        choices=tuple(SCALES),
        nargs="+",
        default=list(DEFAULT_SCALES),
        help="side of a patch in pixels; several make a detector of several scales. 130 and 260 are the networks for "
        "65 on the image at half and a quarter of its size: quick, and they see wide changes (default 33 130)",
    )
    options.add_argument(
        "--students",
        type=stages.positive,
        default=3,
        help="1 is fastest and has no variance to show; the paper takes 3 (default 3)",
    )
    options.add_argument(
        "--epochs",
        type=stages.positive_real,
        help="passes over the images, 1.5 for one and a half; more while the held-back loss still falls; the paper "
        f"takes 100 (default: as many as make {VISITS:,} visits of an image, twice as many for 130, four times for "
        "260: half an hour for 33 and 130 on two CPU cores with bfloat16 units)",
    )
    stages.add_stride(options, default=4)
    options.add_argument(
        "--global-student",
        action=BooleanOptionalAction,
        default=True,
        help="also a student of whole images, fitted in closed form within a minute: for parts that are alike and lie "
        "alike (default: yes; the paper has none)",
    )
    args = options.parse_args(arguments)
    args.learning_rate = args.learning_rate or LEARNING_RATES[args.optimiser]
    return args


def load_teacher(args: Namespace, patch_size: int) -> AnomalyNet:
    """The category's teacher where stage 2 has made one, else the one that ships. Raises UserError without either."""
    own, *shipped = (
        folder / f"teacher_{patch_size}.pt"
        for folder in (args.model / args.category, args.model / PRETRAINED, ROOT / "model" / PRETRAINED)
    )
    path = next((path for path in (own, *shipped) if path.exists()), None)
    if path is None:
        raise UserError(f"{own} is not there: run teacher_training.py {args.category} --patch-size {patch_size} first")
    print(f"teacher: {path}")
    net = AnomalyNet(patch_size)
    net.load_state_dict(checkpoints.load(path, "teacher", category=path.parent.name, patch_size=patch_size)["net"])
    return net.eval().requires_grad_(False)


@torch.inference_mode()
def descriptor_moments(
    teacher: FDFEAnomalyNet, seen: See, store: ImageStore, indices: list[int], args: Namespace, where: torch.device
) -> Moments:
    """Mean and deviation of the teacher's descriptors over all pixels that `teacher` visits."""
    found = Moments()
    indices = distributed.share(indices)
    for groups in stages.with_bar(store.batches([index] for index in indices), len(indices), "teacher's descriptors"):
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
    for groups in stages.with_bar(store.batches([index] for index in indices), len(indices), "usual errors"):
        with device.autocast(where, args.precision):
            images = zoomed(preprocessing.normalise(groups[0].to(where)), scale.zoom)
            statistics.update(*scoring.error_and_variance(teacher, students, images))
    statistics.gather()
    scale.calibrate(statistics)


def global_student(scale: Scale, args: Namespace) -> GlobalStudent | None:
    """Fit a student of whole images to those that the others learned from; None where they are too few.

    Of several processes each does all of it: they get the same in less time than it takes to share it.
    """
    size = stages.image_size(args)
    dataset = stages.good_images(args, size)
    where = device.choose(args.device)
    learned, _ = stages.held_back_split(len(dataset), args.seed)
    if len(learned) < FEWEST_IMAGES:
        print(f"no global student: it wants {FEWEST_IMAGES} images to learn from, here are {len(learned)}")
        return None
    size = size_seen(size)

    def describe(net: FDFEAnomalyNet, number: int) -> Iterator[Tensor]:
        indices = evenly(learned, number)
        samples = prefetched(lambda index: dataset[index]["image"], indices)
        for image in stages.with_bar(samples, len(indices), f"global student, {scale.patch_size} pixels"):
            with device.autocast(where, args.precision):
                pixels = preprocessing.normalise(image[None].to(where))
                found = net(seen_image(pixels, size, scale.zoom))
            yield found  # not from within: the fit would be computed in that precision, too

    teacher = scale.normalised_teacher().to(where, memory_format=device.memory_format(where))
    return GlobalStudent.fit(teacher, scale.zoom, size, describe).cpu()


def usual_scores(networks: AnomalyDetector, args: Namespace) -> Calibration:
    """Measure the scores of the images that were held back."""
    dataset = stages.good_images(args, stages.image_size(args))
    where = device.choose(args.device)
    networks.to(where, memory_format=device.memory_format(where))
    _, held_back = stages.held_back_split(len(dataset), args.seed)
    found = []
    indices = distributed.share(held_back)
    samples = prefetched(lambda index: dataset[index]["image"], indices)
    for image in stages.with_bar(samples, len(indices), "usual scores"):
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
    size = stages.image_size(args)
    dataset = stages.good_images(args, size)
    net_size, zoom = SCALES[patch_size]
    learned, held_back = stages.held_back_split(len(dataset), args.seed)
    epochs = args.epochs or float(f"{VISITS * zoom / len(learned):.3g}")
    settings = {
        "seed": args.seed,
        "image_size": stages.sides(args),
        "precision": args.precision,
        "batch_size": args.batch_size,
        "epochs": epochs,
        "optimiser": args.optimiser,
        "learning_rate": args.learning_rate,
        "students": args.students,
        "stride": args.stride,
        "teacher": checkpoints.fingerprint(teacher_net.state_dict()),
        "images": stages.digest_of(stages.image_paths(dataset)),
    }
    if not args.restart and already_trained(path, KIND, args.category, settings):
        return path
    where = device.choose(args.device)
    store = ImageStore(lambda index: dataset[index]["image"], len(dataset))
    stride = zoomed_stride(args.stride, zoom)
    if size and -(-min(size) // zoom) < 2 * stride:
        raise UserError(f"--image-size {min(size)}: too small for patches of {patch_size} at a stride of {args.stride}")

    def seen(images: Tensor) -> Tensor:
        return zoomed(preprocessing.normalise(images.to(where)), zoom)

    teacher_net.to(where, memory_format=device.memory_format(where))
    dense = partial(FDFEAnomalyNet, stride=stride, padding=PADDING)
    found = descriptor_moments(dense(teacher_net), seen, store, evenly(learned, CALIBRATED_IMAGES), args, where)
    teacher = dense(teacher_net.with_normalised_descriptors(found.mean, found.deviation))
    student_nets = nn.ModuleList()
    for number in range(args.students):
        torch.manual_seed(device.seed_of(args.seed, "student", patch_size, number))
        student_nets.append(AnomalyNet(net_size, batch_normalisation=True))
    student_nets.to(where, memory_format=device.memory_format(where))
    SyncBatchNorm2d.convert(student_nets)
    students = [dense(net) for net in student_nets]

    optimiser = Optimiser(student_nets, args.optimiser, args.learning_rate)
    wanted = stages.shuffled_batches(learned, args.batch_size, epochs, args.seed)
    if args.restart:  # all sizes at once, so that after a stop the others are trained anew, too
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
            if net_size in PARTS:
                pixels = part(pixels, PARTS[net_size] + net_size - 1, place)
            with device.autocast(where, args.precision), torch.no_grad():
                target = teacher.describe_padded(pixels).float()
            for student in students:  # one after another: the memory of one student's activations, not of all
                with device.autocast(where, args.precision):
                    descriptors = student.describe_padded(pixels)
                loss = losses.regression(descriptors.float(), target)
                (loss * len(images) / len(wanted[step])).backward()
                total += loss.item() * share if len(images) else 0.0
        optimiser.step(learning_rate(step, len(wanted)))
        training.report(distributed.summed(total))
        if (step + 1) % per_epoch == 0:
            shown = held_back[:REPORTED_IMAGES]
            training.note(held_back=held_back_loss(teacher, students, seen, store, shown, args, where))

    scale = Scale(teacher_net, [net.folded() for net in student_nets], found.mean, found.deviation, zoom).to(where)
    calibrate(scale, store, evenly(learned, CALIBRATED_IMAGES), args, where)
    left = held_back_loss(teacher, students, seen, store, held_back, args, where)
    content = {"patch_size": patch_size, "settings": settings, "scale": scale_to_checkpoint(scale.cpu())}
    checkpoints.save(path, KIND, args.category, content | {"held_back_loss": left})
    if distributed.is_first():
        figures.save_training_curve(path.with_name(f"students_{patch_size}_training.png"), *training.curve("loss"))
    training.finish()
    print(f"students leave {left:.3f} of the teacher's variance unexplained on {len(held_back)} held-back images")
    print(f"saved {path}")
    return path


def main(arguments: list[str] | None = None) -> None:
    """Run stage 3."""
    args = parse_arguments(arguments)
    sizes = sorted(set(args.patch_size))
    # All of them before any student: one that is missing or broken shall not show after half an hour.
    teachers = {size: load_teacher(args, size) for size in sorted({SCALES[patch_size][0] for patch_size in sizes})}
    paths = [train(args, patch_size, teachers[SCALES[patch_size][0]]) for patch_size in sizes]
    contents = [checkpoints.load(path, KIND, category=args.category) for path in paths]
    detector = args.model / args.category / "detector.pt"
    made_from = [
        content["settings"]
        | {"weights": checkpoints.fingerprint(content["scale"]["state"]), "global_student": args.global_student}
        for content in contents
    ]
    if detector.exists():
        there = checkpoints.load(detector, "detector", category=args.category)
        if there.get("detector_version") == VERSION and there["made_from"] == made_from:
            return
    scales = [scale_from_checkpoint(content["scale"]) for content in contents]
    if args.global_student:
        for scale in scales:
            scale.global_student = global_student(scale, args)
    networks = AnomalyDetector(scales, args.stride)
    calibration = usual_scores(networks, args)
    size = stages.image_size(args)
    checkpoints.save(
        detector,
        "detector",
        args.category,
        {
            "detector_version": VERSION,
            "image_size": size and list(size),
            "stride": args.stride,
            "made_from": made_from,
            "scales": [scale_to_checkpoint(scale.cpu()) for scale in scales],
            "calibration": calibration.state_dict(),
        },
    )
    print(f"smallest false-alarm rate that the held-back images can promise: {calibration.smallest_rate:.3f}")
    print(f"saved {detector}: all that detection needs")


if __name__ == "__main__":
    distributed.run(main)
