"""A convolutional student that sees only the surroundings of each place."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

REDUCED, WIDTH = 24, 128  # channels of the input after reduction, and of the hidden layers
REACH, HOLE = 3, 1  # places to each side that are seen, and the inner ones that are not
LEAKY_SLOPE = 0.05


class Neighbourhood(NamedTuple):
    """Levels with the same stride, which a local student predicts together."""

    stride: int
    levels: tuple[int, ...]
    global_levels: tuple[int, ...]  # levels whose global students' errors it predicts too

    def of(self, maps: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
        """The teacher's maps of all levels, (N,K,h,w) each -> its levels stacked, (N,sum K,h,w), and K of each."""
        parts = [maps[level] for level in self.levels]
        return torch.cat(parts, 1), [part.shape[1] for part in parts]


def neighbourhoods(strides: Sequence[int]) -> list[Neighbourhood]:
    """Groups a teacher's levels, which have these strides, by stride, without the first and the last level.

    Those two have no local students. The errors of their global students are predicted by the students of the level
    beside them.
    """
    found, last = [], len(strides) - 1
    for stride in sorted(set(strides[1:last])):
        levels = tuple(level for level in range(1, last) if strides[level] == stride)
        before = (0,) if 1 in levels else ()
        after = (last,) if last - 1 in levels else ()
        found.append(Neighbourhood(stride, levels, before + levels + after))
    return found


class LocalErrors(NamedTuple):
    """A local student's errors on the teacher's maps."""

    squared: list[Tensor]  # squared errors of its predictions, (N,h,w) per level
    expected: Tensor  # (N,E,h,w): expected log errors, of the global students and then of its own levels


class LocalStudent(nn.Module):
    """Predicts the teacher's descriptor at a place from its surroundings, and how large the students' errors will be.

    It sees 7 x 7 places without the inner 3 x 3, so that it can't copy what it predicts. Unlike a global student it
    doesn't depend on the position in the image: it suits textures, and parts whose position varies.

    From the same surroundings it predicts which errors to expect without a defect: the logarithm of the distance to the
    teacher, for `global_levels` global students and for each of its own levels. At the edge of a part whose position
    varies, a global student's errors are large on good images too; where all parts look the same they are not.

    Maps (N,K,h,w), K the sum of the levels' `channels`, -> (N,K+E,h,w): descriptors, then E expected log errors.
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
        """Actual and expected errors on stacked maps (N,K,h,w)."""
        return self._errors(self(maps), maps)

    def loss(self, crops: Tensor, log_errors: Tensor) -> Tensor:
        """The training loss on crops (N,K,h+6,w+6): mean squared error of descriptors, and of expected log errors.

        `log_errors` (N,G,h,w) are the global students' errors; the student's own are computed from this prediction.
        """
        target = crops[:, :, REACH:-REACH, REACH:-REACH]
        predicted = self.layers(crops)
        squared, expected = self._errors(predicted, target)
        own = [log_distance(level.detach().sqrt()) for level in squared]
        expectation = F.mse_loss(expected, torch.cat([log_errors, torch.stack(own, 1)], 1))
        return F.mse_loss(predicted[:, : target.shape[1]], target) + 2 * expectation

    def _errors(self, predicted, maps):
        descriptors, expected = predicted.tensor_split([maps.shape[1]], 1)
        squared = (descriptors.float() - maps).square().split(self.channels, 1)
        return LocalErrors([part.sum(1) for part in squared], expected.float())

    @torch.no_grad()
    def expect(self, log_errors: Tensor) -> None:
        """Initialise the expected errors with these means (E,)."""
        self.layers[-1].bias[sum(self.channels) :] = log_errors

    @torch.no_grad()
    def folded(self) -> Self:
        """The same network in evaluation mode, as plain convolutions without batch normalisation."""
        reduce, ring, norm, *others = self.eval().layers
        plain = nn.Conv2d(ring.in_channels, ring.out_channels, ring.kernel_size, device=ring.weight.device)
        plain.weight.copy_(ring.weight * ring.seen)
        plain.bias.zero_()
        layers = nn.Sequential(reduce, fuse_conv_bn_eval(plain.eval(), norm), *others)
        return type(self)(self.channels, self.global_levels, layers).eval()

    def to_checkpoint(self) -> dict[str, Any]:
        """A folded student as tensors and numbers, for `of_checkpoint`."""
        net = {name: value.cpu() for name, value in self.state_dict().items()}
        return {"channels": self.channels, "global_levels": self.global_levels, "net": net}

    @classmethod
    def of_checkpoint(cls, content: dict[str, Any]) -> Self:
        """The inverse of `to_checkpoint`."""
        student = cls(content["channels"], content["global_levels"]).folded()
        student.load_state_dict(content["net"])
        return student


def log_distance(distances: Tensor) -> Tensor:
    """The natural logarithm of distances in [0, inf), clamped to 1e-3 from below."""
    return distances.clamp_min(1e-3).log()


class _Ring(nn.Conv2d):
    """A convolution with a hole: it doesn't see the centre and HOLE places to each side of it."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        seen = torch.ones(self.kernel_size)
        middle = slice(REACH - HOLE, REACH + HOLE + 1)
        seen[middle, middle] = 0
        self.register_buffer("seen", seen)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * self.seen, self.bias)
