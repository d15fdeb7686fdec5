"""Views of everyday pictures, to train the teacher at all positions at once (dense distillation)."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from student_teacher.images import preprocessing
from student_teacher.runtime import device, distributed
from student_teacher.runtime.prefetch import prefetched

SHORTER_SIDE = (256, 384)  # of the whole picture, in pixels at the teacher's scale: detail as at the default image size
FLIP_PROBABILITY = 0.5
GREY_PROBABILITY = 0.25  # inspection images are often grey
CONTRAST = (0.6, 1.35)  # limits of the factor, drawn uniformly in its logarithm
BRIGHTNESS = 0.15  # of the range, the largest change
STRETCH = 1.5  # the largest ratio between the sides' scales: inspection images are often squeezed into a square
NOISE_PROBABILITY = 0.5  # downscaled everyday pictures lack the noise of a production camera
NOISE = 12.0  # the largest standard deviation of the noise, in grey levels


class ViewSampler:
    """Draws views: square crops of pictures, with twice the `side` that the teacher sees.

    A picture is scaled so that its shorter side has 256 to 384 pixels at the teacher's scale. The view is cropped at
    random, stretched, mirrored with probability 0.5, made grey with probability 0.25, and changed in contrast and
    brightness. Half of the views get noise at the teacher's resolution. Threads crop; the device `where` does the rest.
    """

    def __init__(self, pictures: Sequence[Image.Image], side: int, seed: int, where: torch.device):
        self._pictures, self._side, self._seed, self._where = pictures, side, seed, where

    def batches(self, steps: range, size: int) -> Iterator[Tensor]:
        """For each step, views on the device: uint8 (size,3,2*side,2*side).

        The result depends on seed and step only. Each of several processes draws its share of a batch.
        """
        for parts in prefetched(lambda step: self._parts(step, size), steps):
            yield torch.stack([self._view(*part) for part in parts])

    def _parts(self, step: int, size: int) -> list[tuple[Tensor, np.random.Generator]]:
        """For each view its crop, uint8 (3,h,w), and the random generator for its augmentation."""
        seeds = (device.seed_of(self._seed, "view", step, number) for number in distributed.share(range(size)))
        return [(self._part(random), random) for random in map(np.random.default_rng, seeds)]

    def _part(self, random: np.random.Generator) -> Tensor:
        picture = self._pictures[int(random.integers(len(self._pictures)))]
        side = min(picture.size) * self._side / random.uniform(*SHORTER_SIDE)
        stretch = STRETCH ** random.uniform(-0.5, 0.5)
        sides = [
            max(1, round(min(length, side * factor)))
            for length, factor in zip(picture.size, (stretch, 1 / stretch), strict=True)
        ]
        left, top = (int(random.integers(length - side + 1)) for length, side in zip(picture.size, sides, strict=True))
        return preprocessing.to_tensor(picture.crop((left, top, left + sides[0], top + sides[1])))

    def _view(self, part: Tensor, random: np.random.Generator) -> Tensor:
        pixels = part.to(self._where)[None].float()
        view = F.interpolate(pixels, (2 * self._side,) * 2, mode="bilinear", antialias=True)[0]
        if random.random() < FLIP_PROBABILITY:
            view = view.flip(2)
        if random.random() < GREY_PROBABILITY:
            view = grey(view).expand(3, -1, -1)
        contrast = np.exp(random.uniform(*np.log(CONTRAST)))
        brightness = 255 * random.uniform(-BRIGHTNESS, BRIGHTNESS)
        mean = grey(view).mean()
        view = ((view - mean) * contrast + mean + brightness).clamp(0, 255)
        if random.random() < NOISE_PROBABILITY:
            grain = random.normal(0, random.uniform(0, NOISE), (1, 1, self._side, self._side)).astype(np.float32)
            grain = torch.from_numpy(grain).to(self._where)
            view = (view + F.interpolate(grain, view.shape[1:], mode="bilinear")[0]).clamp(0, 255)
        return view.round().to(torch.uint8)


def grey(view: Tensor) -> Tensor:
    """Luma of RGB (3,H,W), ITU-R 601: (1,H,W)."""
    return (0.299 * view[:1] + 0.587 * view[1:2] + 0.114 * view[2:]).round()
