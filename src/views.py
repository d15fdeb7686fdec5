"""Views of everyday pictures, for teaching the teacher on all positions at once (dense distillation)."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import device
import distributed
import preprocessing
from prefetch import prefetched

SHORTER_SIDE = (256, 384)  # of the whole picture, at the scale of a view: detail as in images of the default size
FLIP_SHARE = 0.5
GREY_SHARE = 0.25  # inspection images are often grey
CONTRAST = (0.6, 1.35)  # factors, drawn evenly in their logarithm
BRIGHTNESS = 0.15  # of the range, added or taken away at most
STRETCH = 1.5  # of one side against the other, at most: inspection images are often squeezed into a square
NOISE_SHARE = 0.5  # everyday pictures, made smaller, have lost the noise that a camera on the line shows
NOISE = 12.0  # its largest deviation, in grey levels


class ViewSampler:
    """Draws views: a square part of a picture, in twice the `side` that the teacher will see of it.

    A picture is zoomed so that its shorter side measures 256 to 384 pixels at the teacher's scale; the view is cropped
    at random, stretched, mirrored with probability 0.5, made grey with probability 0.25, and its exposure changed. Half
    of the views get noise, as fine as the teacher sees.
    """

    def __init__(self, pictures: Sequence[Image.Image], side: int, seed: int):
        self._pictures, self._side, self._seed = pictures, side, seed

    def batches(self, steps: range, size: int) -> Iterator[Tensor]:
        """For each step, views: uint8 (size,3,2*side,2*side). Seed and step alone decide what is drawn.

        Each of several processes draws its share of them.
        """
        return prefetched(lambda step: self._batch(step, size), steps)

    def _batch(self, step: int, size: int) -> Tensor:
        return torch.stack(
            [self._draw(device.seed_of(self._seed, "view", step, number)) for number in distributed.share(range(size))]
        )

    def _draw(self, seed: int) -> Tensor:
        random = np.random.default_rng(seed)
        picture = self._pictures[int(random.integers(len(self._pictures)))]
        side = min(picture.size) * self._side / random.uniform(*SHORTER_SIDE)
        stretch = STRETCH ** random.uniform(-0.5, 0.5)
        sides = [
            min(length, side * factor) for length, factor in zip(picture.size, (stretch, 1 / stretch), strict=True)
        ]
        left, top = (random.uniform(0, length - side) for length, side in zip(picture.size, sides, strict=True))
        box = (left, top, left + sides[0], top + sides[1])
        view = picture.resize((2 * self._side,) * 2, Image.Resampling.BILINEAR, box=box)
        if random.random() < FLIP_SHARE:
            view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if random.random() < GREY_SHARE:
            view = view.convert("L").convert("RGB")
        contrast = np.exp(random.uniform(*np.log(CONTRAST)))
        brightness = 255 * random.uniform(-BRIGHTNESS, BRIGHTNESS)
        mean = float(np.asarray(view.convert("L")).mean())
        exposed = (np.arange(256) - mean) * contrast + mean + brightness
        view = view.point(np.rint(exposed.clip(0, 255)).astype(int).tolist() * 3)
        if random.random() < NOISE_SHARE:
            view = self._with_noise(view, random)
        return preprocessing.to_tensor(view)

    def _with_noise(self, view: Image.Image, random: np.random.Generator) -> Image.Image:
        grain = random.normal(0, random.uniform(0, NOISE), (self._side, self._side)).astype(np.float32)
        grain = np.asarray(Image.fromarray(grain).resize(view.size, Image.Resampling.BILINEAR))
        return Image.fromarray(np.rint((np.asarray(view) + grain[:, :, None]).clip(0, 255)).astype(np.uint8))
