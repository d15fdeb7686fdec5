"""Mean and standard deviation of more numbers than fit in memory, in one numerically stable pass."""

import torch
from torch import Tensor

from student_teacher.runtime import distributed


class RunningMoments:
    """Running mean and variance per channel, in float64.

    Batches are merged by the update of Chan, Golub and LeVeque (1979). It has no difference of large sums, so that a
    large mean with a small standard deviation causes no cancellation.
    """

    def __init__(self):
        self.count = 0
        self.mean: Tensor | float = 0.0
        self._squares: Tensor | float = 0.0

    def update(self, values: Tensor) -> None:
        """Add `values` (N,C): N observations of C channels; N may be 0."""
        if len(values) == 0:  # their mean is not a number
            return
        values = values.detach().double()
        mean = values.mean(0)
        self.merge(len(values), mean, (values - mean).square().sum(0))

    def merge(self, count: int, mean: Tensor, squares: Tensor) -> None:
        """Add `count` observations, given their mean and their sum of squared differences from it; none if it is 0."""
        if count == 0:
            return
        total = self.count + count
        difference = mean - self.mean
        self._squares = self._squares + squares + difference.square() * (self.count * count / total)
        self.mean = self.mean + difference * (count / total)
        self.count = total

    def gather(self) -> None:
        """Add the other processes' observations. With several processes, mean and std are on the CPU afterwards."""
        if not distributed.active():
            return
        parts = distributed.gathered([torch.as_tensor(value).cpu() for value in (self.count, self.mean, self._squares)])
        self.count, self.mean, self._squares = 0, 0.0, 0.0
        for count, mean, squares in parts:
            self.merge(count.item(), mean, squares)

    @property
    def std(self) -> Tensor:
        """Standard deviation per channel (C,), float64; 1 for a constant channel.

        Raises ValueError if there are no observations.
        """
        if self.count == 0:
            raise ValueError("no observations yet")
        std = (self._squares / self.count).sqrt()
        return torch.where(std > 1e-12 * (1 + self.mean.abs()), std, torch.ones_like(std))
