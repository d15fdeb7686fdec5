"""The images of a category: which they are, what tells them apart, how they are split."""

import hashlib
import sys
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from AnomalyDataset import AnomalyDataset
from student_teacher.images import ignored, preprocessing, reading
from student_teacher.images.folders import images_below, told
from student_teacher.runtime import device
from student_teacher.runtime.errors import UserError


def good_images(args: Namespace, size: preprocessing.Size) -> AnomalyDataset:
    """The category's anomaly-free training images as uint8 tensors. Raises UserError if there are fewer than 2.

    Regions to ignore are painted over, and are the dataset's `ignored`.
    """
    mask = ignored.load(args.data / args.category, getattr(args, "ignore", None))
    transform, least = preprocessing.image_transform(size, mask), preprocessing.least_side(size)
    dataset = AnomalyDataset(args.data / args.category, transform, least=least, ignored=mask, type="train", label=0)
    if len(dataset) < 2:
        raise UserError(f"{args.data / args.category} has {len(dataset)} images in train/good: two are the least")
    return dataset


def size_of_all(dataset: AnomalyDataset) -> tuple[int, int]:
    """Height and width of all images. Raises UserError, naming two, where they differ."""
    first = None
    for row in dataset.rows:
        path = dataset.root_dir / row["image_name"]
        (height, width) = reading.load_deep(path)[1]
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
        digest.update(_named_content(path, contents))
    return digest.hexdigest()[:16]


def _named_content(path, contents=True):
    try:
        file = reading.file_and_page(path)[0]
        part = file.read_bytes() if contents else str(file.stat().st_size).encode()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; run ./mvtec_dataset.sh again if images have gone or come") from None
    return repr((path.name, len(part))).encode() + part


def identity_of(dataset: AnomalyDataset) -> dict[str, Any]:
    """What tells a dataset's images, and how they are read, from others: for the settings that a model is made with.

    `images` is a digest; `image_files`, each file's own by its name, says which ones differ; `ignored` is the digest of
    regions to ignore, if there are any. Raises UserError where a
    file is missing.
    """
    whole, files = hashlib.sha256(), {}
    for row, path in zip(dataset.rows, image_paths(dataset), strict=True):
        part = _named_content(path)  # read once, for both
        whole.update(part)
        files[row["image_name"]] = hashlib.sha256(part).hexdigest()[:16]
    digest = whole.hexdigest()[:16]
    regions = {} if dataset.ignored is None else {"ignored": ignored.digest_of(dataset.ignored)}
    images = f"{digest} {dataset.value_range}" if dataset.value_range else digest
    return {"images": images, "image_files": files} | regions


def image_paths(dataset: AnomalyDataset) -> list[Path]:
    """The files of a dataset's images."""
    return [dataset.root_dir / row["image_name"] for row in dataset.rows]


def validation_split(number: int, seed: int) -> tuple[list[int], list[int]]:
    """Indices to learn from, and to hold back: a tenth, or 20 if that is more, but then a quarter at most."""
    validation = max(1, round(0.1 * number), min(20, number // 4))
    order = np.random.default_rng(device.seed_of(seed, "held back")).permutation(number).tolist()
    return sorted(order[validation:]), sorted(order[:validation])


def pictures_in(folder: Path) -> list[Path]:
    """All pictures in a folder and below, sorted; says what it passes over. Raises UserError for fewer than 2."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: --images takes one with pictures in it or below")
    found, others = images_below(folder)
    if others:
        print(told(others, folder), file=sys.stderr)
    if len(found) < 2:
        raise UserError(f"{folder} holds {len(found)} pictures, two are the least (PNG, JPEG, TIFF and others)")
    return found
