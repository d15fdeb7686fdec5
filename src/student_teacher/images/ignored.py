"""Regions to ignore: what differs from part to part and is no defect, such as a serial number.

A mask, white where nobody should look, is data/CATEGORY/ignore.png or another file. It may have any size: it is brought
to an image's size by the nearest pixel. What it covers is painted over in training and detection, so that it has no
influence on what lies beside it, and left out of scores and measures.
"""

import hashlib
import io
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor

from student_teacher.images.folders import IGNORED
from student_teacher.images.masks import EIGHT_CONNECTED
from student_teacher.images.reading import encoded, load_grey
from student_teacher.runtime.errors import UserError
from student_teacher.runtime.settings import option

PAINT = (124, 116, 104)  # the mean of ImageNet's pixels
MOST = 0.95  # of the image


def ignore_option() -> Any:
    """A field for --ignore; `load` reads it."""
    return option(
        None,
        f"an image that is white where nobody should look (default data/CATEGORY/{IGNORED}, if it is there)",
        type=Path,
        metavar="FILE",
    )


def load(category: Path, given: Path | None = None) -> np.ndarray | None:
    """The mask (h,w), true where to ignore: of the `given` file, or of the category's own; None where there is none.

    Raises UserError if it can't be read, or covers nothing or nearly everything.
    """
    path = given or category / IGNORED
    if given is None and not path.exists():
        return None
    mask = np.asarray(load_grey(path)) > 127
    if not 0 < mask.mean() <= MOST:
        raise UserError(f"{path}: {mask.mean():.0%} of it is white, which is what is ignored: above 0 and at most 95 %")
    return mask


def at(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The mask at an image's or a map's size (H,W)."""
    return np.asarray(Image.fromarray(mask).resize(size[::-1], Image.Resampling.NEAREST))


def painted_at(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """What is painted over in an image (H,W) that has been resized: a pixel more, where the edge has been blurred."""
    return ndimage.binary_dilation(at(mask, size), EIGHT_CONNECTED)


def painter(mask: np.ndarray | None) -> Callable[[Image.Image], Image.Image]:
    """A function that paints over what is ignored in an RGB picture; the picture itself stays as it is."""
    if mask is None:
        return lambda picture: picture
    covered = lru_cache(maxsize=1)(lambda size: Image.fromarray(painted_at(mask, size)))  # most images have one size

    def paint(picture):
        painted = picture.copy()
        painted.paste(PAINT, mask=covered(picture.size[::-1]))
        return painted

    return paint


def seen(mask: np.ndarray | None, size: tuple[int, int]) -> Tensor:
    """Which places of a map (H,W) count: bool."""
    return torch.ones(size, dtype=torch.bool) if mask is None else torch.from_numpy(~at(mask, size))


def digest_of(mask: np.ndarray) -> str:
    """What tells a mask from others."""
    return hashlib.sha256(f"{mask.shape}".encode() + mask.tobytes()).hexdigest()[:16]


def packed(mask: np.ndarray | None) -> Tensor | None:
    """The mask for a checkpoint, as the bytes of a PNG: uint8 (n,)."""
    if mask is None:
        return None
    return torch.frombuffer(bytearray(encoded(Image.fromarray(mask), "PNG")), dtype=torch.uint8)


def unpacked(content: Tensor | None) -> np.ndarray | None:
    """The inverse of `packed`."""
    if content is None:
        return None
    with Image.open(io.BytesIO(content.numpy().tobytes())) as picture:
        return np.array(picture, dtype=bool)
