"""AUPIMO: how much of each defect is found where hardly any pixel of a good image is.

Bertoldo, Ameln, Vaidya, Akcay, "AUPIMO: Redefining Anomaly Localization Benchmarks with High Speed and Low Tolerance",
BMVC 2024 (arXiv 2401.01984). Thresholds are set by good images alone: their shared false positive rate is the mean over
images of the share of pixels at or above the threshold. An image's recall is the share of its defect that is found. Its
AUPIMO is the mean recall over shared false positive rates from 1e-5 to 1e-4, on a logarithmic scale.

Exact: at each rate the lowest threshold counts that keeps it, so that recall is a step function of the rate, with a
step at each distinct score of a good pixel. The authors' code takes trapezoids between 300,000 thresholds in place of
that.
"""

from collections.abc import Sequence

import numpy as np

FPR_LIMITS = (1e-5, 1e-4)  # of Bertoldo et al.


def aupimo(
    good: Sequence[np.ndarray], defects: Sequence[np.ndarray], fpr_limits: tuple[float, float] = FPR_LIMITS
) -> np.ndarray:
    """AUPIMO of each defective image: float64 (N,), in [0, 1]; NaN for an image without a defect pixel.

    Args:
        good: anomaly scores of the pixels of good images, an array of any shape for each; finite.
        defects: scores of the defect's pixels of N images, an array of any shape for each; finite.
        fpr_limits: where the shared false positive rate begins and ends, 0 < lower < upper <= 1.

    Raises:
        ValueError: no good image, one without pixels, or limits that are out of order.
    """
    thresholds, worth = _worth(good, fpr_limits)
    # A pixel is found wherever the threshold is a good score below its own.
    found = [worth[np.searchsorted(thresholds, scores.ravel(), side="left")] for scores in defects]
    return np.array([pixels.mean() if len(pixels) else np.nan for pixels in found], dtype=np.float64)


def _worth(good: Sequence[np.ndarray], fpr_limits: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """The good scores (K,) that are thresholds between the limits, rising, and what finding a pixel is worth (K + 1,).

    `worth[k]` is the share of the logarithmic range over which a pixel is found that lies above k of these scores.
    """
    lower, upper = fpr_limits
    if not 0 < lower < upper <= 1:
        raise ValueError(f"false positive rates from {lower} to {upper}: they must rise, from above 0 to at most 1")
    sizes = [scores.size for scores in good]
    if not sizes or not min(sizes):
        raise ValueError("the thresholds of AUPIMO come from good images: there must be one, and each needs pixels")
    # As many of the highest good scores exceed the upper limit, however they are spread over the images.
    enough = int(upper * len(good) * max(sizes)) + 1
    highest = [np.partition(scores.ravel(), -min(enough, scores.size))[-enough:] for scores in good]
    scores = np.concatenate(highest)
    share = np.repeat([1 / (len(good) * size) for size in sizes], [len(part) for part in highest])
    order = np.argsort(scores)[::-1]
    scores = scores[order]
    last_of_ties = np.append(np.flatnonzero(scores[1:] != scores[:-1]), len(scores) - 1)
    rate = np.cumsum(share[order])[last_of_ties]  # at or above each distinct score
    # From the rate above a score to the rate at it, the lowest threshold that keeps the rate lies just above the score.
    reached = np.log(np.clip(np.append(0, rate), lower, upper) / lower) / np.log(upper / lower)
    ascending = scores[last_of_ties][::-1]
    return ascending, np.append(0, np.cumsum(np.diff(reached)[::-1]))
