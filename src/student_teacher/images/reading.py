"""Image files as a person sees them: any of the accepted formats to 8-bit RGB, any mask to 0 and 255."""

import io
import re
import sys
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin

from student_teacher.runtime.errors import UserError

try:
    import pillow_heif
except ImportError:  # an option: phones' photographs are refused by name without it
    HEIF = False
else:
    pillow_heif.register_heif_opener()
    HEIF = True

ValueRange = tuple[float, float]  # the values that become black and white
FULL_16_BIT = (0, 65535)
NOT_PICTURES = {"BUFR", "GRIB", "HDF5", "MPEG"}  # Pillow tells these from others, and reads none of them
PAGED = {"TIFF", "GIF", "WEBP", "PNG", "AVIF", "HEIF", "DCX", "FLI"}  # each page of which is an image
ONE_PAGE = {".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".ppm", ".pgm", ".jp2"}  # not opened to count their pages
NEW_SUBFILE_TYPE, REDUCED_OR_MASK = 254, 0b101  # a TIFF's tag, and bits of its value
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


def file_and_page(path: str | Path) -> tuple[Path, int | None]:
    """The file of an image, and its page, from 1: `name.tif#2` is the second one of name.tif. None: none is named."""
    path = Path(path)
    found = re.fullmatch(r"(.+)#([1-9]\d*)", path.name)
    if found is None or path.exists() or not path.with_name(found[1]).exists():
        return path, None
    return path.with_name(found[1]), int(found[2])


def stem_of(path: str | Path) -> str:
    """An image's name without its ending, but with its page: name#2 of name.tif#2."""
    name, mark, page = Path(path).name.rpartition("#")
    return f"{Path(name).stem}#{page}" if mark and page.isdigit() else Path(path).stem


def pages_of(path: Path) -> list[Path]:
    """The images in a file: `name.tif#1`, `name.tif#2` and so on where it has several, or else the file itself.

    Reduced copies and masks of a TIFF's pages are none, and neither are the previews that phones put behind a JPEG. A
    broken file is one image: reading it names it.
    """
    if path.suffix.lower() in ONE_PAGE:
        return [path]
    try:
        with Image.open(path) as image:
            pages = _pages(image)
    except Exception:  # Pillow's readers raise nearly anything on a damaged file
        return [path]
    return [path] if len(pages) == 1 else [path.with_name(f"{path.name}#{page + 1}") for page in pages]


def _pages(image):
    """The numbers, from 0, of an opened file's pages; it stands at any of them afterwards."""
    number = getattr(image, "n_frames", 1) if image.format in PAGED else 1
    if number == 1 or image.format != "TIFF":
        return list(range(number))
    found = []
    for page in range(number):
        image.seek(page)
        if not image.tag_v2.get(NEW_SUBFILE_TYPE, 0) & REDUCED_OR_MASK:
            found.append(page)
    return found or [0]


def _go_to_page(image, page):
    """Raises _Pages where the page is not there, or where none is named and there are several."""
    if page is None and len(pages := _pages(image)) > 1:
        raise _Pages(f"has {len(pages)} pages; name one, as in #{pages[1] + 1} behind the file's name")
    try:
        if image.tell() != (page or 1) - 1:
            image.seek((page or 1) - 1)
    except EOFError:
        raise _Pages(f"has no page {page}") from None


def load_rgb(path: str | Path, value_range: ValueRange | None = None) -> Image.Image:
    """Read an image as a person sees it, upright (EXIF) and in mode RGB.

    Transparent parts show white. Values of more than 8 bits become 0 to 255 linearly: those of `value_range`, what lies
    beyond being cut. None stands for 0 to 65535 in 16-bit images; 32-bit integers and floating point have no range of
    their own.

    Raises:
        UserError: the file is missing, broken, not an image or too large; or it has values that need a range.
    """
    return load_reduced(path, None, value_range)[0]


def load_reduced(
    path: str | Path, least: int | None, value_range: ValueRange | None = None
) -> tuple[Image.Image, tuple[int, int]]:
    """As `load_rgb`; a JPEG at a half, a quarter or an eighth of its size where both sides stay `least` or longer.

    It is decoded in about half the time, and looks like the whole one made smaller. Returns with it the height and
    width of the whole one. None for `least`: never reduced.

    Raises:
        UserError: as `load_rgb`.
    """
    return _read(path, partial(_to_rgb, value_range=value_range), least)


def load_deep(path: str | Path) -> tuple[np.ndarray | None, tuple[int, int]]:
    """The grey or colour values of an image of more than 8 bits, (H,W) or (H,W,3), None for one of 8; height and width.

    Raises:
        UserError: as `load_rgb`.
    """
    return _read(path, _deep_values)


def as_rgb(picture: Image.Image, value_range: ValueRange | None = None) -> Image.Image:
    """A picture that was opened elsewhere, as `load_rgb` reads its file. Raises UserError where it needs a range."""
    decoded = _Decoded(ImageOps.exif_transpose(picture), None, _white_is_zero(picture))
    try:
        return _to_rgb(decoded, value_range)
    except _NoRange as error:
        raise UserError(f"the picture: {error}") from None


def at_most(picture: Image.Image, side: int, resample: Image.Resampling = Image.Resampling.BILINEAR) -> Image.Image:
    """The picture, made smaller where its longest side is above `side`."""
    scale = min(1, side / max(picture.size))
    return picture.resize([max(1, round(length * scale)) for length in picture.size], resample)


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    """The picture as a file of a kind, such as "PNG", with Pillow's options."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def mapped(path: Path) -> np.ndarray:
    """The values (H,W) of a float32 TIFF of ours, mapped from the file: only what is looked at is in memory."""
    with Image.open(path) as image:
        (offset,) = image.tag_v2[TiffImagePlugin.STRIPOFFSETS]  # Pillow writes one strip, not compressed
        return np.memmap(path, np.float32, "r", offset, image.size[::-1])


def load_mask(path: str | Path, threshold: float | None = None) -> Image.Image:
    """Read a mask of defects, upright (EXIF) and in mode L: 255 where the file is not black, else 0.

    Of a folder of masks, one for each region, what any of them marks. Fully transparent pixels count as black. In a
    JPEG, whose compression leaves grey traces round every edge, the pixels brighter than the middle grey count. With a
    `threshold`, 0 to 255, in any file those that are brighter; of floating point and 32 bits the values above it.

    Raises:
        UserError: the file is missing, broken, not an image or too large; a folder's are of different sizes, or none.
    """
    return Image.fromarray(np.where(graded_mask(path, threshold)[1], 255, 0).astype(np.uint8))


def graded_mask(path: str | Path, threshold: float | None = None) -> tuple[np.ndarray, np.ndarray]:
    """How bright a mask is, (H,W), and where it marks a defect, bool; arguments and errors as of `load_mask`."""
    masks = [_read(file, partial(_graded, threshold=threshold))[0] for file in mask_files(Path(path))]
    sizes = [f"{marked.shape[1]} x {marked.shape[0]}" for _, marked in masks]
    for size in sizes:
        if size != sizes[0]:
            raise UserError(f"{path}: holds masks of {sizes[0]} and of {size} pixels; they must agree")
    values, marked = zip(*masks, strict=True)
    return np.max(values, axis=0), np.any(marked, axis=0)


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
    return _read(path, lambda decoded: decoded.image.convert("L"))[0]


class _Decoded(NamedTuple):
    """An image as it was read, upright."""

    image: Image.Image
    low_bytes: Callable[[], Image.Image] | None  # the lower half of 16-bit colours: Pillow gives the upper one
    white_is_zero: bool  # and Pillow has not turned it


class _Pages(ValueError):
    """A page that is not there, or not named."""


class _NoRange(ValueError):
    """Values that need a range."""


def _read(path, convert, least=None):
    try:
        file, page = file_and_page(path)
        with Image.open(file) as image:
            _go_to_page(image, page)
            size, white_is_zero, low_bytes = image.size, _white_is_zero(image), _low_bytes(file, page, image)
            if least:
                image.draft(None, (least, least))
            image.load()
            on_its_side = image.getexif().get(ExifTags.Base.Orientation, 1) > 4
            ImageOps.exif_transpose(image, in_place=True)
            return convert(_Decoded(image, low_bytes, white_is_zero)), size if on_its_side else size[::-1]
    except (_NoRange, _Pages) as error:
        raise UserError(f"{path}: {error}") from None
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
    return _tiff_form(path) or "not an image, or broken at its very beginning; replace or remove it"


def _tiff_form(path):
    """What a TIFF holds that Pillow does not read, in words; None for what is not a TIFF."""
    try:
        with path.open("rb") as file:
            tags = TiffImagePlugin.ImageFileDirectory_v2(file.read(8))
            file.seek(tags.next)
            tags.load(file)
        bands = tags.get(TiffImagePlugin.SAMPLESPERPIXEL, 1)
        bits = tags[TiffImagePlugin.BITSPERSAMPLE][0]
        kind = {2: "signed integers", 3: "floating point"}.get(tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,))[0], "")
    except Exception:  # not a TIFF, or broken there
        return None
    form = f"{bands} band{'s' * (bands != 1)} of {bits} bits{f' in {kind}' if kind else ''}"
    return f"a TIFF with {form}, which is not read; save it with 1 band of 8, 16 or 32 bits, or with 3 or 4 of 8 or 16"


def _white_is_zero(image):
    """Whether a TIFF says so of values of more than 8 bits: those of 8 Pillow turns itself."""
    deep = image.mode == "F" or image.mode.startswith("I")
    return deep and getattr(image, "tag_v2", {}).get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0


def _low_bytes(file, page, image):
    """What reads the lower bytes of a file's 16-bit colours: as if they stood in the other order. None for others."""
    modes = {str(tile.args if isinstance(tile.args, str) else tile.args[0]) for tile in image.tile if tile.args}
    found = re.fullmatch(r"((?:LA|RGBA?);16)([BLN])", modes.pop()) if len(modes) == 1 else None
    if found is None:
        return None
    grey = found[1].startswith("LA")  # four bytes a pixel, as RGBA has: the second is the lower one
    order = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}[found[2]]
    mode = "RGBA" if grey else found[1] + order

    def read():
        with Image.open(file) as other:
            _go_to_page(other, page)
            other.tile = [
                tile._replace(args=mode if isinstance(tile.args, str) else (mode, *tile.args[1:]))
                for tile in other.tile
            ]
            other.load()
            ImageOps.exif_transpose(other, in_place=True)
            return Image.merge("RGB", [other.getchannel(1)] * 3) if grey else other

    return read


def _to_rgb(decoded, value_range):
    image = decoded.image
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_grey_to_8_bit(decoded, value_range)).convert("RGB")
    if decoded.low_bytes and value_range not in (None, FULL_16_BIT):
        alpha = image.getchannel("A") if image.mode == "RGBA" else None
        image = Image.fromarray(to_8_bit(_deep_values(decoded), value_range))
        if alpha:
            image.putalpha(alpha)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _deep_values(decoded):
    """(H,W) or (H,W,3) of an image of more than 8 bits, None for another."""
    if decoded.image.mode == "F" or decoded.image.mode.startswith("I"):
        return np.asarray(decoded.image)
    if decoded.low_bytes:
        upper, lower = (np.asarray(image)[..., :3].astype(np.uint16) for image in (decoded.image, decoded.low_bytes()))
        return upper * 256 + lower
    return None


def _grey_to_8_bit(decoded, value_range):
    """(H,W) uint8 from a grey image of 16 or 32 bits."""
    image = decoded.image
    if value_range is None:
        if not image.mode.startswith("I;16") and image.format != "PPM":  # those of PGM are brought to 16 bits
            raise _NoRange(
                "values in floating point or 32 bits have no range of their own, and none was found on training "
                "images: ./mvtec_dataset.sh NAME --value-range LOW HIGH gives one to learn with; or save it with 8 bits"
            )
        value_range = FULL_16_BIT
    grey = to_8_bit(np.asarray(image), value_range)
    return 255 - grey if decoded.white_is_zero else grey


def to_8_bit(values: np.ndarray, value_range: ValueRange) -> np.ndarray:
    """uint8 of the same shape: the range becomes 0 to 255, what lies beyond is cut, what is not a number is 0."""
    low, high = value_range
    levels = np.clip((np.nan_to_num(values.astype(np.float64), nan=low) - low) / (high - low), 0, 1)
    return np.rint(levels * 255).astype(np.uint8)


def _graded(decoded, threshold):
    image = decoded.image
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        values = 65535 - values if decoded.white_is_zero else values
        values = values / 257 if image.mode.startswith("I;16") else values
        return values, values != 0 if threshold is None else values > threshold
    pixels = np.asarray(image.convert("RGBA"))
    values = pixels[..., :3].max(axis=-1) * (pixels[..., 3] > 0)
    return values, values > (threshold if threshold is not None else 127 if image.format == "JPEG" else 0)
