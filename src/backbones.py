"""The backbones that can teach a teacher: pictures in, features out.

A backbone gives pooled features of a patch, for the paper's distillation, and features of every place of a picture, for
the dense one. A linear head decodes descriptors to them in training alone, so that nothing that comes after a teacher
hangs on its backbone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import preprocessing
from AnomalyResnet18 import AnomalyResnet18

BACKBONES = ("resnet18", "efficientnet_lite0")
STRIDE = 8  # pixels between neighbouring dense features


class Backbone(nn.Module):
    """What all backbones share. Pictures (N,3,H,W) come as preprocessing.normalise gives them.

    Subclasses give `pooled` and `intermediate`, and say where on the picture the latter stand: `first_fine` and
    `first_coarse` are row and column of the pixel under the first feature of stride 8 and of stride 16.
    """

    first_fine: int
    first_coarse: int

    def pooled(self, pictures: Tensor) -> Tensor:
        """One vector of features a picture: (N,3,H,W) -> (N,F)."""
        raise NotImplementedError

    def intermediate(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Features of stride 8 and of stride 16: (N,C,H/8,W/8) and (N,D,H/16,W/16)."""
        raise NotImplementedError

    @torch.no_grad()
    def of_patches(self, patches: Tensor, size: int) -> Tensor:
        """Features (N,F) of patches (N,3,p,p), seen at `size` x `size` pixels."""
        if patches.shape[-1] != size:
            patches = F.interpolate(patches, (size, size), mode="bilinear", antialias=True)
        return self.pooled(patches)

    @torch.no_grad()
    def dense(self, pictures: Tensor) -> Tensor:
        """Features of every place, float32: (N,3,H,W) -> (N,C+D,H/8,W/8), H and W multiples of 16.

        Both intermediate features, averaged over 3 x 3 places; those of stride 16 are interpolated to the places of
        those of stride 8. Number i stands on the pixel `first_fine` + 8 i.
        """
        fine, coarse = (
            F.avg_pool2d(features.float(), 3, 1, 1, count_include_pad=False) for features in self.intermediate(pictures)
        )
        rows, columns = (2 * length - 1 for length in coarse.shape[2:])
        between = F.interpolate(coarse, (rows, columns), mode="bilinear", align_corners=True)
        before = (self.first_coarse - self.first_fine) // STRIDE
        after = [length - before - known for length, known in zip(fine.shape[2:], (rows, columns), strict=True)]
        return torch.cat([fine, F.pad(between, (before, after[1], before, after[0]), mode="replicate")], 1)


class Resnet18(Backbone):
    """torchvision's ResNet18: 512 pooled features; dense ones behind its second and third group of layers (128+256)."""

    first_fine = first_coarse = 0  # its paddings are the same on all sides

    def __init__(self, net: AnomalyResnet18):
        super().__init__()
        self.net = net

    def pooled(self, pictures: Tensor) -> Tensor:
        return self.net.features(pictures)

    def intermediate(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        trunk = self.net.trunk
        x = trunk.maxpool(trunk.relu(trunk.bn1(trunk.conv1(pictures))))
        fine = trunk.layer2(trunk.layer1(x))
        return fine, trunk.layer3(fine)


class EfficientNetLite0(Backbone):
    """The package efficientnet_lite_pytorch's EfficientNet-Lite0.

    1280 pooled features; dense ones behind its blocks 4 (40) and 10 (112), the last of their strides.
    """

    FINE, COARSE = 4, 10
    first_fine, first_coarse = 7, 15  # it pads below and to the right alone where it strides

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net
        mean, deviation = (torch.tensor(v) for v in (preprocessing.IMAGENET_MEAN, preprocessing.IMAGENET_DEVIATION))
        # It was trained on pixels from -1 to 1.
        self.register_buffer("factor", (2 * deviation)[:, None, None])
        self.register_buffer("shift", (2 * mean - 1)[:, None, None])

    def pooled(self, pictures: Tensor) -> Tensor:
        return self.net.extract_features(pictures * self.factor + self.shift).mean((2, 3))

    def intermediate(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        net = self.net
        x = net._swish(net._bn0(net._conv_stem(pictures * self.factor + self.shift)))
        for number, block in enumerate(net._blocks[: self.COARSE + 1]):
            x = block(x)
            if number == self.FINE:
                fine = x
        return fine, x
