"""What masks of defects may hide: grey traces of compression, specks, and black that stands for white."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from student_teacher.images.folders import listed
from student_teacher.images.reading import graded_mask

EIGHT_CONNECTED = np.ones((3, 3), dtype=bool)
SPECK = 4  # pixels: a region with fewer is hardly a defect that someone has drawn
LEAST_HALF = 16  # brightest values below twice this are numbers of kinds, as in VisA, not shades of grey
MOST_COVERED = 0.5  # of the image: more of it is rarely defective


class Mask(NamedTuple):
    """What was found in a mask."""

    size: tuple[int, int]  # height and width
    area: int  # pixels that it marks
    regions: int
    specks: int  # regions of fewer than SPECK pixels
    grey: int  # marked pixels that are darker than the brightest one
    half: float  # of its brightest value
    half_area: int  # pixels and regions that are brighter than that
    half_regions: int


def look_at_mask(path: Path, threshold: float | None = None) -> Mask:
    """Read a mask as `load_mask` does, and count. Raises UserError as that."""
    values, marked = graded_mask(path, threshold)
    brightest = values.max(initial=0)
    labels, regions = ndimage.label(marked, EIGHT_CONNECTED)
    bright = marked & (values > brightest / 2)
    return Mask(
        size=marked.shape,
        area=int(marked.sum()),
        regions=regions,
        specks=int((np.bincount(labels.ravel())[1:] < SPECK).sum()),
        grey=int((marked & (values < brightest)).sum()),
        half=float(brightest) / 2,
        half_area=int(bright.sum()),
        half_regions=ndimage.label(bright, EIGHT_CONNECTED)[1],
    )


def warnings_of(masks: Sequence[tuple[str, Mask]], thresholded: bool) -> list[str]:
    """What is odd about masks, given by name, in lines with numbers; `thresholded`: the user has chosen one."""
    lines = [f"{name}: marks nothing, so the defect has no pixels to be found" for name, mask in masks if not mask.area]
    grey = (
        []
        if thresholded
        else [(name, mask) for name, mask in masks if mask.half_area < mask.area and mask.half >= LEAST_HALF]
    )
    if grey:
        area, half, shades, regions, half_regions = (
            sum(getattr(mask, value) for _, mask in grey)
            for value in ("area", "half_area", "grey", "regions", "half_regions")
        )
        lines.append(
            f"grey values in {len(grey)} of {len(masks)} masks, of compression or of soft edges? They count as "
            f"defects, {shades / area:.0%} of the pixels marked. --mask-threshold "
            f"{int(max(mask.half for _, mask in grey))} would leave {half_regions} of {regions} regions and "
            f"{half / area:.0%} of the area: {listed([name for name, _ in grey])}"
        )
    specks = [(name, mask.specks) for name, mask in masks if mask.specks]
    if specks:
        lines.append(
            f"{sum(number for _, number in specks)} regions of fewer than {SPECK} pixels, each a defect of its own for "
            f"AU-PRO, in {len(specks)} masks: {listed([name for name, _ in specks])}"
        )
    covered = [(name, mask.area / np.prod(mask.size)) for name, mask in masks]
    covered = [f"{name} ({share:.0%})" for name, share in covered if share > MOST_COVERED]
    if covered:
        lines.append(f"more than half of the image marked, black and white exchanged? {listed(covered)}")
    return lines
