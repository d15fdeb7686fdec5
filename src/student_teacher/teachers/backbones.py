"""Pretrained backbones: images in, features out.

A backbone returns features at several depths, the *levels*, for students and for the dense distillation of a patch
teacher; and one pooled vector of features per patch, for the paper's distillation.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from AnomalyResnet18 import AnomalyResnet18
from student_teacher.images import preprocessing
from student_teacher.teachers.EfficientNetLite0 import MEAN, STD, EfficientNetLite0

BACKBONES = ("efficientnet_lite0", "resnet18")  # the first is the default
STRIDE = 8  # pixels between neighbouring dense features
MULTIPLE = 32  # heights and widths of images must be multiples of this


class Backbone(nn.Module):
    """Base class of the backbones. Inputs (N,3,H,W) are normalised by preprocessing.normalise.

    Subclasses define `levels`, their `strides` and `channels`, and the position of features in the image: `first_fine`
    and `first_coarse` are row and column of the pixel at the first feature with stride 8 and with stride 16.
    """

    strides: tuple[int, ...]
    channels: tuple[int, ...]
    first_fine: int
    first_coarse: int

    def levels(self, pictures: Tensor) -> list[Tensor]:
        """Features at each depth: (N,3,H,W) -> one (N,C,ceil(H/stride),ceil(W/stride)) per level."""
        raise NotImplementedError

    def pooled(self, pictures: Tensor) -> Tensor:
        """One vector of features per image, the means of all levels: (N,3,H,W) -> (N,F)."""
        return torch.cat([features.mean((2, 3)) for features in self.levels(pictures)], 1)

    @torch.no_grad()
    def of_patches(self, patches: Tensor, size: int) -> Tensor:
        """Features (N,F) of patches (N,3,p,p), resized to `size` x `size` pixels."""
        if patches.shape[-1] != size:
            patches = F.interpolate(patches, (size, size), mode="bilinear", antialias=True)
        return self.pooled(patches)

    @torch.no_grad()
    def dense(self, pictures: Tensor) -> Tensor:
        """Features of every place, float32: (N,3,H,W) -> (N,C+D,H/8,W/8), H and W multiples of 16.

        These are the last level with stride 8 and the last with stride 16, averaged over 3 x 3 places; the latter is
        interpolated to the places of the former. Feature i is at the pixel `first_fine` + 8 i.
        """
        found = dict(zip(self.strides, self.levels(pictures), strict=True))  # the last of each stride
        fine, coarse = (averaged(found[stride].float()) for stride in (STRIDE, 2 * STRIDE))
        rows, columns = (2 * length - 1 for length in coarse.shape[2:])
        between = F.interpolate(coarse, (rows, columns), mode="bilinear", align_corners=True)
        before = (self.first_coarse - self.first_fine) // STRIDE
        after = [length - before - known for length, known in zip(fine.shape[2:], (rows, columns), strict=True)]
        return torch.cat([fine, F.pad(between, (before, after[1], before, after[0]), mode="replicate")], 1)


class Resnet18(Backbone):
    """torchvision's ResNet18: levels after its first three groups of layers; `pooled` are its last 512 features."""

    strides = (4, 8, 16)
    channels = (64, 128, 256)
    first_fine = first_coarse = 0  # its paddings are the same on all sides

    def __init__(self, net: AnomalyResnet18):
        super().__init__()
        self.net = net

    def pooled(self, pictures: Tensor) -> Tensor:
        return self.net.features(pictures)

    def levels(self, pictures: Tensor) -> list[Tensor]:
        trunk = self.net.trunk
        fine = trunk.layer1(trunk.maxpool(trunk.relu(trunk.bn1(trunk.conv1(pictures)))))
        middle = trunk.layer2(fine)
        return [fine, middle, trunk.layer3(middle)]


class Lite0(Backbone):
    """EfficientNet-Lite0: levels after its blocks 2, 4, 7, 10 and 14, counted from 0."""

    strides = (4, 8, 16, 16, 32)
    channels = (24, 40, 80, 112, 192)
    first_fine, first_coarse = 7, 15  # strided convolutions pad only below and to the right

    def __init__(self, net: EfficientNetLite0):
        super().__init__()
        self.net = net
        mean, std = (
            torch.tensor(values)[:, None, None] for values in (preprocessing.IMAGENET_MEAN, preprocessing.IMAGENET_STD)
        )
        self.register_buffer("factor", 255 * std / STD)
        self.register_buffer("shift", (255 * mean - MEAN) / STD)

    def levels(self, pictures: Tensor) -> list[Tensor]:
        return self.net(pictures * self.factor + self.shift)


def averaged(features: Tensor) -> Tensor:
    """Features averaged over 3 x 3 places: (N,C,h,w) -> (N,C,h,w)."""
    return F.avg_pool2d(features, 3, 1, 1, count_include_pad=False)
