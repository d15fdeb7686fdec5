"""A category for choosing settings: validation images of a category, with and without painted defects.

Settings should not be chosen on the test images whose results are reported. So this makes another category,
CATEGORY_synthetic, from the good training images only: `train/good` are those that patch students are trained on,
`test/good` those that validate them, and each of these again with a defect of each kind:

    hole    a small dark or bright spot            rough   the surface broken up
    line    a thin dark line, as a crack           shade   a soft change of brightness
    patch   another surface with a frayed outline  break   a dark or bright piece out of an edge

    python3 benchmarks/synthetic_category.py magnetic_tile
    ./mvtec_dataset.sh magnetic_tile_synthetic

With --unseen it makes CATEGORY_unseen: as many validation images, but with all photographs of the parts that they show
(groups with correlated thumbnails, see seen_before.py), so that none of these parts is in the training images.
"""

import shutil
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import numpy as np
import seen_before
import torch
from PIL import Image, ImageDraw

from AnomalyDataset import AnomalyDataset
from student_teacher.images import category
from student_teacher.runtime import command_line, device
from student_teacher.runtime.bars import with_bar
from student_teacher.runtime.errors import UserError, run
from student_teacher.runtime.paths import add_folders, category_name

SIDE = 256  # of the images, in pixels; all lengths below are for this size
Grey = np.ndarray  # (SIDE,SIDE) float


def parse_arguments(arguments: list[str] | None = None) -> Namespace:
    """Read the command line."""
    options = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    options.add_argument("category", type=category_name, help="a folder in data/, prepared by ./mvtec_dataset.sh")
    add_folders(options, "data")
    options.add_argument("--seed", type=command_line.seed, default=0, help="of the split and the defects (default 0)")
    options.add_argument("--unseen", action="store_true", help="validate on parts that are not trained on")
    return options.parse_args(arguments)


def unseen_split(good: AnomalyDataset, seed: int) -> tuple[list[int], list[int]]:
    """Indices for training and validation: as many as in validation_split, but with groups that look alike unsplit."""
    pixels = seen_before.thumbnails(good)
    alike = seen_before.correlations(pixels, pixels) > seen_before.ALIKE
    group = torch.arange(len(alike))
    while not torch.equal(spread := torch.where(alike | alike.T, group, len(alike)).amin(1).minimum(group), group):
        group = spread
    wanted = len(category.validation_split(len(alike), seed)[1])
    validation: list[int] = []
    sizes = group.bincount(minlength=len(alike))
    for number in np.random.default_rng(device.seed_of(seed, "unseen")).permutation(len(alike)):
        if 0 < sizes[number] <= wanted - len(validation):
            validation += (group == number).nonzero()[:, 0].tolist()
    return sorted(set(range(len(alike))) - set(validation)), sorted(validation)


def noise(random: np.random.Generator, grain: int) -> Grey:
    """Smooth noise with a standard deviation of at most 1 and features `grain` pixels wide."""
    coarse = random.normal(size=(SIDE // grain + 3,) * 2).astype(np.float32)
    wide = Image.fromarray(coarse).resize((grain * len(coarse),) * 2, Image.Resampling.BICUBIC)
    return np.asarray(wide)[grain : grain + SIDE, grain : grain + SIDE]


def blob(random: np.random.Generator, radius: float, edge: float, margin: int = 20) -> Grey:
    """1 inside an irregular ellipse and 0 outside; `edge` is the width of the transition."""
    row, column = np.mgrid[:SIDE, :SIDE] - random.uniform(margin, SIDE - margin, 2)[:, None, None]
    angle, roundness = random.uniform(0, np.pi), random.uniform(0.5, 1)
    along = column * np.cos(angle) + row * np.sin(angle)
    across = (row * np.cos(angle) - column * np.sin(angle)) / roundness
    distance = np.hypot(along, across) * (1 + 0.25 * noise(random, 16)) - radius
    return np.clip(0.5 - distance / edge, 0, 1)


def _hole(image, other, random):
    inside = blob(random, random.uniform(2.5, 9), 2)[..., None]
    dark = random.random() < 0.75
    return image * (1 - inside) + inside * (
        image * random.uniform(0.1, 0.5) if dark else image + random.uniform(60, 120)
    ), inside


def _line(image, other, random):
    picture = Image.new("L", (2 * SIDE,) * 2)
    place, angle = random.uniform(40, 2 * SIDE - 40, 2), random.uniform(0, 2 * np.pi)
    points = [tuple(place)]
    for _ in range(random.integers(6, 24)):
        angle += random.normal(0, 0.35)
        place = place + 12 * np.array([np.cos(angle), np.sin(angle)])
        points.append(tuple(place))
    ImageDraw.Draw(picture).line(points, fill=255, width=int(random.integers(2, 6)))
    inside = np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BOX))[..., None] / 255
    return image * (1 - inside * random.uniform(0.35, 0.75)), inside


def _patch(image, other, random):
    inside = blob(random, random.uniform(15, 45), 3)[..., None]
    return image * (1 - inside) + inside * np.rot90(other) * random.uniform(0.8, 1.2), inside


def _rough(image, other, random):
    inside = blob(random, random.uniform(15, 45), 3)[..., None]
    return image + inside * noise(random, int(random.choice([3, 4, 6])))[..., None] * random.uniform(8, 20), inside


def _shade(image, other, random):
    inside = blob(random, random.uniform(25, 80), random.uniform(10, 40))[..., None]
    factor = random.uniform(0.5, 0.75) if random.random() < 0.5 else random.uniform(1.35, 1.8)
    return image * (1 + inside * (factor - 1)), inside


def _broken_edge(image, other, random):
    row, column = np.mgrid[:SIDE, :SIDE]
    place = (column - random.uniform(30, SIDE - 30)) / random.uniform(15, 50)
    distance = (place**2 + (row / random.uniform(10, 30)) ** 2) * (1 + 0.3 * noise(random, 12))
    inside = np.rot90(np.clip(6 * (1 - distance), 0, 1), random.integers(4))[..., None]
    surface = random.uniform(20, 220) + 12 * noise(random, 4)[..., None]
    return image * (1 - inside) + inside * surface, inside


# Takes an image (SIDE,SIDE,3) and another one; returns the image with a defect, and how much of each pixel it covers.
Paint = Callable[[np.ndarray, np.ndarray, np.random.Generator], tuple[np.ndarray, np.ndarray]]
KINDS: dict[str, Paint] = {
    "hole": _hole,
    "line": _line,
    "patch": _patch,
    "rough": _rough,
    "shade": _shade,
    "break": _broken_edge,
}


def save(pixels: np.ndarray, path: Path) -> None:
    """Write pixels (SIDE,SIDE,3) or (SIDE,SIDE) from 0 to 255."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.rint(pixels.clip(0, 255)).astype(np.uint8)).save(path)


def main(arguments: list[str] | None = None) -> None:
    """Write the category."""
    args = parse_arguments(arguments)
    good = AnomalyDataset(
        args.data / args.category, lambda image: image.resize((SIDE, SIDE), Image.Resampling.BILINEAR), type="train"
    )
    target = args.data / f"{args.category}_{'unseen' if args.unseen else 'synthetic'}"
    if target.exists():
        raise UserError(f"{target} exists already: remove it to make it again")
    if len(good) < 8:
        raise UserError(f"{args.data / args.category} has {len(good)} images in train/good: at least 8 are needed")
    if args.unseen:
        small = AnomalyDataset(args.data / args.category, seen_before.grey_thumbnail, type="train")
        learned, validation = unseen_split(small, args.seed)
        if not validation:
            raise UserError(f"{args.data / args.category}: all images look like one part, so no part can be left out")
    else:
        learned, validation = category.validation_split(len(good), args.seed)
    begun = target.with_name(f".{target.name}.unfinished")
    shutil.rmtree(begun, ignore_errors=True)
    for index in learned:
        save(np.asarray(good[index]["image"]), begun / "train" / "good" / f"{index:04}.png")
    images = [np.asarray(good[index]["image"], dtype=float) for index in validation]
    for number, image in enumerate(with_bar(images, len(images), "defects")):
        save(image, begun / "test" / "good" / f"{number:03}.png")
        other = images[(number + 7) % len(images)]
        for kind, paint in KINDS.items():
            painted, inside = paint(image, other, np.random.default_rng(device.seed_of(args.seed, kind, number)))
            save(painted, begun / "test" / kind / f"{number:03}.png")
            save(255.0 * (inside[..., 0] > 0.4), begun / "ground_truth" / kind / f"{number:03}_mask.png")
    begun.rename(target)
    print(
        f"{target}: {len(learned)} good images for training, {len(images)} good and {len(KINDS)} x {len(images)} "
        "defective ones for testing"
    )


if __name__ == "__main__":
    run(main, resumes=False)
