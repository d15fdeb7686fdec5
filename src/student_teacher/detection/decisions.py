"""From which scores on images are called anomalous and pixels outlined."""

from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import numpy as np

FALSE_ALARM_RATE, PIXEL_FALSE_ALARM_RATE = 0.05, 0.01  # of good images, and of their pixels


class Threshold(NamedTuple):
    """The image score from which an image is anomalous, and whether labels of test images have set it."""

    score: float
    from_labels: bool


@dataclass(frozen=True)
class Decisions:
    """The thresholds of a detector, and where they come from. `Detector.decisions` makes one.

    Attributes:
        image_score: the score that they are for, one of scoring.IMAGE_SCORES.
        threshold: from this score on an image is anomalous: infinity if none is, None if nothing can be decided.
        pixel_threshold: the same for pixels of anomaly maps.
        false_alarm_rate: of good images, 0 to 1, if that has set the threshold; else None.
        from_labels: the labels of test images have set the threshold.
    """

    image_score: str
    threshold: float | None
    pixel_threshold: float | None
    false_alarm_rate: float | None = None
    from_labels: bool = False

    def anomalous(self, score: float) -> bool | None:
        """Whether an image of this score is anomalous; None if that can't be decided."""
        return None if self.threshold is None else score >= self.threshold

    def by(self, threshold: Threshold) -> Self:
        """The same, with a threshold of its own for images."""
        return replace(self, threshold=threshold.score, false_alarm_rate=None, from_labels=threshold.from_labels)

    def described(self) -> str:
        """Where the image threshold comes from, in words."""
        if self.false_alarm_rate is not None:
            return f"at a false-alarm rate of {self.false_alarm_rate:g}"
        if self.from_labels:
            return "by the threshold of best F1 on the test images, which used their labels"
        return "by a threshold of your own"


def halfway_below(score: float, scores: np.ndarray) -> float:
    """The middle between a threshold and the next lower of some scores: it separates the same ones, with room."""
    lower = scores[scores < score]
    return float((score + lower.max()) / 2) if len(lower) else float(score)
