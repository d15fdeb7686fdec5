"""Test images that show a part which is in the training images, too: look-alikes, by their thumbnails.

Some data sets hold several photographs of the same part, split at random into training and test, while each defective
part is in the test images alone. A method that remembers its training images then tells good from defective by "have I
seen this part?".

Two images are compared by the correlation of their thumbnails at the shift of a quarter of their size at most where it
is highest. Coarse shades are taken off before, and what all training images share: otherwise all bottles of one kind
would be the same part. Few defects are large enough to be seen in a thumbnail.
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from AnomalyDataset import AnomalyDataset
from student_teacher.runtime.bars import with_bar
from student_teacher.runtime.prefetch import prefetched

THUMBNAIL, SHIFT, SHADES = 48, 12, 15  # pixels: side, largest shift, width of the mean that is taken off
ALIKE = 0.8  # correlation above which two images are likely to show the same part


def grey_thumbnail(image: Image.Image) -> Tensor:
    """The transform of datasets for `thumbnails`: (1,THUMBNAIL,THUMBNAIL), from 0 to 255."""
    pixels = np.asarray(image.convert("L").resize((THUMBNAIL, THUMBNAIL)), dtype=np.float32)
    return torch.from_numpy(pixels)[None]


def thumbnails(good: AnomalyDataset, *others: AnomalyDataset) -> list[Tensor]:
    """Of datasets of `grey_thumbnail`s, for `correlations`: of mean 0 and norm 1, (N,THUMBNAIL,THUMBNAIL) each.

    What the images of `good` share is taken off all.
    """
    found = [_without_shades(dataset) for dataset in (good, *others)]
    shared = _shared(found[0])
    return [
        F.normalize((each - shared - (each - shared).mean((1, 2), True)).flatten(1)).view_as(each) for each in found
    ]


def _without_shades(dataset):
    samples = prefetched(dataset.__getitem__, range(len(dataset)))
    grey = torch.stack([sample["image"] for sample in with_bar(samples, len(dataset), "images")])
    half = SHADES // 2
    return (grey - F.avg_pool2d(F.pad(grey, (half,) * 4, mode="reflect"), SHADES, 1))[:, 0]


def _shared(images):
    """Their mean, drawn to 0 by as much of it as is chance (James and Stein 1961): of few images that is a part."""
    mean = images.mean(0)
    chance = (images - mean).square().sum() / (len(images) * max(1, len(images) - 1))
    return mean * (1 - chance / mean.square().sum().clamp_min(1e-12)).clamp_min(0)


def correlations(tested: Tensor, good: Tensor) -> Tensor:
    """Of each tested thumbnail (N,h,w) with each good one (M,h,w), at the shift where it is highest: (N,M)."""
    size = (THUMBNAIL + SHIFT,) * 2  # shifts up to SHIFT do not come round to the other side
    shifts = torch.arange(-SHIFT, SHIFT + 1)
    spectra = torch.fft.rfft2(good, s=size)
    found = []
    for spectrum in torch.fft.rfft2(tested, s=size):
        shifted = torch.fft.irfft2(spectrum.conj() * spectra, s=size)
        found.append(shifted[:, shifts][:, :, shifts].amax((1, 2)))
    return torch.stack(found)
