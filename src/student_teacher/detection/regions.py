"""Connected regions of an anomaly map: where an image is anomalous, in numbers."""

from typing import NamedTuple

import numpy as np
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from student_teacher.images.masks import EIGHT_CONNECTED

BAND = 2**22  # pixels that are searched at once: labels of a whole line scan would take as much memory as its map


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


class _Part(NamedTuple):
    """What of a region lies in one band of a map; lengths and positions as above, right and bottom are outside."""

    left: int
    top: int
    right: int
    bottom: int
    area: int
    peak: float
    total: float  # sum of the scores, and of the positions, of its pixels
    total_x: int
    total_y: int


def regions_above(anomaly_map: np.ndarray, threshold: float) -> list[AnomalousRegion]:
    """The 8-connected regions of a map (H,W) from `threshold` on, the one with the highest peak first."""
    rows = max(1, BAND // max(1, anomaly_map.shape[1]))
    parts: list[_Part] = []
    nothing = np.zeros(anomaly_map.shape[1], int)
    touching, last_before = [np.empty((2, 0), int)], nothing  # of a row the numbers of its parts from 1, 0 elsewhere
    for top in range(0, len(anomaly_map), rows):
        band = anomaly_map[top : top + rows]
        above = band >= threshold
        if not above.any():
            last_before = nothing
            continue
        labels = _labelled(above)
        first, last = (np.where(labels[row], labels[row] + len(parts), 0) for row in (0, -1))
        touching.append(_touching(last_before, first))
        last_before = last
        boxes = enumerate(ndimage.find_objects(labels), 1)
        parts += [_part(band[box], labels[box] == number, top + box[0].start, box[1].start) for number, box in boxes]
    if not parts:
        return []
    pairs = np.concatenate(touching, axis=1) - 1
    graph = coo_array((np.ones(pairs.shape[1]), tuple(pairs)), shape=(len(parts), len(parts)))
    joined: dict[int, list[_Part]] = {}
    for part, number in zip(parts, connected_components(graph, directed=False)[1].tolist(), strict=True):
        joined.setdefault(number, []).append(part)
    return sorted(map(_region, joined.values()), key=lambda region: -region.peak)


def _labelled(above):
    """The labels (h,w) of 8-connected regions; only the box that holds them all is searched, which is faster."""
    labels = np.zeros(above.shape, np.int32)
    rows, columns = (np.flatnonzero(above.any(axis)) for axis in (1, 0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    labels[box] = ndimage.label(above[box], EIGHT_CONNECTED)[0]
    return labels


def _touching(upper, lower):
    """Pairs (2,n) of what touches, corners included, in two rows (W,) that lie one below the other; 0 is nothing."""
    shifted = [(upper, lower), (upper[1:], lower[:-1]), (upper[:-1], lower[1:])]
    pairs = np.concatenate([np.stack(pair) for pair in shifted], axis=1)
    pairs = pairs[:, pairs.all(axis=0)]
    return pairs[:, np.append(True, np.diff(pairs).any(axis=0))[: pairs.shape[1]]]  # one of each run


def _part(scores, inside, top, left):
    """The region `inside` (h,w) of a band's box with its upper left corner."""
    values, (height, width) = scores[inside], inside.shape
    area = len(values)
    total_x, total_y = (
        int(inside.sum(axis) @ np.arange(length)) + start * area
        for axis, length, start in ((0, width, left), (1, height, top))
    )
    sums = float(values.sum(dtype=np.float64)), total_x, total_y
    return _Part(left, top, left + width, top + height, area, float(values.max()), *sums)


def _region(parts):
    """The parts of a region together."""
    lefts, tops, rights, bottoms, areas, peaks, *totals = zip(*parts, strict=True)
    left, top, area = min(lefts), min(tops), sum(areas)
    total, total_x, total_y = map(sum, totals)
    # Exact: whole numbers up to the division.
    centre = left + (total_x - left * area) / area, top + (total_y - top * area) / area
    return AnomalousRegion(left, top, max(rights) - left, max(bottoms) - top, area, max(peaks), total / area, *centre)
