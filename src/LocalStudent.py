"""A student that sees the surroundings of a place, and learns."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

STRIDE = 16  # pixels between places, at least
REDUCED, WIDTH = 24, 128  # channels of the surroundings, and of the hidden layers
REACH, HOLE = 3, 1  # places to each side that are seen, and that are not
LEAKY_SLOPE = 0.05


class Neighbourhood(NamedTuple):
    """Levels that a local student predicts together, averaged down to one stride."""

    stride: int
    levels: tuple[int, ...]
    factors: tuple[int, ...]  # by which each is averaged down

    def of(self, maps: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
        """The teacher's maps (N,K,h,w) of all levels -> those of its levels, stacked, and the channels of each."""
        parts = [
            F.avg_pool2d(maps[level], factor) if factor > 1 else maps[level]
            for level, factor in zip(self.levels, self.factors, strict=True)
        ]
        return torch.cat(parts, 1), [part.shape[1] for part in parts]


def neighbourhoods(strides: Sequence[int]) -> list[Neighbourhood]:
    """Which levels of these strides are predicted together: all but the first, by their stride, STRIDE at least."""
    found = []
    for stride in sorted({max(STRIDE, stride) for stride in strides[1:]}):
        levels = tuple(level for level in range(1, len(strides)) if max(STRIDE, strides[level]) == stride)
        found.append(Neighbourhood(stride, levels, tuple(stride // strides[level] for level in levels)))
    return found


class LocalStudent(nn.Module):
    """Predicts the teacher's descriptor of a place from those of its surroundings: (N,K,h,w) -> (N,K,h,w).

    It sees 7 x 7 places without the inner 3 x 3: what stands at a place must follow from what stands around it. Unlike
    a global student it doesn't ask where in the image that is: for parts that lie anyhow, and for textures.
    """

    def __init__(self, channels: int, layers: nn.Sequential | None = None):
        super().__init__()
        self.channels = channels
        window = 2 * REACH + 1
        self.layers = layers or nn.Sequential(
            nn.Conv2d(channels, REDUCED, 1),
            _Ring(REDUCED, WIDTH, window, bias=False),
            nn.BatchNorm2d(WIDTH),
            nn.LeakyReLU(LEAKY_SLOPE),
            nn.Conv2d(WIDTH, WIDTH, 1),
            nn.LeakyReLU(LEAKY_SLOPE),
            nn.Conv2d(WIDTH, channels, 1),
        )

    def forward(self, maps: Tensor) -> Tensor:
        return self.layers(F.pad(maps, (REACH, REACH, REACH, REACH), mode="reflect"))

    def squared_errors(self, maps: Tensor, channels: Sequence[int]) -> list[Tensor]:
        """Squared error of the prediction at each place, for each level: stacked maps (N,K,h,w) -> (N,h,w) each."""
        return [part.sum(1) for part in (self(maps) - maps).square().split(list(channels), 1)]

    def inner(self, crops: Tensor) -> Tensor:
        """The prediction where all surroundings are within the crop: (N,K,h,w) -> (N,K,h-6,w-6)."""
        return self.layers(crops)

    @torch.no_grad()
    def folded(self) -> Self:
        """The same, as it predicts in evaluation mode, of plain convolutions."""
        reduce, ring, norm, *others = self.eval().layers
        plain = nn.Conv2d(ring.in_channels, ring.out_channels, ring.kernel_size, device=ring.weight.device)
        plain.weight.copy_(ring.weight * ring.seen)
        plain.bias.zero_()
        return type(self)(self.channels, nn.Sequential(reduce, fuse_conv_bn_eval(plain.eval(), norm), *others)).eval()

    def to_checkpoint(self) -> dict[str, Any]:
        """What `of_checkpoint` rebuilds a folded one from."""
        return {"channels": self.channels, "net": {name: value.cpu() for name, value in self.state_dict().items()}}

    @classmethod
    def of_checkpoint(cls, content: dict[str, Any]) -> Self:
        """The LocalStudent whose `to_checkpoint` that was."""
        found = cls(content["channels"]).folded()
        found.load_state_dict(content["net"])
        return found


class _Ring(nn.Conv2d):
    """A convolution that doesn't see the inner HOLE places to each side."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        seen = torch.ones(self.kernel_size)
        middle = slice(REACH - HOLE, REACH + HOLE + 1)
        seen[middle, middle] = 0
        self.register_buffer("seen", seen)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * self.seen, self.bias)
