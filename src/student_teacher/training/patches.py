"""Patches of everyday pictures, to train the teacher on (section 4 of "Uninformed Students")."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from student_teacher.images import preprocessing
from student_teacher.runtime import device, distributed
from student_teacher.runtime.prefetch import prefetched

ZOOM = (4, 16)  # the shorter side of the zoomed picture, in patch sizes
GREY_PROBABILITY = 0.1
NOISE_STD = 0.1  # of pixels in [0, 1]


class PatchSampler:
    """Draws pairs for triplets: a patch, and the same patch shifted and with noise.

    As in section 4 of the paper: a picture is zoomed so that its shorter side is between 4 and 16 patches long, a patch
    is cropped at random, its partner is shifted by up to a quarter of the patch, and both are made grey with
    probability 0.1. With `square`, as in the paper, both sides of the picture become equally long. Section 3.1 also
    mentions changes in luminance, but section 4 only the conversion to grey.
    """

    def __init__(self, pictures: Sequence[Image.Image], patch_size: int, seed: int, *, square: bool = False):
        self._pictures, self._patch_size, self._seed, self._square = pictures, patch_size, seed, square

    def batches(self, steps: range, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """For each step, patches and partners: (size,3,p,p) each, normalised by preprocessing.normalise.

        The result depends on seed and step only. Each of several processes draws its share of a batch.
        """
        return prefetched(lambda step: self._batch(step, size), steps)

    def _batch(self, step: int, size: int) -> tuple[Tensor, Tensor]:
        drawn = [
            self._draw(device.seed_of(self._seed, "patch", step, number)) for number in distributed.share(range(size))
        ]
        patches, partners = (preprocessing.normalise(torch.stack(pixels)) for pixels in zip(*drawn, strict=True))
        return patches, partners

    def _draw(self, seed: int) -> tuple[Tensor, Tensor]:
        random = np.random.default_rng(seed)
        picture = self._pictures[int(random.integers(len(self._pictures)))]
        size = self._patch_size
        shift = (size - 1) // 4
        zoomed = random.uniform(ZOOM[0] * size, ZOOM[1] * size)
        # The region of the original picture that becomes the patch and its surroundings.
        width, height = (
            (size + 2 * shift) / (zoomed / length)
            for length in (picture.size if self._square else (min(picture.size),) * 2)
        )
        left = random.uniform(0, picture.width - width)
        top = random.uniform(0, picture.height - height)
        around = picture.resize(
            (size + 2 * shift,) * 2, Image.Resampling.BILINEAR, box=(left, top, left + width, top + height)
        )
        if random.random() < GREY_PROBABILITY:
            around = around.convert("L").convert("RGB")
        pixels = np.asarray(around)
        down, right = random.integers(0, 2 * shift + 1, 2)
        patch = pixels[shift : shift + size, shift : shift + size]
        partner = pixels[down : down + size, right : right + size]
        noisy = partner + random.normal(0, 255 * NOISE_STD, partner.shape)
        return tuple(
            torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1))) for values in (patch, noisy.clip(0, 255))
        )
