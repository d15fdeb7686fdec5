"""Regions of defects, and how much each of their pixels weighs in an overlap.

The per-region overlap (PRO) of MVTec AD takes the connected regions of a mask; a region counts as found by the share of
its pixels that is found. MVTec LOCO's saturated one (sPRO) takes one region a mask file, and a region counts as wholly
found from its saturation area on: of a missing object nobody can say which pixels are wrong, so a part of all places
where it could lie is enough (Bergmann, Batzner, Fauser, Sattlegger, Steger, "Beyond Dents and Scratches: Logical
Constraints in Unsupervised Anomaly Detection and Localization", IJCV 2022).

Both are sums of weights over the pixels that are found, the highest scores of a region first.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage

EIGHT_CONNECTED = np.ones((3, 3), dtype=bool)


class Region(NamedTuple):
    """One region of a defect; regions of an image may overlap."""

    pixels: np.ndarray  # (K,) their numbers in the image, row by row
    saturation: int  # from 1 to K: as many pixels as must be found


def saturation_area(area: int, threshold: float, relative: bool) -> int:
    """Of how many pixels a region must have for it to count as wholly found, from 1 to `area`.

    Equals MVTec LOCO's evaluation code, which rounds down; a region that this leaves with no pixel needs one.

    Args:
        area: pixels of the region, at least 1.
        threshold: of the kind of defect: a share of the area, in (0, 1], or a number of pixels.
        relative: whether it is a share.
    """
    return max(1, min(area, int(threshold * area) if relative else int(threshold)))


def connected(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """Of each pixel of a mask (H, W), row by row, 1 / size of its 8-connected region; and the number of regions."""
    labels, number = ndimage.label(mask, EIGHT_CONNECTED)
    labels = labels[mask != 0]
    return 1 / np.bincount(labels)[labels], number


def saturated(scores: np.ndarray, mask: np.ndarray, regions: Sequence[Region]) -> np.ndarray:
    """Of each pixel of a mask (H, W), row by row, its share of the saturated overlap with all regions together.

    The highest pixels of a region, as many as its saturation area, share it alike; the others add nothing. Which of
    several tied pixels these are makes no difference: a threshold finds all of them, or none.

    Raises:
        ValueError: the regions together are not the mask, or a saturation is no number of a region's pixels.
    """
    scores, weight, covered = scores.ravel(), np.zeros(mask.size), np.zeros(mask.size, dtype=bool)
    for pixels, saturation in regions:
        if not 1 <= saturation <= len(pixels):
            raise ValueError(f"a saturation of {saturation} pixels for a region of {len(pixels)}")
        covered[pixels] = True
        highest = np.argpartition(scores[pixels], len(pixels) - saturation)[len(pixels) - saturation :]
        weight[pixels[highest]] += 1 / saturation
    inside = mask.ravel() != 0
    if not np.array_equal(covered, inside):
        raise ValueError("the regions of a mask, taken together, are not the mask")
    return weight[inside]
