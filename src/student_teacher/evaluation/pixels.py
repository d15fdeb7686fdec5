"""The pixels of test images, sorted once for every measure."""

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from student_teacher.evaluation.regions import Region, connected, saturated

Maps = np.ndarray | Sequence[np.ndarray]
Masks = np.ndarray | Sequence[np.ndarray | None]
Regions = Sequence[Sequence[Region]]


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


def check(anomaly_maps: Maps, ground_truth: Masks) -> tuple[list[np.ndarray], list[np.ndarray | None]]:
    """Maps and masks as arrays.

    Raises:
        ValueError: sizes or lengths that differ, or a score that is not finite.
    """
    anomaly_maps = [np.asarray(scores) for scores in anomaly_maps]
    masks = [None if mask is None else np.asarray(mask) for mask in ground_truth]
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
) -> Pixels:
    """Sort the pixels of some images.

    Args:
        anomaly_maps, masks: as `check` returns them.
        regions: of each image, which together are its mask; none for one without a defect. None: not known.
        ignored: of each image, nonzero where pixels do not count. None: all count.

    Raises:
        ValueError: as `regions.saturated`.
    """
    # One empty array each, so that a group without images or without defects needs no case of its own.
    good, defects, weight, saturating = [np.empty(0, np.float32)], [], [np.empty(0)], [np.empty(0)]
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
            defects.append(scores.ravel()[:0])
            continue
        good.append(scores[counted & ~mask])
        defects.append(scores[mask])
        share, found = connected(mask)
        weight.append(share)
        number += found
        if regions is not None:
            saturating.append(saturated(scores, mask, of_image))
            saturating_number += len(of_image)
    sorted_good = np.concatenate(good)
    sorted_good.sort()
    overlaps = Overlap(np.concatenate(weight), number), Overlap(np.concatenate(saturating), saturating_number)
    return Pixels(sorted_good, defects, overlaps[0], None if regions is None else overlaps[1])
