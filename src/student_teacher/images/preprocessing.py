"""From pictures to what the networks see."""

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from student_teacher.images.ignored import painter
from student_teacher.runtime import device

# Mean and deviation of ImageNet's pixels in [0, 1], red, green, blue: those of torchvision's weights.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
BUDGET = 4 * 2**30  # bytes of decoded images that are kept in memory
Size = tuple[int, int] | None  # height and width; None leaves images as they are


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB picture as uint8 (3,H,W), a grey one (a mask) as (1,H,W)."""
    pixels = np.array(image)
    return torch.from_numpy(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1).copy())


def image_transform(size: Size, ignored: np.ndarray | None = None) -> Callable[[Image.Image], Tensor]:
    """RGB picture -> uint8 (3,H,W), resized to `size` without aliasing; what is `ignored` (h,w) is painted over."""
    paint = painter(ignored)
    return lambda image: to_tensor(paint(resize(image, size)))


def resize(image: Image.Image, size: Size) -> Image.Image:
    """The picture at `size` (height, width), or as it is for None."""
    if size is None or image.size == size[::-1]:
        return image
    return image.resize(size[::-1], Image.Resampling.BILINEAR)


def least_side(size: Size) -> int | None:
    """How long both sides of a picture must be for `resize` to give what it gives of the whole one, nearly."""
    return None if size is None else 2 * max(size)


def normalise(images: Tensor) -> Tensor:
    """RGB from 0 to 255 (N,3,H,W) -> float32 by ImageNet's mean and deviation, in the device's layout."""
    mean, std = _imagenet(images.device)
    return (
        images.to(torch.float32, copy=True)
        .div_(255)
        .sub_(mean)
        .div_(std)
        .contiguous(memory_format=device.memory_format(images.device))
    )


@cache
def _imagenet(where: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation (3,1,1), brought to a device once: a copy for each image would keep a GPU waiting."""
    with torch.inference_mode(False):
        mean, std = (torch.tensor(values, device=where) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return mean.view(3, 1, 1), std.view(3, 1, 1)
