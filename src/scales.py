"""Patch sizes, and how the networks see an image at each of them."""

import torch.nn.functional as F
from torch import Tensor

PADDING = "reflect"  # a mirrored border looks as the image does; the paper's zeros would be strange to every net
# A patch of 130 pixels is described by the network for 65 on the image at half its size: wide context at a low price.
SCALES = {17: (17, 1), 33: (33, 1), 65: (65, 1), 130: (65, 2), 260: (65, 4)}  # patch size: the network's, and the zoom

DEFAULT_SCALES = (33, 130)


def zoomed(pixels: Tensor, zoom: int) -> Tensor:
    """Normalised images (N,3,H,W) at the size that a scale's networks see: ceil(H/zoom) x ceil(W/zoom)."""
    return pixels if zoom == 1 else F.avg_pool2d(pixels, zoom, ceil_mode=True)


def zoomed_stride(stride: int, zoom: int) -> int:
    """Between descriptors on the zoomed image, where it is `stride` on the image; 1 at least."""
    return max(1, stride // zoom)
