"""Synthetic defects in good images: CutPaste (Li, Sohn, Yoon, Pfister, CVPR 2021, section 2.1)."""

import numpy as np
from PIL import Image, ImageEnhance


def cut_paste(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """CutPaste: paste a rectangle of the RGB picture, with jittered colours, elsewhere in it. Returns a new picture.

    Its area is 2 to 15 % of the image, its aspect ratio 0.3 to 3.3, as in the paper.
    """
    area = random.uniform(0.02, 0.15) * image.width * image.height
    aspect = random.choice((random.uniform(0.3, 1), random.uniform(1, 3.3)))
    size = [
        min(round((area * ratio) ** 0.5), side - 1)
        for ratio, side in zip((aspect, 1 / aspect), image.size, strict=True)
    ]
    return _paste(image, _jittered_cut(image, size, random), None, random)


def cut_paste_scar(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """CutPaste-scar: paste a long thin rectangle, with jittered colours, rotated. Returns a new picture.

    Its width is 2 to 16 and its length 10 to 25 pixels, for an image 256 pixels wide; it is rotated by up to 45
    degrees, as in the paper.
    """
    unit = max(image.size) / 256
    sides = (random.uniform(2, 16), random.uniform(10, 25))
    size = [max(1, min(round(side * unit), limit - 1)) for side, limit in zip(sides, image.size, strict=True)]
    cut = _jittered_cut(image, size, random)
    angle = random.uniform(-45, 45)
    turned, shape = (
        picture.rotate(angle, Image.Resampling.BILINEAR, expand=True)
        for picture in (cut, Image.new("L", cut.size, 255))
    )
    return _paste(image, turned, shape, random)


def _jittered_cut(image, size, random):
    left, top = (int(random.integers(0, max(1, side - length))) for side, length in zip(image.size, size, strict=True))
    cut = image.crop((left, top, left + max(1, size[0]), top + max(1, size[1])))
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        cut = enhance(cut).enhance(random.uniform(0.9, 1.1))
    return cut


def _paste(image, cut, shape, random):
    defective = image.copy()
    place = tuple(
        int(random.integers(0, max(1, side - length + 1))) for side, length in zip(image.size, cut.size, strict=True)
    )
    defective.paste(cut, place, shape)
    return defective
