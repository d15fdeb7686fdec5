"""Dense extraction as published, to measure against: multi-pooling into the batch, in float32.

Bailer, Habtegebrial, Varanasi, Stricker, "Fast Dense Feature Extraction with CNNs that have Pooling or Striding Layers"
(BMVC 2017, arXiv 1805.03096), sections 3.1 and 3.2.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from AnomalyNet import AnomalyNet
from FDFEAnomalyNet import FDFEAnomalyNet


class MultiPoolingNet(nn.Module):
    """A patch network on every pixel: (N,3,H,W) -> (N,C,H,W), equal to FDFEAnomalyNet(net)."""

    def __init__(self, net: AnomalyNet):
        super().__init__()
        self.net = net
        self._padding = FDFEAnomalyNet(net).pad

    def forward(self, images: Tensor) -> Tensor:
        """Describe every pixel."""
        x, pools = self._padding(images), []
        for layer in self.net.layers:
            if isinstance(layer, nn.MaxPool2d):
                x = multi_pool(x, layer.kernel_size)
                pools.append(layer.kernel_size)
            else:
                x = layer(x)
        for size in reversed(pools):
            x = unwarp(x, size)
        return x[:, :, : images.shape[2], : images.shape[3]]


def multi_pool(x: Tensor, size: int) -> Tensor:
    """Pool all size^2 shifts of (N,C,H,W), one after another in the batch: (size^2 N,C,H',W')."""
    rows, columns = (-(-(length - size + 1) // size) for length in x.shape[2:])
    x = F.pad(x, (0, (columns + 1) * size - x.shape[3], 0, (rows + 1) * size - x.shape[2]))
    height, width = rows * size, columns * size
    starts = [(down, right) for down in range(size) for right in range(size)]
    shifts = [x[:, :, down : down + height, right : right + width] for down, right in starts]
    return F.max_pool2d(torch.cat(shifts), size)


def unwarp(x: Tensor, size: int) -> Tensor:
    """Interleave the shifts that multi_pool put into the batch."""
    shifts = x.unflatten(0, (size, size, -1))  # down, right, N, C, H', W'
    return shifts.permute(2, 3, 4, 0, 5, 1).flatten(4, 5).flatten(2, 3)
