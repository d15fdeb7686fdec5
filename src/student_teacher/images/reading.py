"""Image files as a person sees them: any of the accepted formats to 8-bit RGB, any mask to 0 and 255."""

import io
import struct
import warnings
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageChops, ImageOps

from student_teacher.runtime.errors import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")

# Pillow warns of 90 megapixels and refuses from 180: large scans are welcome up to the refusal.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def is_image(path: Path) -> bool:
    """Whether a path ends as an image that is read here, in capitals or not; hidden files are none."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def load_rgb(path: str | Path) -> Image.Image:
    """Read an image as a person sees it, upright (EXIF) and in mode RGB.

    Transparent parts show white. 16-bit greys keep their full range: 0..65535 becomes 0..255. Greys in 32-bit
    integers or floating point, which carry no range of their own, are taken to fill the smallest usual one that
    holds their largest value: 0..1 (floating point), 0..255, 0..65535 or 0..2^32-1.

    Raises:
        UserError: the file is missing, broken, not an image or too large.
    """
    return load_reduced(path, None)[0]


def load_reduced(path: str | Path, least: int | None) -> tuple[Image.Image, tuple[int, int]]:
    """As `load_rgb`; a JPEG at a half, a quarter or an eighth of its size where both sides stay `least` or longer.

    It is decoded in about half the time, and looks like the whole one made smaller. Returns with it the height and
    width of the whole one. None for `least`: never reduced.

    Raises:
        UserError: as `load_rgb`.
    """
    return _read(path, _to_rgb, least)


def as_rgb(picture: Image.Image) -> Image.Image:
    """A picture that was opened elsewhere, as `load_rgb` reads its file."""
    return _to_rgb(ImageOps.exif_transpose(picture))


def at_most(picture: Image.Image, side: int, resample: Image.Resampling = Image.Resampling.BILINEAR) -> Image.Image:
    """The picture, made smaller where its longest side is above `side`."""
    scale = min(1, side / max(picture.size))
    return picture.resize([max(1, round(length * scale)) for length in picture.size], resample)


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    """The picture as a file of a kind, such as "PNG", with Pillow's options."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def load_mask(path: str | Path) -> Image.Image:
    """Read a mask of defects, upright (EXIF) and in mode L: 255 where the file is not black, else 0.

    Of a folder of masks, one for each region, what any of them marks. Fully transparent pixels count as black. In a
    JPEG, whose compression leaves grey traces round every edge, the pixels brighter than the middle grey count.

    Raises:
        UserError: the file is missing, broken, not an image or too large; a folder's are of different sizes, or none.
    """
    masks = [_read(file, _to_mask)[0] for file in mask_files(Path(path))]
    for mask in masks:
        if mask.size != masks[0].size:
            raise UserError(f"{path}: holds masks of {_size(masks[0])} and of {_size(mask)} pixels; they must agree")
    return reduce(ImageChops.lighter, masks)


def mask_files(path: Path) -> list[Path]:
    """The files of a mask: itself, or where it is a folder, as in MVTec LOCO, all images in it, sorted.

    Raises:
        UserError: the folder holds no image.
    """
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.iterdir() if is_image(file))
    if not files:
        raise UserError(f"{path}: holds no mask")
    return files


def load_grey(path: str | Path) -> Image.Image:
    """Read an image's grey values as they are, from 0 to 255, upright (EXIF) and in mode L.

    Raises:
        UserError: as `load_rgb`.
    """
    return _read(path, lambda image: image.convert("L"))[0]


def _size(image):
    return f"{image.width} x {image.height}"


def _read(path, convert, least=None):
    try:
        with Image.open(path) as image:
            size = image.size
            if least:
                image.draft(None, (least, least))
            image.load()
            on_its_side = image.getexif().get(ExifTags.Base.Orientation, 1) > 4
            ImageOps.exif_transpose(image, in_place=True)
            return convert(image), size if on_its_side else size[::-1]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Image.UnidentifiedImageError:
        raise UserError(f"{path}: not an image, or broken at its very beginning; replace or remove it") from None
    except Image.DecompressionBombError:
        limit = 2 * Image.MAX_IMAGE_PIXELS // 10**6
        raise UserError(f"{path}: more than {limit} megapixels; save it smaller") from None
    except MemoryError:
        raise UserError(f"{path}: does not fit into memory; save it smaller") from None
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: cannot be read ({reason}); replace or remove it") from None
    except (SyntaxError, ValueError, IndexError, KeyError, TypeError, EOFError, struct.error) as error:
        # Pillow's readers raise any of these on a damaged file.
        raise UserError(f"{path}: broken ({error}); replace or remove it") from None


def _to_rgb(image):
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_deep_grey_to_8_bit(image)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _deep_grey_to_8_bit(image):
    """(H,W) uint8 from a grey image of 16 or 32 bits."""
    grey = np.nan_to_num(np.asarray(image, dtype=np.float64), nan=0, posinf=0, neginf=0)
    if image.mode.startswith("I;16"):
        full = 65535
    elif image.mode == "F":
        # Resampling overshoots: a little above 1 is still 0..1.
        full = next((top for top in (1, 255, 65535) if grey.max() <= 1.5 * top), 2**32 - 1)
    else:
        full = next((top for top in (255, 65535) if grey.max() <= top), 2**32 - 1)
    return np.rint(np.clip(grey / full, 0, 1) * 255).astype(np.uint8)


def _to_mask(image):
    if image.mode == "F" or image.mode.startswith("I"):
        defect = np.asarray(image) != 0
    else:
        threshold = 127 if image.format == "JPEG" else 0
        pixels = np.asarray(image.convert("RGBA"))
        defect = (pixels[..., :3] > threshold).any(axis=-1) & (pixels[..., 3] > 0)
    return Image.fromarray(np.where(defect, 255, 0).astype(np.uint8))
