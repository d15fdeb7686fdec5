"""What is usual on anomaly-free images, overall and at each place, and scores normalised by it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from student_teacher.runtime import distributed
from student_teacher.runtime.running_moments import RunningMoments

PLACES = 32  # along each side of the image, whatever its size
PRIOR_IMAGES = 10  # what is usual everywhere counts as much as what this many images say of a place


class ScoreStatistics:
    """Error and variance on anomaly-free images, gathered image by image."""

    def __init__(self):
        self.errors, self.variances = RunningMoments(), RunningMoments()
        self._images = 0
        self._sum = self._squares = torch.zeros(PLACES, PLACES, dtype=torch.float64)

    def update(self, error: Tensor, variance: Tensor) -> None:
        """Take in error and variance of images, (N,h,w) each."""
        self.errors.update(error.flatten()[:, None])
        self.variances.update(variance.flatten()[:, None])
        both = (error + variance).double().cpu()
        self._images += len(both)
        self._sum = self._sum + F.adaptive_avg_pool2d(both, PLACES).sum(0)
        self._squares = self._squares + F.adaptive_avg_pool2d(both.square(), PLACES).sum(0)

    def gather(self) -> None:
        """Take in what the other processes have taken in."""
        self.errors.gather()
        self.variances.gather()
        parts = distributed.gathered((self._images, self._sum, self._squares))
        self._images, self._sum, self._squares = (sum(values) for values in zip(*parts, strict=True))

    def of_places(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation (PLACES,PLACES) of error plus variance: smooth, and drawn to the overall ones if few."""
        mean = self._sum / self._images
        variance = (self._squares / self._images - mean.square()).clamp_min(0)
        mean, variance = (
            F.avg_pool2d(F.pad(values[None, None], (1, 1, 1, 1), mode="replicate"), 3, 1)[0, 0]
            for values in (mean, variance)
        )
        own_weight = self._images / (self._images + PRIOR_IMAGES)
        overall = variance.mean() + (mean - mean.mean()).square().mean()
        mean = mean.mean() + own_weight * (mean - mean.mean())
        std = (own_weight * variance + (1 - own_weight) * overall).sqrt()
        return mean.float(), torch.where(std > 1e-12 * (1 + mean), std, 1.0).float()


def standardise(scores: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Scores (N,h,w) in deviations from what is usual at their places, as ScoreStatistics.of_places gives it."""
    mean, std = F.interpolate(torch.stack([mean, std])[None], scores.shape[1:], mode="bilinear")[0]
    return (scores - mean) / std
