"""The measures of anomaly detection, exact over every threshold.

An image or a pixel counts as found where its score is at or above the threshold. Every measure here follows from three
counts at each distinct score of the anomalous: how many anomalous and how many good lie at or above it, and how many
good lie above it. Between two such scores only good pixels are added, so every curve is a straight line there and no
threshold is left out. The good pixels, nearly all there are, are sorted once; ties count as one threshold.

PRO and its area: Bergmann, Batzner, Fauser, Sattlegger, Steger, "The MVTec Anomaly Detection Dataset", IJCV 2021,
and the evaluation code published with the dataset, whose figures these equal.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

AU_PRO_LIMIT = 0.3  # the limit of Bergmann et al., CVPR 2020 and IJCV 2021
AU_PRO_STRICT_LIMIT = 0.05

EIGHT_CONNECTED = np.ones((3, 3), dtype=bool)

IMAGE_MEASURES = ("image_au_roc", "image_average_precision", "image_best_f1", "image_best_f1_threshold")
PIXEL_MEASURES = (
    "pixel_au_roc",
    "au_pro",
    "au_pro_0.05",
    "pixel_average_precision",
    "pixel_best_f1",
    "pixel_best_f1_threshold",
)
ALL = None  # the kind that stands for all of them
NO_ANOMALOUS_IMAGES = "there are no anomalous test images"

Maps = np.ndarray | Sequence[np.ndarray]
Masks = np.ndarray | Sequence[np.ndarray | None]
Curve = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class ThresholdCounts:
    """What is found at each of T thresholds: the distinct scores of the anomalous, from high to low.

    Attributes:
        thresholds: (T,) scores.
        true_positives: (T,) anomalous at or above the threshold.
        false_positives: (T,) good at or above the threshold.
        false_positives_above: (T,) good above the threshold; the difference to `false_positives` are ties.
        overlap: (T,) mean over the defect regions of the share found, in [0, 1]; None for image scores.
        positives, negatives: the number of anomalous and of good, both above 0.
    """

    thresholds: np.ndarray
    true_positives: np.ndarray
    false_positives: np.ndarray
    false_positives_above: np.ndarray
    overlap: np.ndarray | None
    positives: int
    negatives: int

    def au_roc(self) -> float:
        """Area under the ROC curve: how often an anomalous one scores above a good one, ties counted half."""
        above = self.negatives - 0.5 * (self.false_positives + self.false_positives_above)
        return float(np.dot(self._newly_found(), above) / (self.positives * self.negatives))

    def average_precision(self) -> float:
        """Sum of the precisions at each threshold, weighted by the recall gained there (no interpolation)."""
        precision = self.true_positives / (self.true_positives + self.false_positives)
        return float(np.dot(self._newly_found(), precision) / self.positives)

    def best_f1(self) -> tuple[float, float]:
        """Return the highest F1 over all thresholds and the highest threshold (score >= threshold) that gives it."""
        f1 = 2 * self.true_positives / (self.positives + self.true_positives + self.false_positives)
        best = int(np.argmax(f1))
        return float(f1[best]), float(self.thresholds[best])

    def roc_curve(self) -> Curve:
        """Return the corners of the ROC curve, (fpr, tpr), from (0, 0) to (1, 1)."""
        return self._corners(self.true_positives / self.positives)

    def pro_curve(self) -> Curve:
        """Return the corners of the PRO curve, (fpr, pro), from (0, 0) to (1, 1); for pixels only."""
        return self._corners(self.overlap)

    def _newly_found(self) -> np.ndarray:
        return np.diff(self.true_positives, prepend=0)

    def _corners(self, found: np.ndarray) -> Curve:
        # At each threshold the curve first runs level, over the good ones above it, then climbs to include it:
        # straight up, or aslant where good ones tie with it.
        fpr = np.empty(2 * len(found) + 2)
        fpr[0], fpr[-1] = 0, 1
        fpr[1:-1:2] = self.false_positives_above / self.negatives
        fpr[2:-1:2] = self.false_positives / self.negatives
        rate = np.empty_like(fpr)
        rate[0], rate[-1] = 0, 1
        rate[1:-1:2] = np.concatenate(([0], found[:-1]))
        rate[2:-1:2] = found
        return fpr, rate


def au_roc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve, in [0, 1], ties counted half; arguments and errors as in `count_scores`."""
    return count_scores(scores, labels).au_roc()


def count_scores(scores: np.ndarray, labels: np.ndarray) -> ThresholdCounts:
    """Sort scores once, for every measure and curve of images.

    Args:
        scores: (N,) anomaly scores, the higher the more anomalous.
        labels: (N,) zero for good, anything else for anomalous.

    Raises:
        ValueError: one of the two classes is empty, the lengths differ or a score is not finite.
    """
    scores, anomalous = _check_scores(scores, labels)
    return _count([np.sort(scores[~anomalous])], scores[anomalous], None)


def pro_curve(anomaly_maps: Maps, ground_truth: Masks) -> Curve:
    """Per-region overlap against the false positive rate over all thresholds (Bergmann et al., IJCV 2021).

    The overlap is the mean over all defect regions, 8-connected, of the share of their pixels that is found. The false
    positive rate is over all pixels outside of the regions, of good and defective images alike.

    Args:
        anomaly_maps: (N, H, W), or N maps (H, W) of any sizes; the higher the more anomalous.
        ground_truth: masks of the same sizes, nonzero on defects; empty or None where there is none.

    Returns:
        fpr, pro: the corners of the curve, from (0, 0) to (1, 1); linear between them, at most two for a distinct
        score of a defect pixel.

    Raises:
        ValueError: no defect pixel or no good pixel at all, sizes that differ, or a score that is not finite.
    """
    return count_pixels(anomaly_maps, ground_truth).pro_curve()


def au_pro(anomaly_maps: Maps, ground_truth: Masks, fpr_limit: float = AU_PRO_LIMIT) -> float:
    """Area under the PRO curve up to a false positive rate, divided by it: in [0, 1].

    Equals the AU-PRO of MVTec AD's evaluation code: exact over all thresholds, interpolated at the limit. For several
    limits take `pro_curve` once and `area_under_curve` for each.

    Args:
        anomaly_maps, ground_truth: as in `pro_curve`.
        fpr_limit: in (0, 1].

    Raises:
        ValueError: as in `pro_curve`, or a limit outside of (0, 1].
    """
    return area_under_curve(*pro_curve(anomaly_maps, ground_truth), fpr_limit)


def area_under_curve(fpr: np.ndarray, rate: np.ndarray, fpr_limit: float = 1.0) -> float:
    """Area under a piecewise linear curve from 0 to `fpr_limit`, divided by the limit.

    Args:
        fpr: (K,) ascending from 0 to 1, repeated where the curve is vertical.
        rate: (K,) the curve's height at each.
        fpr_limit: in (0, 1]; between two points the curve is interpolated.

    Raises:
        ValueError: the limit lies outside of (0, 1].
    """
    if not 0 < fpr_limit <= 1:
        raise ValueError(f"the limit of the false positive rate is {fpr_limit}, not above 0 and at most 1")
    end = np.searchsorted(fpr, fpr_limit, side="right")
    at_limit = np.interp(fpr_limit, fpr[end - 1 : end + 1], rate[end - 1 : end + 1])
    area = np.trapezoid(rate[:end], fpr[:end]) + (fpr_limit - fpr[end - 1]) * (rate[end - 1] + at_limit) / 2
    return float(area / fpr_limit)


def count_pixels(anomaly_maps: Maps, ground_truth: Masks) -> ThresholdCounts:
    """Sort all pixels once, for every pixel measure and curve; arguments and errors as in `pro_curve`."""
    pixels = _gather_pixels(*_check_maps(anomaly_maps, ground_truth))
    if pixels.regions == 0:
        raise ValueError("the masks hold no defect pixel: the measure needs defect and good pixels")
    if len(pixels.good) == 0:
        raise ValueError("the masks leave no good pixel: the measure needs defect and good pixels")
    return _count_pixels([pixels])


@dataclass(frozen=True)
class _Pixels:
    """The pixels of some images."""

    good: np.ndarray  # scores, sorted
    defect: np.ndarray  # scores, in any order
    weight: np.ndarray  # for each of `defect`: 1 / size of its region
    regions: int


class Evaluation:
    """Every measure and curve of one category's test set, from one sort of its pixels."""

    def __init__(
        self,
        anomaly_maps: Maps,
        ground_truth: Masks | None,
        image_scores: np.ndarray,
        labels: np.ndarray,
        kinds: Sequence[str],
    ):
        """Count the scores of N test images.

        Args:
            anomaly_maps: (N, H, W), or N maps (H, W) of any sizes.
            ground_truth: masks of the same sizes, nonzero on defects; None for a good image, or None for a category
                without masks. A defective image's mask may be empty: the image counts as anomalous, its pixels as good.
                None for a defective image: where the defect lies is not known, so its pixels do not count.
            image_scores: (N,) finite.
            labels: (N,) zero for good, anything else for anomalous.
            kinds: (N,) the kind of defect; not looked at for good images.

        Raises:
            ValueError: lengths or sizes that differ, a score that is not finite, or a good image with a mask that is
                not empty.
        """
        self._scores = np.asarray(image_scores, dtype=np.float64)
        self._anomalous = np.asarray(labels) != 0
        self._kinds = np.array([str(kind) for kind in kinds])
        lengths = {len(anomaly_maps), len(self._scores), len(self._anomalous), len(self._kinds)}
        if len(lengths) > 1:
            raise ValueError(
                f"{len(anomaly_maps)} anomaly maps, {len(self._scores)} image scores, {len(self._anomalous)} labels "
                f"and {len(self._kinds)} kinds must be as many"
            )
        if not np.isfinite(self._scores).all():
            raise ValueError("an image score is not a finite number")
        self.kinds: list[str] = [str(kind) for kind in np.unique(self._kinds[self._anomalous])]
        self._unmasked = np.zeros(len(self._anomalous), dtype=bool)
        pixels = None if ground_truth is None else self._gather(anomaly_maps, ground_truth)
        # For the whole set (ALL) and each kind: the counts, or in their place why there are none.
        self._images = {kind: self._count_images(kind) for kind in (ALL, *self.kinds)}
        self._pixels = {kind: self._count_pixels(pixels, kind) for kind in (ALL, *self.kinds)}

    def measures(self) -> dict:
        """Return every measure that exists, over all images and for each kind of defect against the good ones.

        Returns:
            A dict that `json` can write: `IMAGE_MEASURES` and `PIXEL_MEASURES` as floats (AU-PRO up to a false positive
            rate of 0.3 as `au_pro` and of 0.05 as `au_pro_0.05`), `au_pro_limit`, the counts `good_images`,
            `anomalous_images` and, where some have none, `anomalous_images_without_mask`, `missing` with a reason for
            each measure that does not exist and is left out, and `kinds`: for each kind the same measures, counts and
            `missing`, over that kind's images and the good ones.
        """
        result = self._measures_of(ALL)
        result["au_pro_limit"] = AU_PRO_LIMIT
        result["kinds"] = {kind: self._measures_of(kind) for kind in self.kinds}
        return result

    def image_roc_curve(self) -> Curve | None:
        """Return the corners of the images' ROC curve, (fpr, tpr), or None where there is none."""
        counts = self._images[ALL]
        return None if isinstance(counts, str) else counts.roc_curve()

    def pixel_roc_curve(self) -> Curve | None:
        """Return the corners of the pixels' ROC curve, (fpr, tpr), or None where there is none."""
        counts = self._pixels[ALL]
        return None if isinstance(counts, str) else counts.roc_curve()

    def pro_curve(self) -> Curve | None:
        """Return the corners of the PRO curve, (fpr, pro), or None where there is none."""
        counts = self._pixels[ALL]
        return None if isinstance(counts, str) else counts.pro_curve()

    def _members(self, kind: str | None) -> np.ndarray:
        return self._anomalous if kind is ALL else self._anomalous & (self._kinds == kind)

    def _gather(self, anomaly_maps: Maps, ground_truth: Masks) -> list[_Pixels]:
        """Sort the pixels of the good images and of each kind apart, so that each kind can be set against the good."""
        anomaly_maps, masks = _check_maps(anomaly_maps, ground_truth)
        for index, mask in enumerate(masks):
            if not self._anomalous[index] and mask is not None and mask.any():
                raise ValueError(f"image {index} is labelled good and has a mask that is not empty")
        self._unmasked = self._anomalous & [mask is None for mask in masks]
        members = (~self._anomalous, *map(self._members, self.kinds))
        groups = [np.flatnonzero(group & ~self._unmasked) for group in members]
        return [_gather_pixels([anomaly_maps[i] for i in group], [masks[i] for i in group]) for group in groups]

    def _count_images(self, kind: str | None) -> ThresholdCounts | str:
        if not self._anomalous.any():
            return NO_ANOMALOUS_IMAGES
        if self._anomalous.all():
            return "there are no good test images"
        taken = ~self._anomalous | self._members(kind)
        return count_scores(self._scores[taken], self._anomalous[taken])

    def _count_pixels(self, pixels: list[_Pixels] | None, kind: str | None) -> ThresholdCounts | str:
        if not self._anomalous.any():
            return NO_ANOMALOUS_IMAGES
        if pixels is None or self._unmasked[self._members(kind)].all():
            return "there are no ground truth masks"
        groups = pixels if kind is ALL else [pixels[0], pixels[1 + self.kinds.index(kind)]]
        if not any(group.regions for group in groups):
            return "all ground truth masks are empty"
        if not any(len(group.good) for group in groups):
            return "the ground truth masks leave no good pixel"
        return _count_pixels(groups)

    def _measures_of(self, kind: str | None) -> dict:
        result = {"good_images": int(np.sum(~self._anomalous)), "anomalous_images": int(self._members(kind).sum())}
        if unmasked := int(self._unmasked[self._members(kind)].sum()):
            result["anomalous_images_without_mask"] = unmasked
        missing = {}
        images, pixels = self._images[kind], self._pixels[kind]
        if isinstance(images, str):
            missing.update(dict.fromkeys(IMAGE_MEASURES, images))
        else:
            values = (images.au_roc(), images.average_precision(), *images.best_f1())
            result.update(zip(IMAGE_MEASURES, values, strict=True))
        if isinstance(pixels, str):
            missing.update(dict.fromkeys(PIXEL_MEASURES, pixels))
        else:
            areas = [area_under_curve(*pixels.pro_curve(), limit) for limit in (AU_PRO_LIMIT, AU_PRO_STRICT_LIMIT)]
            values = (pixels.au_roc(), *areas, pixels.average_precision(), *pixels.best_f1())
            result.update(zip(PIXEL_MEASURES, values, strict=True))
        return result | {"missing": missing}


def _gather_pixels(anomaly_maps: Sequence[np.ndarray], masks: Sequence[np.ndarray | None]) -> _Pixels:
    # One empty array each, so that a group without images or without defects needs no case of its own.
    good, defect, weight, regions = [np.empty(0, np.float32)], [np.empty(0, np.float32)], [np.empty(0)], 0
    for scores, mask in zip(anomaly_maps, masks, strict=True):
        if mask is None or not mask.any():
            good.append(scores.ravel())
            continue
        mask = mask != 0
        good.append(scores[~mask])
        defect.append(scores[mask])
        labels, count = ndimage.label(mask, EIGHT_CONNECTED)
        labels = labels[mask]
        weight.append(1 / np.bincount(labels)[labels])
        regions += count
    sorted_good = np.concatenate(good)
    sorted_good.sort()
    return _Pixels(sorted_good, np.concatenate(defect), np.concatenate(weight), regions)


def _count_pixels(groups: Sequence[_Pixels]) -> ThresholdCounts:
    defect = np.concatenate([group.defect for group in groups])
    weight = np.concatenate([group.weight for group in groups])
    return _count([group.good for group in groups], defect, weight / sum(group.regions for group in groups))


def _count(good: Sequence[np.ndarray], anomalous: np.ndarray, weight: np.ndarray | None) -> ThresholdCounts:
    """Count at each distinct score of `anomalous`; `good` are sorted arrays, `weight` sums to 1."""
    order = np.argsort(anomalous)[::-1]
    scores = anomalous[order]
    last_of_ties = np.append(np.flatnonzero(scores[1:] != scores[:-1]), len(scores) - 1)
    thresholds = scores[last_of_ties]
    negatives = sum(map(len, good))
    overlap = None
    if weight is not None:
        overlap = np.cumsum(weight[order])[last_of_ties]
        overlap /= overlap[-1]  # 1, but for rounding
    ascending = thresholds[::-1]  # searchsorted runs through memory in one direction: several times as fast
    below = sum(np.searchsorted(group, ascending, side="left") for group in good)[::-1]
    up_to = sum(np.searchsorted(group, ascending, side="right") for group in good)[::-1]
    return ThresholdCounts(
        thresholds, last_of_ties + 1, negatives - below, negatives - up_to, overlap, len(scores), negatives
    )


def _check_scores(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scores, anomalous = np.asarray(scores), np.asarray(labels) != 0
    if scores.ndim != 1 or scores.shape != anomalous.shape:
        raise ValueError(f"scores {scores.shape} and labels {anomalous.shape} must be two lists of one length")
    if not np.isfinite(scores).all():
        raise ValueError("a score is not a finite number")
    if not anomalous.any():
        raise ValueError("no label is anomalous: the measure needs good and anomalous ones")
    if anomalous.all():
        raise ValueError("no label is good: the measure needs good and anomalous ones")
    return scores, anomalous


def _check_maps(anomaly_maps: Maps, ground_truth: Masks) -> tuple[list[np.ndarray], list[np.ndarray | None]]:
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
