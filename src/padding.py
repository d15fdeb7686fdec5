"""What stands round an image, so that the patch of a border pixel is whole."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

PADDINGS = ("zeros", "reflect")
PADDING = "reflect"  # a mirrored border looks as the image does; the paper's zeros would be strange to every net


def pad(images: Tensor, rows: tuple[int, int], columns: tuple[int, int], padding: str) -> Tensor:
    """Surround images (N,C,H,W) by numbers of rows (above, below) and columns (left, right); negative ones are cut off.

    "zeros" are ImageNet's mean colour after normalisation. "reflect" mirrors the image at its border pixels, as often
    as it takes where it is smaller than what is to be added. The layout in memory stays. Raises ValueError for another.
    """
    if padding not in PADDINGS:
        raise ValueError(f"padding {padding}: choose one of {', '.join(PADDINGS)}")
    if padding == "zeros":
        return F.pad(images, (*columns, *rows))
    rows, columns = (
        _mirrored(length, *added, images.device)
        for length, added in zip(images.shape[2:], (rows, columns), strict=True)
    )
    layout = torch.contiguous_format if images.is_contiguous() else torch.channels_last
    return images.index_select(2, rows).index_select(3, columns).contiguous(memory_format=layout)


@lru_cache
def _mirrored(length, before, after, where):
    """Indices into `length` pixels, from -before up to length + after; kept, as images mostly are of one size."""
    with torch.inference_mode(False):
        period = max(1, 2 * (length - 1))
        places = torch.arange(-before, length + after, device=where) % period
        return torch.minimum(places, period - places) if length > 1 else places
