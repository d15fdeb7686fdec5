"""Image files as a person sees them: any of the accepted formats to 8-bit RGB, any mask to 0 and 255."""

import io
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

from student_teacher.runtime.errors import UserError

try:
    import pillow_heif
except ImportError:  # an option: phones' photographs are refused by name without it
    HEIF = False
else:
    pillow_heif.register_heif_opener()
    HEIF = True

NOT_PICTURES = {"BUFR", "GRIB", "HDF5", "MPEG"}  # Pillow tells these from others, and reads none of them
HEIF_SUFFIXES = {".heic", ".heif", ".hif"}
# Endings of images that Pillow does not read: they are named, not passed over.
OTHER_SUFFIXES = HEIF_SUFFIXES | {
    *(".jxl", ".jxr", ".exr", ".hdr", ".svg", ".dcm", ".xcf", ".raw"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2", ".pef", ".srw"),
}

# Pillow warns of 90 megapixels and refuses from 180: large scans are welcome up to the refusal.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@cache
def readable_suffixes() -> frozenset[str]:
    """Endings, in small letters, of all formats that Pillow reads, with pillow-heif's where that is installed."""
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in _readable_kinds())


def _readable_kinds():
    Image.init()
    return Image.OPEN.keys() - NOT_PICTURES


def is_image(path: Path) -> bool:
    """Whether a file is an image by its ending, in capitals or not; by its beginning where there is no ending.

    Numbers are no ending (`scan.001`). Images of formats that are not read here count too: reading them names them.
    Hidden files, and what is neither a file nor a link, are none.
    """
    if path.name.startswith(".") or (path.exists() and not path.is_file()):
        return False
    suffix = path.suffix.lower()
    if suffix.strip(".0123456789"):
        return suffix in readable_suffixes() or suffix in OTHER_SUFFIXES
    try:
        with Image.open(path, formats=sorted(_readable_kinds())):
            return True
    except Image.DecompressionBombError:
        return True
    except Exception:  # Pillow's readers raise anything on files of other kinds
        return False


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

    Fully transparent pixels count as black. In a JPEG, whose compression leaves grey traces round every edge, the
    pixels brighter than the middle grey count.

    Raises:
        UserError: the file is missing, broken, not an image or too large.
    """
    return _read(path, _to_mask)[0]


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
        raise UserError(f"{path}: {_unidentified(Path(path))}") from None
    except Image.DecompressionBombError:
        limit = 2 * Image.MAX_IMAGE_PIXELS // 10**6
        raise UserError(f"{path}: more than {limit} megapixels; save it smaller") from None
    except MemoryError:
        raise UserError(f"{path}: does not fit into memory; save it smaller") from None
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: cannot be read ({reason}); replace or remove it") from None
    except Exception as error:  # Pillow's readers raise nearly anything on a damaged file
        raise UserError(f"{path}: broken ({error}); replace or remove it") from None


def _unidentified(path):
    """What may be wrong with a file that Pillow does not recognise, and the way out."""
    suffix = path.suffix.lower()
    if suffix in HEIF_SUFFIXES and not HEIF:
        return "HEIF is read with one more package: pip install pillow-heif"
    if suffix in OTHER_SUFFIXES - HEIF_SUFFIXES:
        return f"images of the kind {suffix[1:]} are not read; save it as PNG or TIFF"
    return "not an image, or broken at its very beginning; replace or remove it"


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
