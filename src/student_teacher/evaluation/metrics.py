"""The measures of anomaly detection, exact over every threshold.

An image or a pixel counts as found where its score is at or above the threshold. Every measure here follows from three
counts at each distinct score of the anomalous: how many anomalous and how many good lie at or above it, and how many
good lie above it. Between two such scores only good pixels are added, so every curve is a straight line there and no
threshold is left out. The good pixels, nearly all there are, are sorted once; ties count as one threshold.

PRO and its area: Bergmann, Batzner, Fauser, Sattlegger, Steger, "The MVTec Anomaly Detection Dataset", IJCV 2021,
and the evaluation code published with the dataset, whose figures these equal. The saturated PRO: `regions`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from student_teacher.evaluation.pixels import Maps, Masks, Pixels, Regions, check, gather

AU_PRO_LIMIT = 0.3  # the limit of Bergmann et al., CVPR 2020 and IJCV 2021
AU_PRO_STRICT_LIMIT = 0.05  # that of MVTec LOCO and of MVTec AD 2

Curve = tuple[np.ndarray, np.ndarray]


class Curves(NamedTuple):
    """A test set's curves: ROC as (fpr, tpr), PRO as (fpr, pro); None where there is none."""

    image_roc: Curve | None = None
    pixel_roc: Curve | None = None
    pro: Curve | None = None


@dataclass(frozen=True)
class ThresholdCounts:
    """What is found at each of T thresholds: the distinct scores of the anomalous, from high to low.

    Attributes:
        thresholds: (T,) scores.
        true_positives: (T,) anomalous at or above the threshold.
        false_positives: (T,) good at or above the threshold.
        false_positives_above: (T,) good above the threshold; the difference to `false_positives` are ties.
        overlap: (T,) mean over the defect regions of the share found, in [0, 1]; None for image scores.
        saturated_overlap: (T,) the same with regions that saturate; None where they are not known.
        positives, negatives: the number of anomalous and of good, both above 0.
    """

    thresholds: np.ndarray
    true_positives: np.ndarray
    false_positives: np.ndarray
    false_positives_above: np.ndarray
    overlap: np.ndarray | None
    saturated_overlap: np.ndarray | None
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
        values = f1(self.true_positives, self.false_positives, self.positives)
        best = int(np.argmax(values))
        return float(values[best]), float(self.thresholds[best])

    def roc_curve(self) -> Curve:
        """Return the corners of the ROC curve, (fpr, tpr), from (0, 0) to (1, 1)."""
        return self._corners(self.true_positives / self.positives)

    def pro_curve(self) -> Curve:
        """Return the corners of the PRO curve, (fpr, pro), from (0, 0) to (1, 1); for pixels only."""
        return self._corners(self.overlap)

    def spro_curve(self) -> Curve:
        """Return the corners of the sPRO curve, (fpr, spro), from (0, 0) to (1, 1); where regions are known."""
        return self._corners(self.saturated_overlap)

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


def f1(true_positives: int | np.ndarray, false_positives: int | np.ndarray, positives: int) -> float | np.ndarray:
    """F1, in [0, 1]: the harmonic mean of precision and recall; 0 where nothing is found. `positives` is above 0."""
    return 2 * true_positives / (positives + true_positives + false_positives)


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
    return _count([np.sort(scores[~anomalous])], scores[anomalous])


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


def au_spro(anomaly_maps: Maps, regions: Regions, fpr_limit: float = AU_PRO_STRICT_LIMIT) -> float:
    """Area under the saturated PRO curve up to a false positive rate, divided by it: in [0, 1] (MVTec LOCO).

    Exact over all thresholds, where MVTec LOCO's evaluation code takes as many as it needs to come near. Equals AU-PRO
    where regions are the connected ones and saturate at their whole area.

    Args:
        anomaly_maps: as in `pro_curve`.
        regions: of each image; none for a good one.
        fpr_limit: in (0, 1].

    Raises:
        ValueError: as in `pro_curve`, a limit outside of (0, 1], or as `regions.saturated`.
    """
    masks = []
    for scores, of_image in zip(anomaly_maps, regions, strict=True):
        mask = np.zeros(np.shape(scores), dtype=bool)
        mask.ravel()[np.concatenate([np.empty(0, np.intp), *(region.pixels for region in of_image)])] = True
        masks.append(mask)
    return area_under_curve(*count_pixels(anomaly_maps, masks, regions).spro_curve(), fpr_limit)


def count_pixels(anomaly_maps: Maps, ground_truth: Masks, regions: Regions | None = None) -> ThresholdCounts:
    """Sort all pixels once, for every pixel measure and curve; arguments and errors as in `pro_curve` and `au_spro`."""
    pixels = gather(*check(anomaly_maps, ground_truth), regions)
    if pixels.overlap.regions == 0:
        raise ValueError("the masks hold no defect pixel: the measure needs defect and good pixels")
    if len(pixels.good) == 0:
        raise ValueError("the masks leave no good pixel: the measure needs defect and good pixels")
    return count_gathered([pixels])


def count_gathered(groups: Sequence[Pixels]) -> ThresholdCounts:
    """Count the pixels of several groups of images together, where there are both good pixels and some of defects."""
    overlaps = [group.overlap for group in groups], [group.saturated for group in groups]
    weights = [
        np.concatenate([overlap.weight for overlap in each]) / sum(overlap.regions for overlap in each)
        for each in overlaps
        if each[0] is not None
    ]
    return _count(
        [group.good for group in groups], np.concatenate([d for group in groups for d in group.defects]), weights
    )


def _count(good: Sequence[np.ndarray], anomalous: np.ndarray, weights: Sequence[np.ndarray] = ()) -> ThresholdCounts:
    """Count at each distinct score of `anomalous`; `good` are sorted arrays, each of `weights` sums to 1."""
    order = np.argsort(anomalous)[::-1]
    scores = anomalous[order]
    last_of_ties = np.append(np.flatnonzero(scores[1:] != scores[:-1]), len(scores) - 1)
    thresholds = scores[last_of_ties]
    negatives = sum(map(len, good))
    overlaps = [np.cumsum(weight[order])[last_of_ties] for weight in weights]
    overlap, saturated_overlap, *_ = [*(each / each[-1] for each in overlaps), None, None]  # 1, but for rounding
    ascending = thresholds[::-1]  # searchsorted runs through memory in one direction: several times as fast
    below = sum(np.searchsorted(group, ascending, side="left") for group in good)[::-1]
    up_to = sum(np.searchsorted(group, ascending, side="right") for group in good)[::-1]
    return ThresholdCounts(
        thresholds,
        last_of_ties + 1,
        negatives - below,
        negatives - up_to,
        overlap,
        saturated_overlap,
        len(scores),
        negatives,
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
