"""EfficientNet-Lite0 (Tan and Le, ICML 2019; the variant without squeeze-and-excitation), up to its fifteenth block."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

MEAN, STD = 127.0, 128.0  # of pixel values 0..255: the normalisation of the published weights


class Stage(NamedTuple):
    """`blocks` inverted bottlenecks in a row; only the first one has the stride."""

    blocks: int
    kernel: int
    stride: int
    expansion: int
    channels: int


STEM_CHANNELS = 32
STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
)


class Convolution(nn.Conv2d):
    """A convolution padded like TensorFlow's "SAME" on even sizes: with stride 2, more below and to the right."""

    def __init__(self, channels_in: int, channels: int, kernel: int, stride: int = 1, *, groups: int = 1):
        before = (kernel - stride) // 2
        after = kernel - stride - before
        super().__init__(channels_in, channels, kernel, stride, before, groups=groups)
        self.missing = after - before

    def forward(self, x: Tensor) -> Tensor:
        if not self.missing:
            return super().forward(x)
        missing = self.missing
        if x.is_cuda:
            return super().forward(F.pad(x, (0, missing, 0, missing)))
        # A kernel with zeros in front, on an image padded alike on all sides: on CPUs cheaper than a padded copy.
        weight, padding = F.pad(self.weight, (missing, 0, missing, 0)), self.padding[0] + missing
        return F.conv2d(x, weight, self.bias, self.stride, padding, groups=self.groups)


class InvertedBottleneck(nn.Module):
    """1 x 1 convolution to more channels, depthwise one, 1 x 1 back; the input is added if the shapes agree."""

    def __init__(self, channels_in: int, stage: Stage, stride: int):
        super().__init__()
        wide = channels_in * stage.expansion
        layers = [Convolution(channels_in, wide, 1), nn.ReLU6(inplace=True)] if stage.expansion > 1 else []
        layers += [Convolution(wide, wide, stage.kernel, stride, groups=wide), nn.ReLU6(inplace=True)]
        self.layers = nn.Sequential(*layers, Convolution(wide, stage.channels, 1))
        self.residual = stride == 1 and channels_in == stage.channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


class EfficientNetLite0(nn.Module):
    """The stem and the blocks before the last stage, with batch normalisation folded into the convolutions.

    (N,3,H,W), pixel values normalised by MEAN and STD, H and W multiples of 32 -> the features after the last block of
    each stage from the second on: (N,24,H/4,W/4), (N,40,H/8,W/8), (N,80,H/16,W/16), (N,112,H/16,W/16) and
    (N,192,H/32,W/32).
    """

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(Convolution(3, STEM_CHANNELS, 3, 2), nn.ReLU6(inplace=True))
        self.stages = nn.ModuleList()
        channels = STEM_CHANNELS
        for stage in STAGES:
            blocks = []
            for number in range(stage.blocks):
                blocks.append(InvertedBottleneck(channels, stage, 1 if number else stage.stride))
                channels = stage.channels
            self.stages.append(nn.Sequential(*blocks))

    def forward(self, pixels: Tensor) -> list[Tensor]:
        levels = []
        x = self.stem(pixels)
        for stage in self.stages:
            x = stage(x)
            levels.append(x)
        return levels[1:]
