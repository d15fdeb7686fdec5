"""Quantiles of the pixels of many large maps."""

import numpy as np
import torch
from torch import Tensor

from student_teacher.runtime import distributed

CHUNK = 2**26  # pixels that are sorted together
SIGN = np.uint32(2**31)


class PixelQuantiles:
    """Exact quantiles of all pixels of maps, collected map by map.

    Keeps each pixel once, sorted in chunks; there is never a second copy of all. With `shared`, each of several
    processes collects the maps of its share of the images, and keeps no others.
    """

    def __init__(self, shared: bool = False):
        self._shared = shared
        self._chunks: list[np.ndarray] = []
        self._pending: list[np.ndarray] = []

    def update(self, maps: Tensor) -> None:
        """Add the pixels of maps of any shape, finite, as float32."""
        self._pending.append(maps.float().flatten().numpy(force=True))
        if sum(map(len, self._pending)) >= CHUNK:
            self._sort_pending()

    def at(self, fractions: np.ndarray) -> np.ndarray:
        """The quantiles at these fractions (Q,), 0 to 1: float64, interpolated linearly as by np.quantile."""
        self._sort_pending()
        number = int(self._summed(np.array([sum(map(len, self._chunks))]))[0])
        places = fractions * (number - 1)
        lower = np.floor(places).astype(np.int64)
        below, above = (self._at_rank(np.minimum(lower + up, number - 1)).astype(np.float64) for up in (0, 1))
        return below + (above - below) * (places - lower)

    def _sort_pending(self):
        if self._pending:
            chunk = np.concatenate(self._pending)
            chunk.sort()
            self._chunks.append(chunk)
            self._pending.clear()

    def _at_rank(self, ranks):
        """The pixels (Q,) that have `ranks` smaller ones, by bisection of the bit patterns of float32, in order."""
        low, high = (np.full(len(ranks), _order(np.float32(end))) for end in (-np.inf, np.inf))
        while (low < high).any():
            middle = low + (high - low) // 2
            up_to = [np.searchsorted(chunk, _value(middle), side="right") for chunk in self._chunks]
            enough = self._summed(sum(up_to, np.zeros(len(ranks), np.int64))) > ranks
            low, high = np.where(enough, low, middle + 1), np.where(enough, middle, high)
        return _value(low)

    def _summed(self, counts):
        return distributed.all_reduce(torch.from_numpy(counts)).numpy() if self._shared else counts


def _order(value):
    """float32 as uint32 in the same order."""
    bits = value.view(np.uint32)
    return np.where(bits & SIGN, ~bits, bits | SIGN)


def _value(order):
    """The inverse of `_order`."""
    return np.where(order & SIGN, order ^ SIGN, ~order).view(np.float32)
