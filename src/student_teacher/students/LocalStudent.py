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
    global_levels: tuple[int, ...]  # of the global students whose errors it expects

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
        there = tuple(level for level in range(len(strides)) if max(STRIDE, strides[level]) == stride)
        levels = tuple(level for level in there if level)
        found.append(Neighbourhood(stride, levels, tuple(stride // strides[level] for level in levels), there))
    return found


class LocalErrors(NamedTuple):
    """What a local student says of the teacher's maps, for each of its levels: (N,h,w)."""

    squared: list[Tensor]  # errors of its predictions
    expected: Tensor  # (N,E,h,w): logarithms of the errors to expect, of global students and then of itself


class LocalStudent(nn.Module):
    """Predicts the teacher's descriptor of a place from those of its surroundings, and how well students will do there.

    It sees 7 x 7 places without the inner 3 x 3: what stands at a place must follow from what stands around it. Unlike
    a global student it doesn't ask where in the image that is: for parts that lie anyhow, and for textures.

    From the same surroundings it tells how large errors are to be expected, with nothing wrong: the logarithm of the
    distance to the teacher, of `global_levels` global students and of itself at each of its levels. At the edge of a
    part that lies anyhow a global student errs much on good images, too; where all parts are alike it doesn't.

    Maps (N,K,h,w), `channels` a level, give (N,K+E,h,w).
    """

    def __init__(self, channels: Sequence[int], global_levels: int, layers: nn.Sequential | None = None):
        super().__init__()
        self.channels, self.global_levels = list(channels), global_levels
        stacked, window = sum(channels), 2 * REACH + 1
        self.layers = layers or nn.Sequential(
            nn.Conv2d(stacked, REDUCED, 1),
            _Ring(REDUCED, WIDTH, window, bias=False),
            nn.BatchNorm2d(WIDTH),
            nn.LeakyReLU(LEAKY_SLOPE),
            nn.Conv2d(WIDTH, WIDTH, 1),
            nn.LeakyReLU(LEAKY_SLOPE),
            nn.Conv2d(WIDTH, stacked + global_levels + len(channels), 1),
        )

    def forward(self, maps: Tensor) -> Tensor:
        return self.layers(F.pad(maps, (REACH, REACH, REACH, REACH), mode="reflect"))

    def errors(self, maps: Tensor) -> LocalErrors:
        """Its errors on stacked maps (N,K,h,w), and those to expect."""
        return self._errors(self(maps), maps)

    def loss(self, crops: Tensor, log_errors: Tensor) -> Tensor:
        """What training minimises on crops (N,K,h+6,w+6): mean squared errors of descriptors and expectations.

        `log_errors` (N,G,h,w) are those of the global students; its own are those of this very prediction.
        """
        target = crops[:, :, REACH:-REACH, REACH:-REACH]
        predicted = self.layers(crops)
        squared, expected = self._errors(predicted, target)
        own = [log_distance(level.detach().sqrt()) for level in squared]
        expectation = F.mse_loss(expected, torch.cat([log_errors, torch.stack(own, 1)], 1))
        return F.mse_loss(predicted[:, : target.shape[1]], target) + 2 * expectation

    def _errors(self, predicted, maps):
        descriptors, expected = predicted.tensor_split([maps.shape[1]], 1)
        return LocalErrors([part.sum(1) for part in (descriptors - maps).square().split(self.channels, 1)], expected)

    @torch.no_grad()
    def expect(self, log_errors: Tensor) -> None:
        """Start from these mean expectations (E,)."""
        self.layers[-1].bias[sum(self.channels) :] = log_errors

    @torch.no_grad()
    def folded(self) -> Self:
        """The same, as it predicts in evaluation mode, of plain convolutions."""
        reduce, ring, norm, *others = self.eval().layers
        plain = nn.Conv2d(ring.in_channels, ring.out_channels, ring.kernel_size, device=ring.weight.device)
        plain.weight.copy_(ring.weight * ring.seen)
        plain.bias.zero_()
        layers = nn.Sequential(reduce, fuse_conv_bn_eval(plain.eval(), norm), *others)
        return type(self)(self.channels, self.global_levels, layers).eval()

    def to_checkpoint(self) -> dict[str, Any]:
        """What `of_checkpoint` rebuilds a folded one from."""
        net = {name: value.cpu() for name, value in self.state_dict().items()}
        return {"channels": self.channels, "global_levels": self.global_levels, "net": net}

    @classmethod
    def of_checkpoint(cls, content: dict[str, Any]) -> Self:
        """The LocalStudent whose `to_checkpoint` that was."""
        found = cls(content["channels"], content["global_levels"]).folded()
        found.load_state_dict(content["net"])
        return found


def log_distance(distances: Tensor) -> Tensor:
    """The logarithm of distances from 0 on, at least 1e-3."""
    return distances.clamp_min(1e-3).log()


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
