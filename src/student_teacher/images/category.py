"""The images of a category: which they are, what tells them apart, how they are split."""

import hashlib
import sys
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from AnomalyDataset import AnomalyDataset
from student_teacher.images import ignored, preprocessing, reading
from student_teacher.images.folders import images_below, told
from student_teacher.images.index import LEARNED
from student_teacher.images.store import ImageStore
from student_teacher.runtime import device
from student_teacher.runtime.errors import UserError


class GoodImages:
    """A category's anomaly-free training images: which they are, what tells them apart, how they are split.

    The index is read once, files are read once for the identity, and decoded once for each size.

    Args:
        folder: the category's folder.
        ignore: the file of a mask of regions to ignore, instead of the category's own; see ignored.py.
        index: where the index is, if it is not in its usual place; see index.index_path.

    Attributes:
        dataset: the images as they are, not resized.
        ignored: the mask (h,w) of regions to ignore, or None.

    Raises:
        UserError: there are fewer than 2, or the mask can't be used.
    """

    def __init__(self, folder: Path, ignore: Path | None = None, index: Path | None = None):
        self.ignored = ignored.load(folder, ignore)
        self.dataset = AnomalyDataset(folder, index=index, type=LEARNED, label=0)
        self._decoded: dict[preprocessing.Size, ImageStore] = {}
        if len(self.dataset) < 2:
            raise UserError(f"{folder} has {len(self.dataset)} good images to learn from: two are the least")

    def __len__(self) -> int:
        return len(self.dataset)

    @cached_property
    def paths(self) -> list[Path]:
        """The images' files."""
        return image_paths(self.dataset)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """See `identity_of`; and as `ignored` a digest of the regions to ignore, if there are any."""
        regions = {} if self.ignored is None else {"ignored": ignored.digest_of(self.ignored)}
        return identity_of(self.dataset) | regions

    @cached_property
    def common_size(self) -> tuple[int, int]:
        """Height and width of all images. Raises UserError, naming two, if they differ."""
        first = None
        for path in self.paths:
            height, width = reading.load_deep(path)[1]
            first = first or (path, height, width)
            if (height, width) != first[1:]:
                raise UserError(
                    f"--image-size native: {first[0]} has {first[2]} x {first[1]} pixels, {path} {width} x {height}; "
                    "give a size for all"
                )
        return first[1:]

    def require_sides(self, least: int) -> None:
        """Raise UserError, naming it, if an image's shorter side is below `least` pixels. Nothing is decoded."""
        for path in self.paths:
            sides = reading.sides_of(path)
            if min(sides) < least:
                raise UserError(
                    f"{path}: too small, {min(sides)} pixels where {least} are the least for this --stride: give an "
                    "--image-size, a smaller --stride, or remove it"
                )

    def split(self, seed: int) -> tuple[list[int], list[int]]:
        """Indices to train on, and for validation: see `validation_split`."""
        return validation_split(len(self), seed)

    def decoded(self, size: preprocessing.Size) -> ImageStore:
        """All images as uint8 tensors (3,H,W), resized to height and width unless `size` is None.

        Regions to ignore are painted over.
        """
        if size not in self._decoded:
            transform, least = preprocessing.image_transform(size, self.ignored), preprocessing.least_side(size)

            def load(index: int) -> Tensor:
                image, _ = reading.load_reduced(self.paths[index], least, self.dataset.value_range)
                return transform(image)

            self._decoded[size] = ImageStore(load, len(self))
        return self._decoded[size]


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

    `images` is a digest; `image_files`, each file's own by its name, says which ones differ. Raises UserError if a file
    is missing.
    """
    whole, files = hashlib.sha256(), {}
    for row, path in zip(dataset.rows, image_paths(dataset), strict=True):
        part = _named_content(path)  # read once, for both
        whole.update(part)
        files[row["image_name"]] = hashlib.sha256(part).hexdigest()[:16]
    digest = whole.hexdigest()[:16]
    return {"images": f"{digest} {dataset.value_range}" if dataset.value_range else digest, "image_files": files}


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
