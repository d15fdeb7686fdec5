"""One class is normal, all others are anomalies: the experiment of section 4.1 of "Uninformed Students".

For each class in turn, detectors learn from its training images alone and score all test images. Settings are the same
for all classes. The data sets are MNIST and CIFAR-10, as in the paper, FashionMNIST, and scikit-learn's digits, which
come with that package. Nothing is downloaded: --data is a folder in torchvision's layout, with MNIST/raw,
FashionMNIST/raw (files unpacked) or cifar-10-batches-py. The digits come without a split: as in scikit-learn's own
example, the first half is for training.

How to read the table: image AU-ROC of each class, and their mean.

- patch students: images are resized to the patch, 33 x 33, so that an image has one descriptor. The teacher is the one
  that ships; students are trained with the optimiser of --teacher patches. The score is the regression error plus the
  predictive variance, each normalised on training images that are held back (section 3.2, equation 11).
- default: the default detector at 128 x 128, the smallest size that it takes. "default, mean" scores an image by the
  mean of its map instead of the highest 1 %.
- nearest: distance to the nearest training image, pixel by pixel; a yardstick that needs no network.

The paper's own figures are in its table 1. Each class's result is kept beside --output until all are done: after a
stop, the same command goes on. A class takes a minute or two on one core; more images need more --steps.

    python3 benchmarks/one_class.py --dataset digits
    python3 benchmarks/one_class.py --dataset mnist --data DIR --classes 0 1 2 --images 1000 --steps 200
"""

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import measuring
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import CIFAR10, MNIST, FashionMNIST
from tqdm import tqdm

from AnomalyNet import AnomalyNet
from FDFEAnomalyNet import FDFEAnomalyNet
from student_teacher.detection import scoring
from student_teacher.evaluation import metrics
from student_teacher.images import preprocessing
from student_teacher.images.category import validation_split
from student_teacher.images.store import ImageStore
from student_teacher.runtime import command_line, device
from student_teacher.runtime.bars import with_bar
from student_teacher.runtime.errors import UserError, run
from student_teacher.runtime.paths import PRETRAINED, ROOT
from student_teacher.runtime.resume_log import ResumeLog
from student_teacher.runtime.running_moments import RunningMoments
from student_teacher.teachers import backbone_weights
from student_teacher.training import backbone_students, patch_students
from student_teacher.training.loop import learning_rate
from student_teacher.training.optimiser import Optimiser

STORED = {"mnist": MNIST, "fashion_mnist": FashionMNIST, "cifar10": CIFAR10}  # in torchvision's formats
DATASETS = (*STORED, "digits")
PATCH_SIZE = 33  # about the size of the images, 28 or 32
STRIDE = 32  # a multiple of the pooling's strides, so that nothing is computed beside the one descriptor
BATCH, TESTED = 32, 64  # images at once, in a step of training and in tests
LEAST = 4  # training images of a class: fewer can't be split for the normalisation
BACKBONE_SIZE = 128, 128
METHODS = "patch students", "default", "default, mean", "nearest"


class Images(NamedTuple):
    """Images of a data set: uint8 (n,h,w) or (n,h,w,3), and their classes (n,)."""

    pixels: np.ndarray
    classes: np.ndarray

    def at(self, side: int) -> ImageStore:
        """All of them in colour, resized to a square of this side."""
        transform = preprocessing.image_transform((side, side))
        return ImageStore(lambda index: transform(Image.fromarray(self.pixels[index]).convert("RGB")), len(self.pixels))


class WholeImage(FDFEAnomalyNet):
    """A patch network on images of its patch's size: (N,3,p,p) -> (N,C,1,1). Nothing is padded."""

    def __init__(self, net: AnomalyNet):
        super().__init__(net, STRIDE)

    def pad(self, images: Tensor, offset: tuple[int, int] = (0, 0)) -> Tensor:
        """The images as they are."""
        return images


def parse_arguments(arguments: list[str] | None = None) -> Namespace:
    """Read the command line."""
    options = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    options.add_argument("--dataset", choices=DATASETS, default="digits", help="(default digits)")
    options.add_argument(
        "--data", type=Path, default=ROOT / "data", metavar="DIR", help="has the data set in torchvision's format"
    )
    options.add_argument(
        "--classes", type=int, choices=range(10), nargs="+", default=list(range(10)), help="(default: all)"
    )
    options.add_argument(
        "--images", type=command_line.positive, metavar="N", help="training images of a class, at most (default: all)"
    )
    options.add_argument("--students", type=command_line.positive, default=3, help="(default 3)")
    options.add_argument(
        "--steps", type=command_line.positive, default=40, help=f"of {BATCH} images, for patch students (default 40)"
    )
    options.add_argument("--seed", type=command_line.seed, default=0)
    options.add_argument("--device", default="auto")
    options.add_argument("--precision", choices=device.PRECISIONS, default="auto")
    options.add_argument(
        "--output", type=Path, metavar="FILE", help="JSON file (default results/one_class/DATASET.json)"
    )
    args = options.parse_args(arguments)
    args.output = args.output or ROOT / "results" / "one_class" / f"{args.dataset}.json"
    return args


def load(name: str, folder: Path) -> tuple[Images, Images]:
    """Training and test images of a data set. Raises UserError, with what to download, if it isn't there."""
    if name == "digits":
        return digits()
    kind, found = STORED[name], []
    for train in (True, False):
        try:
            dataset = kind(folder, train=train)
        except (RuntimeError, OSError):
            raise UserError(missing(kind, folder)) from None
        found.append(Images(np.asarray(dataset.data), np.asarray(dataset.targets)))
    return tuple(found)


def missing(kind: type, folder: Path) -> str:
    """What to download, and where to put it."""
    if kind is CIFAR10:
        return f"{folder / kind.base_folder} is not complete: download {kind.url} and unpack it in {folder}"
    names = ", ".join(name for name, _ in kind.resources)
    raw = folder / kind.__name__ / "raw"
    return f"{raw} is not complete: download {names} from {kind.mirrors[0]} into it, and unpack them with gunzip"


def digits() -> tuple[Images, Images]:
    """Scikit-learn's digits, 8 x 8, as training and test images. Raises UserError without scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError(
            "--dataset digits needs scikit-learn, which is not installed: pip install -r requirements-dev.txt"
        ) from None
    found = load_digits()
    pixels, half = (found.images * (255 / 16)).round().astype(np.uint8), len(found.images) // 2
    return Images(pixels[:half], found.target[:half]), Images(pixels[half:], found.target[half:])


def learned_from(train: Images, normal: int, args: Namespace) -> Images:
    """The training images of a class, or --images of them, drawn at random."""
    order = np.random.default_rng(device.seed_of(args.seed, "images", normal))
    chosen = np.sort(order.permutation(np.flatnonzero(train.classes == normal))[: args.images])
    if len(chosen) < LEAST:
        raise UserError(f"{len(chosen)} training images of class {normal}: {LEAST} are the least")
    return Images(train.pixels[chosen], train.classes[chosen])


def in_batches(store: ImageStore, indices: list[int], description: str) -> Iterator[Tensor]:
    """The images of a store, TESTED at once: uint8 (n,3,H,W)."""
    batches = [indices[start : start + TESTED] for start in range(0, len(indices), TESTED)]
    for (images,) in with_bar(store.batches(batches), len(batches), description):
        yield images


@torch.inference_mode()
def moments(teacher: WholeImage, store: ImageStore, indices: list[int], compute: device.Compute) -> RunningMoments:
    """Mean and std of the teacher's descriptors."""
    found = RunningMoments()
    for images in in_batches(store, indices, "teacher's descriptors"):
        with compute.autocast():
            found.update(teacher(preprocessing.normalise(images.to(compute.where))).flatten(1))
    return found


def train(students: patch_students.Students, store: ImageStore, learned: list[int], args: Namespace) -> None:
    """Train the students, in place, on random batches of images of the store."""
    optimiser = Optimiser(students.nets, "muon", patch_students.LEARNING_RATES["muon"])
    random = device.generator(args.seed, "batches")
    drawn = torch.randint(len(learned), (args.steps, BATCH), generator=random).tolist()
    batches = store.batches([learned[place] for place in batch] for batch in drawn)
    for step, (images,) in enumerate(tqdm(batches, "patch students", args.steps, leave=False, dynamic_ncols=True)):
        optimiser.zero_grad()
        students.learn(images, 1.0)
        optimiser.step(learning_rate(step, args.steps))


def by_patch_students(good: Images, tested: ImageStore, args: Namespace) -> np.ndarray:
    """Scores (n,) of test images by students of the shipped teacher, trained on good images (section 3.2)."""
    settings = patch_students.PatchSettings(
        category=PRETRAINED, students=args.students, seed=args.seed, device=args.device, precision=args.precision
    )
    compute, store = settings.compute, good.at(PATCH_SIZE)
    learned, validation = validation_split(len(good.pixels), args.seed)
    net = compute.place(patch_students.load_teacher(settings, PATCH_SIZE, published=False)[0])
    found = moments(WholeImage(net), store, learned, compute)
    teacher = WholeImage(net.with_normalised_descriptors(found.mean, found.std))
    students = patch_students.Students(teacher, patch_students.new_students(settings, net), compute)
    train(students, store, learned, args)
    folded = [WholeImage(compute.place(student.folded())) for student in students.nets]

    @torch.inference_mode()
    def measured(store: ImageStore, indices: list[int]) -> Tensor:
        """Error and variance, (n,2)."""
        parts = []
        for images in in_batches(store, indices, "errors"):
            with compute.autocast():
                seen = preprocessing.normalise(images.to(compute.where))
                parts.append(torch.stack(scoring.error_and_variance(teacher, folded, seen), 1).flatten(1))
        return torch.cat(parts)

    normalisation = RunningMoments()
    normalisation.update(measured(store, validation))
    scores = (measured(tested, list(range(len(tested)))) - normalisation.mean) / normalisation.std
    return scores.sum(1).numpy(force=True)


def by_default_detector(good: Images, tested: ImageStore, compute: device.Compute) -> dict[str, np.ndarray]:
    """Scores (n,) of test images by the default detector: its own, and the mean of its map."""
    backbone = backbone_weights.backbone("efficientnet_lite0", "imagenet")
    detector, _ = backbone_students.fit(backbone, BACKBONE_SIZE, good.at(BACKBONE_SIZE[0]), compute)
    found = {scoring.SMOOTH: [], scoring.MEAN: []}
    for images in in_batches(tested, list(range(len(tested))), "tests"):
        with compute.autocast():
            maps = detector.maps(images.to(compute.where)).scored_maps
        for name, scores in found.items():
            scores.append(scoring.image_scores(maps, name))
    return {name: torch.cat(scores).numpy(force=True) for name, scores in found.items()}


def by_nearest(good: Images, test: Images) -> np.ndarray:
    """Euclidean distance (n,) of test images to the nearest of the good ones, pixel by pixel."""
    bank, queries = (torch.from_numpy(images.pixels).flatten(1).float() for images in (good, test))
    return torch.cat([torch.cdist(part, bank).amin(1) for part in queries.split(1_000)]).numpy()


def measure(good: Images, test: Images, stores: dict[int, ImageStore], args: Namespace) -> dict[str, float]:
    """AU-ROC of each of METHODS, with the class of `good` as the normal one; `stores`: the test images by size."""
    with redirect_stdout(None):  # what training says of each class
        found = by_default_detector(good, stores[BACKBONE_SIZE[0]], measuring.compute(args))
        patches = by_patch_students(good, stores[PATCH_SIZE], args)
    scores = [patches, found[scoring.SMOOTH], found[scoring.MEAN], by_nearest(good, test)]
    labels = test.classes != good.classes[0]
    return {name: float(metrics.au_roc(values, labels)) for name, values in zip(METHODS, scores, strict=True)}


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table, write JSON."""
    args = parse_arguments(arguments)
    train_images, test = load(args.dataset, args.data)
    stores = {side: test.at(side) for side in (PATCH_SIZE, BACKBONE_SIZE[0])}
    same = {name: value for name, value in vars(args).items() if name not in ("classes", "output")}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    log, rows = ResumeLog(args.output.with_name(f".{args.output.name}.progress"), str(same)), {}
    for normal in tqdm(args.classes, args.dataset, unit=" classes", dynamic_ncols=True):
        rows[normal] = log.get(str(normal))
        if rows[normal] is None:
            good = learned_from(train_images, normal, args)
            rows[normal] = {"images": len(good.pixels)} | measure(good, test, stores, args)
            log.put(str(normal), rows[normal])
    machine = measuring.machine(device.choose(args.device))
    mean = {name: float(np.mean([row[name] for row in rows.values()])) for name in METHODS}
    print(f"{measuring.machine_line(machine)}; {args.dataset}, {len(test.pixels):,} test images, seed {args.seed}\n")
    lines = [(normal, row["images"], *(f"{row[name]:.4f}" for name in METHODS)) for normal, row in rows.items()]
    lines.append(("mean", "", *(f"{mean[name]:.4f}" for name in METHODS)))
    print(measuring.table(("normal class", "training images", *METHODS), lines))
    measuring.write_json(args.output, "one_class", args, machine, rows=rows, mean=mean)
    log.finish()


if __name__ == "__main__":
    run(main)
