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
    above = anomaly_map >= threshold
    rows, columns = (np.flatnonzero(above.any(axis)) for axis in (1, 0))
    if not len(rows):
        return []
    top, left = int(rows[0]), int(columns[0])
    part = anomaly_map[top : rows[-1] + 1, left : columns[-1] + 1]  # labels of a whole large image would take longer
    labels, _ = ndimage.label(part >= threshold, EIGHT_CONNECTED)
    boxes = enumerate(ndimage.find_objects(labels), 1)
    found = [_region(part[box], labels[box] == number, (top, left), box) for number, box in boxes]
    return sorted(found, key=lambda region: -region.peak)


def _region(scores, inside, corner, box):
    """The region `inside` (h,w) of a map's part with its upper left corner."""
    values, (height, width), area = scores[inside], inside.shape, int(inside.sum())
    top, left = (start + side.start for start, side in zip(corner, box, strict=True))
    centre = left + inside.sum(0) @ np.arange(width) / area, top + inside.sum(1) @ np.arange(height) / area
    highest, mean = float(values.max()), float(values.mean(dtype=np.float64))
    return AnomalousRegion(left, top, width, height, area, highest, mean, *map(float, centre))
