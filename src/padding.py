"""What stands round an image, so that the patch of a border pixel is whole."""

import torch
import torch.nn.functional as F
from torch import Tensor

import device

PADDINGS = ("zeros", "reflect")


def pad(images: Tensor, rows: tuple[int, int], columns: tuple[int, int], padding: str) -> Tensor:
    """Surround images (N,C,H,W) by numbers of rows (above, below) and columns (left, right); negative ones are cut off.

    "zeros" are ImageNet's mean colour after normalisation. "reflect" mirrors the image at its border pixels, as often
    as it takes where it is smaller than what is to be added.
    """
    if padding == "zeros":
        return F.pad(images, (*columns, *rows))
    where = images.device
    found = images[:, :, _mirrored(images.shape[2], *rows).to(where)]
    found = found[:, :, :, _mirrored(images.shape[3], *columns).to(where)]
    return found.contiguous(memory_format=device.memory_format(where))


def _mirrored(length, before, after):
    """Indices into `length` pixels, from -before up to length + after."""
    period = max(1, 2 * (length - 1))
    places = torch.arange(-before, length + after) % period
    return torch.minimum(places, period - places) if length > 1 else places
