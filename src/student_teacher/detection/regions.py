"""Connected regions of an anomaly map: where an image is anomalous, in numbers."""

from typing import NamedTuple

import numpy as np
from scipy import ndimage

from student_teacher.images.masks import EIGHT_CONNECTED


class AnomalousRegion(NamedTuple):
    """A connected region above the pixel threshold; lengths in pixels of the image, positions from its top left."""

    left: int
    top: int
    width: int
    height: int
    area: int  # pixels
    peak: float  # highest and mean score of its pixels
    mean: float
    centre_x: float  # mean position of its pixels
    centre_y: float

    def cells(self) -> list[str]:
        """Its numbers as texts, for a table."""
        return [f"{value:.6g}" if isinstance(value, float) else str(value) for value in self]


def regions_above(anomaly_map: np.ndarray, threshold: float) -> list[AnomalousRegion]:
    """The 8-connected regions of a map (H,W) from `threshold` on, the one with the highest peak first."""
    labels, _ = ndimage.label(anomaly_map >= threshold, EIGHT_CONNECTED)
    found = []
    for number, box in enumerate(ndimage.find_objects(labels), 1):
        inside = labels[box] == number
        values, (height, width) = anomaly_map[box][inside], inside.shape
        top, left = (side.start for side in box)
        area = len(values)
        centre = left + inside.sum(0) @ np.arange(width) / area, top + inside.sum(1) @ np.arange(height) / area
        scores = float(values.max()), float(values.mean(dtype=np.float64))
        found.append(AnomalousRegion(left, top, width, height, area, *scores, *map(float, centre)))
    return sorted(found, key=lambda region: -region.peak)
