"""Images as programs hold them: arrays and tensors, in the order red, green, blue."""

from typing import Any

import numpy as np
from PIL import Image

from student_teacher.images.reading import FULL_16_BIT, ValueRange, as_rgb, to_8_bit
from student_teacher.runtime.errors import UserError

TAKEN = (
    "a detector takes a file's path, a Pillow picture, or an array or tensor of one image, RGB or grey: (H,W), "
    "(H,W,3), (3,H,W), with 1 in place of 3 for grey, or with 4 in uint8 for opacity"
)


def picture_of(image: Any, value_range: ValueRange | None = None) -> Image.Image:
    """An image as RGB picture: a Pillow picture, or an array or tensor of the shapes that TAKEN names.

    uint8 is taken as it is, bool as black and white. Of other types the values of `value_range` become 0 to 255, as in
    files; None stands for 0 to 65535 in uint16. Raises UserError, with what is taken, for all else.
    """
    if isinstance(image, Image.Image):
        return as_rgb(image, value_range)
    if hasattr(image, "numpy") and hasattr(image, "detach"):  # a tensor, on any device
        image = image.detach().cpu().numpy()
    if not isinstance(image, np.ndarray):
        raise UserError(f"{type(image).__name__}: {TAKEN}")
    pixels = _channels_last(image)
    if pixels.dtype == bool:
        pixels = pixels * np.uint8(255)
    elif pixels.dtype != np.uint8:
        pixels = to_8_bit(pixels, _range_for(pixels, value_range))
    return as_rgb(Image.fromarray(np.ascontiguousarray(pixels)))


def _channels_last(image):
    """(H,W), (H,W,3) or (H,W,4) of an array; raises UserError for other shapes."""
    pixels = image
    if image.ndim == 3 and image.shape[-1] not in (1, 3, 4) and image.shape[0] in (1, 3, 4):
        pixels = np.moveaxis(image, 0, -1)
    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    fits = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[-1] in ((3, 4) if image.dtype == np.uint8 else (3,)))
    if not fits or pixels.size == 0:
        raise UserError(f"an array {tuple(image.shape)} of {image.dtype}: {TAKEN}")
    return pixels


def _range_for(pixels, value_range):
    if not np.issubdtype(pixels.dtype, np.number) or np.iscomplexobj(pixels):
        raise UserError(f"an array of {pixels.dtype}: {TAKEN}")
    if value_range is None and pixels.dtype != np.uint16:
        raise UserError(
            f"an array of {pixels.dtype}: which values are black and white is known from training images of more than "
            "8 bits alone, and this detector had none; convert it to uint8, 0 to 255"
        )
    return value_range or FULL_16_BIT
