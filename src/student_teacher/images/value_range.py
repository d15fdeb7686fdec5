"""The values that become black and white, one pair for all images of a category that have more than 8 bits."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from student_teacher.images.reading import ValueRange

INTEGER_BITS = (8, 10, 12, 14, 16, 32)  # of cameras
USUAL_TOPS = (1, 255, 1023, 4095, 16383, 65535)  # of floating-point values from 0
MARGIN = 0.1  # of the span of other values, to each side: a defect may lie beyond what good parts show


class Extremes(NamedTuple):
    """The lowest and highest value of an image."""

    low: float
    high: float
    integers: bool
    finite: bool = True  # whether all values are


def extremes_of(values: np.ndarray) -> Extremes:
    """Of an image of any shape; values that are not finite do not count."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    return Extremes(low, high, bool(np.issubdtype(values.dtype, np.integer)), finite.size == values.size)


def common_range(images: Sequence[Extremes]) -> ValueRange:
    """The range of a category's training images, of integers all or of none.

    Integers from 0: to 2^bits - 1, of the fewest usual bits that hold all. Floating-point values from 0: to the usual
    top of which they span a quarter or more. Others: from the lowest to the highest, and MARGIN more.
    """
    low, high = min(image.low for image in images), max(image.high for image in images)
    if images[0].integers:
        tops = [2**bits - 1 for bits in INTEGER_BITS if low >= 0 and high < 2**bits]
    else:  # resampling overshoots: a little beyond is still within
        tops = [top for top in USUAL_TOPS if low >= -0.05 * top and high <= 1.05 * top and high - low > 0.25 * top]
    if tops:
        return 0, tops[0]
    margin = MARGIN * (high - low) or 1.0
    step = 10.0 ** (math.floor(math.log10(margin)) - 1)  # shown with few digits
    return math.floor((low - margin) / step) * step, math.ceil((high + margin) / step) * step
