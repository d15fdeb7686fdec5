"""What the four stages ask for alike: options, folders, the category's images."""

import hashlib
import math
from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

import device
import images
import preprocessing
from AnomalyDataset import AnomalyDataset
from command_line import UserError, add_folders, category_name
from optimiser import OPTIMISERS


def positive(text: str) -> int:
    """An option's value: a whole number from 1."""
    return _number(int, text, lambda value: value >= 1, "a whole number from 1")


def positive_real(text: str) -> float:
    """An option's value: a number above 0."""
    return _number(float, text, lambda value: 0 < value < float("inf"), "a number above 0")


def share(text: str) -> float:
    """An option's value: a number between 0 and 1."""
    return _number(float, text, lambda value: 0 < value < 1, "a number between 0 and 1")


def _number(kind, text, allowed, what):
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not allowed(value):
        raise ArgumentTypeError(f"{text}: must be {what}")
    return value


def seed(text: str) -> int:
    """An option's value: a whole number from 0 that generators take."""
    return _number(int, text, lambda value: 0 <= value < 2**63, "a whole number from 0, below 2^63")


def side(text: str) -> int | None:
    """One of the values of --image-size: a number of pixels, or None for "native"."""
    if text == "native":
        return None
    return _number(int, text, lambda value: value >= 8, "a number of pixels from 8, or native")


def parser(description: str, folders: tuple[str, ...] = ("data", "model"), computes: bool = True) -> ArgumentParser:
    """A parser with the options of every stage; of a script that runs no networks unless it `computes`."""
    options = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    options.add_argument(
        "category", type=category_name, help="name of a folder in data/, made ready by ./mvtec_dataset.sh CATEGORY"
    )
    if computes:
        options.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1 ...")
        options.add_argument(
            "--precision",
            choices=device.PRECISIONS,
            default="auto",
            help="auto takes bfloat16 where the hardware computes it faster; float32 where figures shall not hang on "
            "that",
        )
    add_folders(options, *folders)
    return options


def add_image_size(
    options: ArgumentParser,
    default: Sequence[int | None] | None = (256,),
    advice: str = "smaller is faster and misses small defects",
    otherwise: str = "as in training",
) -> None:
    """Add --image-size; `image_size` reads it. `otherwise` says what holds where there is no default."""
    shown = otherwise if default is None else "native" if default[0] is None else default[0]
    options.add_argument(
        "--image-size",
        type=side,
        nargs="+",
        default=default and list(default),
        metavar="PIXELS",
        help="side of the square that images are resized to, or height and width, or native: as they are; "
        f"{advice} (default {shown})",
    )


def image_size(args: Namespace) -> preprocessing.Size:
    """Height and width that --image-size asks for, None for native."""
    sides = args.image_size
    if len(sides) > 2 or (len(sides) == 2 and None in sides):
        raise UserError("--image-size takes one number, or height and width, or native alone")
    return None if sides == [None] else (sides[0], sides[-1])


def sides(args: Namespace) -> list[int | None]:
    """What --image-size asks for, as models are told apart by it: 256 256 is 256."""
    return list(dict.fromkeys(args.image_size))


def good_images(args: Namespace, size: preprocessing.Size) -> AnomalyDataset:
    """The category's anomaly-free training images as uint8 tensors. Raises UserError if there are fewer than 2."""
    transform, least = preprocessing.image_transform(size), preprocessing.least_side(size)
    dataset = AnomalyDataset(args.data / args.category, transform, least=least, type="train", label=0)
    if len(dataset) < 2:
        raise UserError(f"{args.data / args.category} has {len(dataset)} images in train/good: two are the least")
    return dataset


def size_of_all(dataset: AnomalyDataset) -> tuple[int, int]:
    """Height and width of all images. Raises UserError, naming two, where they differ."""
    first = None
    for row in dataset.rows:
        path = dataset.root_dir / row["image_name"]
        width, height = images.load_rgb(path).size
        first = first or (path, height, width)
        if (height, width) != first[1:]:
            raise UserError(
                f"--image-size native: {first[0]} has {first[2]} x {first[1]} pixels, {path} {width} x {height}; give "
                "a size for all"
            )
    return first[1:]


def digest_of(paths: Iterable[Path], contents: bool = True) -> str:
    """Digest of files' names and contents: what was trained on other images is told apart by it.

    Without `contents`, sizes stand for them, where there may be millions. Raises UserError where a file is missing.
    """
    digest = hashlib.sha256()
    for path in paths:
        try:
            part = path.read_bytes() if contents else str(path.stat().st_size).encode()
        except OSError as error:
            raise UserError(
                f"{path}: {error.strerror}; run ./mvtec_dataset.sh again if images have gone or come"
            ) from None
        digest.update(repr((path.name, len(part))).encode() + part)
    return digest.hexdigest()[:16]


def image_paths(dataset: AnomalyDataset) -> list[Path]:
    """The files of a dataset's images."""
    return [dataset.root_dir / row["image_name"] for row in dataset.rows]


def held_back_split(number: int, seed: int) -> tuple[list[int], list[int]]:
    """Indices to learn from, and to hold back: a tenth, or 20 if that is more, but then a quarter at most."""
    held_back = max(1, round(0.1 * number), min(20, number // 4))
    order = np.random.default_rng(device.seed_of(seed, "held back")).permutation(number).tolist()
    return sorted(order[held_back:]), sorted(order[:held_back])


def pictures_in(folder: Path) -> list[Path]:
    """All pictures in a folder and below, sorted. Raises UserError if there are fewer than 2."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: --images takes one with pictures in it or below")
    found = sorted(path for path in folder.rglob("*") if images.is_image(path))
    if len(found) < 2:
        raise UserError(f"{folder} holds {len(found)} pictures, two are the least ({', '.join(images.IMAGE_SUFFIXES)})")
    return found


def not_negative(text: str) -> float:
    """An option's value: a number from 0."""
    return _number(float, text, lambda value: 0 <= value < float("inf"), "a number from 0")


def add_training(options: ArgumentParser, batch_size: int | str, learning_rate: float | str) -> None:
    """Add the options of every training. A text in place of a default says what it hangs on; the value is None then."""
    options.add_argument("--seed", type=seed, default=0, help="same seed, same machine: same numbers (default 0)")
    options.add_argument(
        "--batch-size",
        type=positive,
        default=None if isinstance(batch_size, str) else batch_size,
        help=f"lower this if memory runs out (default {batch_size})",
    )
    options.add_argument(
        "--learning-rate",
        type=positive_real,
        default=None if isinstance(learning_rate, str) else learning_rate,
        metavar="X",
        help=f"its peak, after a warm-up; lower this if the loss rises or is not a number (default {learning_rate})",
    )
    options.add_argument(
        "--restart", action="store_true", help="remove what was trained before, or half of it, and train anew"
    )


def add_optimiser(options: ArgumentParser, default: str | None = OPTIMISERS[0]) -> None:
    """Add --optimiser."""
    options.add_argument(
        "--optimiser",
        choices=OPTIMISERS,
        default=default,
        help="adam, the paper's, takes many times as long to learn as much (default muon)",
    )


def add_stride(options: ArgumentParser, default: int | None, **stored: int | None) -> None:
    """Add --stride; `stored` None: where it is not given, None stands for the default."""
    note = "as the students were trained" if default is None else default
    options.add_argument(
        "--stride",
        type=int,
        choices=(1, 2, 4, 8),
        default=stored.get("stored", default),
        help="every STRIDE-th pixel along each side is described: with patches of 65 pixels 4 costs a tenth of 1, the "
        f"paper's (default {note})",
    )


def shuffled_batches(indices: list[int], batch_size: int, epochs: float, seed: int) -> list[list[int]]:
    """The batches of all passes over `indices`, each pass in an order of its own; one batch at least."""
    batches = []
    for epoch in range(math.ceil(epochs)):
        order = np.random.default_rng(device.seed_of(seed, "order", epoch)).permutation(indices).tolist()
        batches += [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return batches[: max(1, round(epochs * math.ceil(len(indices) / batch_size)))]


def with_bar(iterable: Iterable, total: int, description: str) -> Iterable:
    """The iterable, behind a progress bar that goes when it is done."""
    return tqdm(iterable, total=total, desc=description, unit=" images", leave=False, dynamic_ncols=True)
