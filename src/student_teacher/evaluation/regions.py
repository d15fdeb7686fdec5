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
    """One region of a defect, and when it saturates; regions of an image may overlap."""

    pixels: np.ndarray  # (K,) their numbers in the image, row by row
    threshold: float = 1.0  # a share of the region, in (0, 1], or a number of pixels
    relative: bool = True  # whether it is a share

    def within(self, counted: np.ndarray) -> "Region":
        """What of it lies where pixels count (H, W)."""
        return self._replace(pixels=self.pixels[counted.ravel()[self.pixels]])

    @property
    def saturation(self) -> int:
        """How many pixels must be found, 1 to K: rounded down, as in MVTec LOCO's evaluation code, but at least one."""
        area = len(self.pixels)
        return max(1, min(area, int(self.threshold * area if self.relative else self.threshold)))


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
        ValueError: the regions together are not the mask, or one has no pixel.
    """
    scores, weight, covered = scores.ravel(), np.zeros(mask.size), np.zeros(mask.size, dtype=bool)
    for region in regions:
        if not len(region.pixels):
            raise ValueError("a region has no pixel")
        covered[region.pixels] = True
        lower = len(region.pixels) - region.saturation  # so many pixels add nothing
        highest = np.argpartition(scores[region.pixels], lower)[lower:] if lower else slice(None)
        weight[region.pixels[highest]] += 1 / region.saturation
    inside = mask.ravel() != 0
    if not np.array_equal(covered, inside):
        raise ValueError("the regions of a mask, taken together, are not the mask")
    return weight[inside]
