"""Mean and std of error and variance on anomaly-free images, over all pixels and at each place."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from student_teacher.images.ignored import seen
from student_teacher.runtime import distributed
from student_teacher.runtime.running_moments import RunningMoments

PLACES = 32  # along each side of the image, for any image size
PRIOR_IMAGES = 10  # the overall mean and std weigh as much as this many images do at a place


class ScoreStatistics:
    """Statistics of error and variance on anomaly-free images, collected image by image."""

    def __init__(self):
        self.errors, self.variances = RunningMoments(), RunningMoments()
        self._images = 0
        self._sum = self._squares = torch.zeros(PLACES, PLACES, dtype=torch.float64)

    def update(self, error: Tensor, variance: Tensor, ignored: np.ndarray | None = None) -> None:
        """Add error and variance of images, (N,h,w) each, the overall ones without regions to ignore."""
        counted = seen(ignored, tuple(error.shape[1:])).to(error.device)
        self.errors.update(error[:, counted].flatten()[:, None])
        self.variances.update(variance[:, counted].flatten()[:, None])
        both = (error + variance).double().cpu()
        self._images += len(both)
        self._sum = self._sum + F.adaptive_avg_pool2d(both, PLACES).sum(0)
        self._squares = self._squares + F.adaptive_avg_pool2d(both.square(), PLACES).sum(0)

    def gather(self) -> None:
        """Add what the other processes have collected."""
        self.errors.gather()
        self.variances.gather()
        parts = distributed.gathered((self._images, self._sum, self._squares))
        self._images, self._sum, self._squares = (sum(values) for values in zip(*parts, strict=True))

    def of_places(self) -> tuple[Tensor, Tensor]:
        """Mean and std (PLACES,PLACES) of error plus variance at each place.

        Smoothed over 3 x 3 places, and shrunk towards the overall mean and std: the fewer images, the more.
        """
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
    """Scores (N,h,w) -> (score - mean) / std of their places, as ScoreStatistics.of_places returns them."""
    mean, std = F.interpolate(torch.stack([mean, std])[None], scores.shape[1:], mode="bilinear")[0]
    return (scores - mean) / std
