"""The pixels of test images, sorted once for every measure."""

import tempfile
from bisect import bisect_left
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from student_teacher.evaluation.regions import Region, connected, saturated

Maps = np.ndarray | Sequence[np.ndarray]
Masks = np.ndarray | Sequence[np.ndarray | None]
Regions = Sequence[Sequence[Region]]


class OnDemand(Sequence):
    """A sequence whose elements `read(number)` gives whenever they are asked for; none is kept."""

    def __init__(self, read: Callable[[int], np.ndarray], length: int):
        self._read, self._length = read, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number: int) -> np.ndarray:
        if not 0 <= number < self._length:
            raise IndexError(number)
        return self._read(number)


class Overlap(NamedTuple):
    """How much pixels of defects weigh in the mean overlap with the regions; a region's weights add up to 1."""

    weight: np.ndarray  # for each pixel
    regions: int


class Pixels(NamedTuple):
    """The pixels of some images."""

    good: np.ndarray  # scores, sorted
    defects: list[np.ndarray]  # scores, in any order: of each image, none where it has no defect
    overlap: Overlap  # with connected regions, of the pixels of `defects` one after another
    saturated: Overlap | None  # with regions that saturate; None where they are not known

    def at_or_above(self, threshold: float) -> tuple[int, int]:
        """How many pixels of defects, and how many good ones, are found at a threshold."""
        found = sum(int(np.count_nonzero(scores >= threshold)) for scores in self.defects)
        # Not searchsorted, which would turn all scores into the threshold's type.
        return found, len(self.good) - bisect_left(self.good, threshold)


def check(anomaly_maps: Maps, ground_truth: Masks) -> tuple[Sequence[np.ndarray], Sequence[np.ndarray | None]]:
    """Maps and masks as arrays, on demand.

    Raises:
        ValueError: sizes or lengths that differ, or a score that is not finite.
    """
    given = anomaly_maps
    anomaly_maps = OnDemand(lambda number: np.asarray(given[number]), len(given))
    masks = OnDemand(
        lambda number: None if (mask := ground_truth[number]) is None else np.asarray(mask), len(ground_truth)
    )
    if len(anomaly_maps) != len(masks):
        raise ValueError(f"{len(anomaly_maps)} anomaly maps, but {len(masks)} masks")
    for index, (scores, mask) in enumerate(zip(anomaly_maps, masks, strict=True)):
        if scores.ndim != 2:
            raise ValueError(f"anomaly map {index} has the shape {scores.shape}, not (H, W)")
        if mask is not None and mask.shape != scores.shape:
            raise ValueError(f"anomaly map {index} has the shape {scores.shape}, its mask {mask.shape}")
        if not np.isfinite(scores).all():
            raise ValueError(f"anomaly map {index} holds a value that is not a finite number")
    return anomaly_maps, masks


def gather(
    anomaly_maps: Sequence[np.ndarray],
    masks: Sequence[np.ndarray | None],
    regions: Regions | None = None,
    ignored: Sequence[np.ndarray] | None = None,
    *,
    on_disk: Path | None = None,
) -> Pixels:
    """Sort the pixels of some images.

    Args:
        anomaly_maps, masks: as `check` returns them.
        regions: of each image, which together are its mask; none for one without a defect. None: not known.
        ignored: of each image, nonzero where pixels do not count. None: all count.
        on_disk: a folder for a nameless file with the good pixels. None: they are kept in memory.

    Raises:
        ValueError: as `regions.saturated`.
    """
    # One empty array each, so that a group without images or without defects needs no case of its own.
    good, defects, weight, saturating = _Joined(on_disk), [], [np.empty(0)], [np.empty(0)]
    number = saturating_number = 0
    for index, (scores, mask) in enumerate(zip(anomaly_maps, masks, strict=True)):
        of_image = regions[index] if regions is not None else ()
        counted = np.ones(scores.shape, dtype=bool) if ignored is None else ignored[index] == 0
        mask = np.zeros_like(counted) if mask is None else (mask != 0) & counted
        if ignored is not None:
            of_image = [part for region in of_image if len((part := region.within(counted)).pixels)]
        if not mask.any():
            if len(of_image):
                raise ValueError("an image has regions, but no mask")
            good.append(scores[counted])
            defects.append(scores.ravel()[:0].copy())  # a view would keep the whole map
            continue
        good.append(scores[counted & ~mask])
        defects.append(scores[mask])
        share, found = connected(mask)
        weight.append(share)
        number += found
        if regions is not None:
            saturating.append(saturated(scores, mask, of_image))
            saturating_number += len(of_image)
    sorted_good = good.array()
    sorted_good.sort()
    overlaps = Overlap(np.concatenate(weight), number), Overlap(np.concatenate(saturating), saturating_number)
    return Pixels(sorted_good, defects, overlaps[0], None if regions is None else overlaps[1])


class _Joined:
    """Arrays, one after another, in memory or in a nameless file in a folder."""

    def __init__(self, folder):
        self._parts = [np.empty(0, np.float32)]
        self._file = None if folder is None else tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed with us)
        self._type = None

    def append(self, part):
        if self._file is None:
            self._parts.append(part)
            return
        if self._type not in (None, part.dtype):
            raise ValueError(f"maps of {self._type} and of {part.dtype} can't be kept in one file")
        self._type = part.dtype
        self._file.write(np.ascontiguousarray(part).data)

    def array(self):
        if self._file is None:
            return np.concatenate(self._parts)
        self._file.flush()
        return np.memmap(self._file, self._type, "r+") if self._file.tell() else self._parts[0]
