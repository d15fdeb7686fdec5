"""Image files as a person sees them: any of the accepted formats to 8-bit RGB, any mask to 0 and 255."""

import io
import re
import stat
import sys
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tifffile
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin

from student_teacher.images import labelme
from student_teacher.runtime.errors import UserError, shown
from student_teacher.runtime.files import write_atomically
from student_teacher.runtime.prefetch import LARGE, alone

try:
    import pillow_heif
except ImportError:  # optional: without it HEIC photographs are refused by name
    HEIF = False
else:
    pillow_heif.register_heif_opener()
    HEIF = True

ValueRange = tuple[float, float]  # the values that become black and white
FULL_16_BIT = (0, 65535)
# Pillow recognises these, but can't decode them; EPS is a program, which may never end.
NOT_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG"}
PAGED = {"TIFF", "GIF", "WEBP", "PNG", "AVIF", "HEIF", "DCX", "FLI"}  # each page of which is an image
ONE_PAGE = {".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".ppm", ".pgm", ".jp2"}  # not opened to count their pages
NEW_SUBFILE_TYPE, REDUCED_OR_MASK = 254, 0b101  # a TIFF's tag, and bits of its value
HEIF_SUFFIXES = {".heic", ".heif", ".hif"}
# Endings of images that Pillow does not read: they are named, not passed over.
OTHER_SUFFIXES = HEIF_SUFFIXES | {
    *(".jxl", ".jxr", ".exr", ".hdr", ".svg", ".eps", ".ps", ".dcm", ".xcf", ".raw"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2", ".pef", ".srw"),
}

# Pillow can decode 64-bit floating point, but does not list it as a form of TIFF.
TiffImagePlugin.OPEN_INFO |= {
    (order, white_is_one, (3,), 1, (64,), ()): ("F", values)
    for order, values in ((b"II", "F;64F"), (b"MM", "F;64BF"))
    for white_is_one in (0, 1)
}

AT_ONCE = 2**22  # pixels that are converted together: else a large image takes many times its own memory

# Pillow refuses twice as much: the scan of a line camera has 200 megapixels.
Image.MAX_IMAGE_PIXELS = 125_000_000
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@cache
def readable_suffixes() -> frozenset[str]:
    """Lower-case endings of all formats that Pillow reads, with those of pillow-heif if it is installed."""
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in _readable_kinds())


@cache
def _readable_kinds():
    Image.init()
    return tuple(kind for kind in Image.ID if kind not in NOT_PICTURES)


def _open(file):
    mode = file.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # opening a pipe may wait for ever
        raise OSError("a pipe or a device, not a file")
    return Image.open(file, formats=_readable_kinds())


def is_image(path: Path) -> bool:
    """Whether a file is an image, by its ending in upper or lower case; by its first bytes if it has no ending.

    A number is not an ending (`scan.001`). Formats that can't be read count too: reading them says so. Hidden files
    don't count, nor does anything that is neither a file nor a link.
    """
    if path.name.startswith("."):
        return False
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return False
    except OSError:  # a link that leads nowhere, or no permission: reading it says so
        pass
    suffix = path.suffix.lower()
    if suffix.strip(".0123456789"):
        return suffix in readable_suffixes() or suffix in OTHER_SUFFIXES
    try:
        with _open(path):
            return True
    except Image.DecompressionBombError:
        return True
    except Exception:  # Pillow's readers raise anything on files of other kinds
        return False


def file_and_page(path: str | Path) -> tuple[Path, int | None]:
    """The file of an image, and its page from 1, or None: `name.tif#2` is the second page of name.tif."""
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
    """The images in a file: `name.tif#1`, `name.tif#2` and so on if it has several pages, else the file itself.

    Reduced copies and masks of a TIFF's pages don't count, nor do the previews that phones append to a JPEG. A broken
    file counts as one image: reading it says what is wrong.
    """
    if path.suffix.lower() in ONE_PAGE:
        return [path]
    try:
        with _open(path) as image:
            pages = _pages(image)
    except Exception:  # Pillow's readers raise nearly anything on a damaged file
        return [path]
    names = [path.with_name(f"{path.name}#{page + 1}") for page in pages]
    # A file of a page's name would be read in its place: reading the whole file says so.
    return [path] if len(pages) == 1 or any(name.exists() for name in names) else names


def _pages(image):
    """The numbers, from 0, of an opened file's pages. Leaves the file at any of them."""
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
    """Raises _Pages if the page does not exist, or if the file has several and its name does not say which."""
    if page is None and len(pages := _pages(image)) > 1:
        raise _Pages(
            f"has {len(pages)} pages; name one: add #{pages[1] + 1} to the file's name, and rename "
            "a file that is called so itself"
        )
    try:
        if image.tell() != (page or 1) - 1:
            image.seek((page or 1) - 1)
    except EOFError:
        raise _Pages(f"has no page {page}") from None


def load_rgb(path: str | Path, value_range: ValueRange | None = None) -> Image.Image:
    """Read an image as a person sees it, upright (EXIF) and in mode RGB.

    Transparent parts become white. Values of more than 8 bits are scaled linearly, from `value_range` to 0 to 255, and
    clipped. Without a range, 16-bit images are scaled from 0 to 65535; 32-bit integers and floating point need one.

    Raises:
        UserError: the file is missing, broken, not an image or too large; or it needs a value range.
    """
    return load_reduced(path, None, value_range)[0]


def load_reduced(
    path: str | Path, least: int | None, value_range: ValueRange | None = None
) -> tuple[Image.Image, tuple[int, int]]:
    """As `load_rgb`, but a JPEG may be read at a half, a quarter or an eighth of its size.

    Both sides stay at least `least` pixels long; None: never reduced. Decoding takes about half the time. Other images
    of more than LARGE pixels are reduced once they are decoded: many of them would not fit into memory. Also returns
    the height and width of the whole image.

    Raises:
        UserError: as `load_rgb`.
    """
    picture, size = _read(path, partial(_to_rgb, value_range=value_range), least)
    factor = min(picture.size) // least if least and picture.width * picture.height > LARGE else 1
    return picture.reduce(factor) if factor > 1 else picture, size


def load_deep(path: str | Path) -> tuple[np.ndarray | None, tuple[int, int]]:
    """Values (H,W) or (H,W,3) of an image of more than 8 bits, None for one of 8 bits; and its height and width.

    Raises:
        UserError: as `load_rgb`.
    """
    return _read(path, _deep_values)


def sides_of(path: str | Path) -> tuple[int, int]:
    """The lengths of an image's sides in pixels, from its header: nothing is decoded, and it may lie on its side.

    Raises:
        UserError: as `load_rgb`, but for what is broken behind the header.
    """
    with _opened(path) as (image, *_):
        return image.size


def as_rgb(picture: Image.Image, value_range: ValueRange | None = None) -> Image.Image:
    """An opened picture, converted as by `load_rgb`. Raises UserError if it needs a value range."""
    decoded = _Decoded(_straight(ImageOps.exif_transpose(picture)), None, _white_is_zero(picture))
    try:
        return _to_rgb(decoded, value_range)
    except _NoRange as error:
        raise UserError(f"the picture: {error}") from None


def at_most(picture: Image.Image, side: int, resample: Image.Resampling = Image.Resampling.BILINEAR) -> Image.Image:
    """The picture, reduced so that no side is longer than `side` pixels."""
    scale = min(1, side / max(picture.size))
    return picture.resize([max(1, round(length * scale)) for length in picture.size], resample)


def encoded(picture: Image.Image, kind: str, **options: Any) -> memoryview:
    """The bytes of the picture as a file of a kind, such as "PNG", with Pillow's options."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getbuffer()  # not a copy


def write_map(path: Path, values: np.ndarray) -> None:
    """Write float32 values (H,W) as a TIFF, not compressed, whole or not at all. Raises UserError if it can't."""
    # Pillow copies the values, which take a gigabyte for a line scan.
    write_atomically(path, partial(tifffile.imwrite, data=values, metadata=None, software=False))


def mapped(path: Path) -> np.ndarray:
    """The values (H,W) of a TIFF of `write_map`, mapped from the file: only what is looked at is in memory."""
    return tifffile.memmap(path, mode="r")


def load_mask(path: str | Path, threshold: float | None = None) -> Image.Image:
    """Read a mask of defects, upright (EXIF) and in mode L: 255 where the file is not black, else 0.

    A folder of masks, one for each region, marks what any of them marks. Fully transparent pixels count as black. A
    JPEG marks pixels brighter than the middle grey, as compression leaves grey traces around edges. With a `threshold`,
    0 to 255, any file marks what is brighter than it (floating point and 32 bits: values above it). A .json file is
    labelme's and marks what its shapes cover.

    Raises:
        UserError: the file is missing, broken, not an image or too large; a folder has no masks, or masks of different
            sizes.
    """
    return Image.fromarray(np.where(graded_mask(path, threshold)[1], 255, 0).astype(np.uint8))


def graded_mask(path: str | Path, threshold: float | None = None) -> tuple[np.ndarray, np.ndarray]:
    """How bright a mask is, (H,W), and where it marks a defect, bool; arguments and errors as of `load_mask`."""
    if Path(path).suffix.lower() == labelme.SUFFIX:
        marked = labelme.drawn_mask(Path(path))
        return marked * np.uint8(255), marked
    masks = [_read(file, partial(_graded, threshold=threshold))[0] for file in mask_files(Path(path))]
    sizes = [f"{marked.shape[1]} x {marked.shape[0]}" for _, marked in masks]
    for size in sizes:
        if size != sizes[0]:
            raise UserError(f"{path}: holds masks of {sizes[0]} and of {size} pixels; they must agree")
    values, marked = zip(*masks, strict=True)
    return np.max(values, axis=0), np.any(marked, axis=0)


def mask_files(path: Path) -> list[Path]:
    """The files of a mask: itself, or all images in it, sorted, if it is a folder as in MVTec LOCO.

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
    low_bytes: Callable[[], Image.Image] | None  # reads the lower bytes of 16-bit colours: Pillow gives the upper ones
    white_is_zero: bool  # and Pillow has not inverted it


class _Pages(ValueError):
    """A page that does not exist, or was not named."""


class _NoRange(ValueError):
    """Values that need a value range."""


def _read(path, convert, least=None):
    with _opened(path) as (image, file, page), alone(image.width * image.height):
        size, white_is_zero, low_bytes = image.size, _white_is_zero(image), _low_bytes(file, page, image)
        if least:
            image.draft(None, (least, least))
        image.tile = [_in_native_order(tile) for tile in image.tile]
        image.load()
        on_its_side = image.getexif().get(ExifTags.Base.Orientation, 1) > 4
        ImageOps.exif_transpose(image, in_place=True)
        decoded = _Decoded(_straight(image), low_bytes, white_is_zero)
        return convert(decoded), size if on_its_side else size[::-1]


@contextmanager
def _opened(path):
    """The opened image at its page, the file and the page's number; what goes wrong with it becomes a UserError."""
    name = shown(path)
    try:
        file, page = file_and_page(path)
        with _open(file) as image:
            _go_to_page(image, page)
            yield image, file, page
    except (_NoRange, _Pages) as error:
        raise UserError(f"{name}: {error}") from None
    except FileNotFoundError:
        raise UserError(f"{name}: no such file") from None
    except Image.UnidentifiedImageError:
        raise UserError(f"{name}: {_unidentified(Path(path))}") from None
    except Image.DecompressionBombError:
        limit = 2 * Image.MAX_IMAGE_PIXELS // 10**6
        raise UserError(f"{name}: more than {limit} megapixels; save it smaller") from None
    except MemoryError:
        raise UserError(f"{name}: does not fit into memory; save it smaller") from None
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{name}: cannot be read ({reason}); replace or remove it") from None
    except Exception as error:  # Pillow's readers raise nearly anything on a damaged file
        raise UserError(f"{name}: broken ({shown(error)}); replace or remove it") from None


def _straight(image):
    """Grey with premultiplied alpha becomes plain grey with alpha: Pillow converts La to nothing but LA."""
    return image.convert("LA") if image.mode == "La" else image


def _in_native_order(tile):
    """A part of a file, in the right byte order: libtiff has swapped the bytes; Pillow would swap them again."""
    if tile.codec_name != "libtiff" or not re.fullmatch(r"F;\d+BF", tile.args[0]):
        return tile
    return tile._replace(args=(tile.args[0].replace("BF", "NF"), *tile.args[1:]))


def _unidentified(path):
    """What may be wrong with a file that Pillow does not recognise, and what to do."""
    suffix = path.suffix.lower()
    if suffix in HEIF_SUFFIXES and not HEIF:
        return "HEIF is read with one more package: pip install pillow-heif"
    if suffix in OTHER_SUFFIXES - HEIF_SUFFIXES:
        return f"images of the kind {suffix[1:]} are not read; save it as PNG or TIFF"
    return _tiff_form(path) or "not an image, or broken at its very beginning; replace or remove it"


def _tiff_form(path):
    """What a TIFF that Pillow does not read holds, in words; None if the file is not a TIFF."""
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
    what = "the bands that matter" if bands > 4 else "it"
    way = f"save {what} with 1 band of 8, 16 or 32 bits, or with 3 or 4 of 8 or 16"
    return f"a TIFF with {form}, which is not read; {way}"


def _white_is_zero(image):
    """Whether a TIFF of more than 8 bits says so: Pillow inverts those of 8 bits itself."""
    deep = image.mode == "F" or image.mode.startswith("I")
    return deep and getattr(image, "tag_v2", {}).get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0


def _low_bytes(file, page, image):
    """A function that reads the lower bytes of 16-bit colours, by swapping the byte order. None for other files."""
    modes = {str(tile.args if isinstance(tile.args, str) else tile.args[0]) for tile in image.tile if tile.args}
    found = re.fullmatch(r"((?:LA|RGBA?);16)([BLN])", modes.pop()) if len(modes) == 1 else None
    if found is None:
        return None
    grey = found[1].startswith("LA")  # four bytes a pixel, as RGBA has: the second is the lower one
    order = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}[found[2]]
    mode = "RGBA" if grey else found[1] + order

    def read():
        with _open(file) as other:
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
        return _on_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _on_white(image):
    """RGB of an image with transparent parts."""
    opaque = Image.new("RGB", image.size)
    rows = max(1, AT_ONCE // image.width)
    for top in range(0, image.height, rows):
        part = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGBA")
        white = Image.new("RGBA", part.size, "white")
        opaque.paste(Image.alpha_composite(white, part).convert("RGB"), (0, top))
    return opaque


def _deep_values(decoded):
    """Values (H,W) or (H,W,3) of an image of more than 8 bits, None for other images."""
    if decoded.image.mode == "F" or decoded.image.mode.startswith("I"):
        return np.asarray(decoded.image)
    if decoded.low_bytes:
        values = np.asarray(decoded.image)[..., :3].astype(np.uint16)
        values *= 256
        values += np.asarray(decoded.low_bytes())[..., :3]
        return values
    return None


def _grey_to_8_bit(decoded, value_range):
    """(H,W) uint8 from a grey image of 16 or 32 bits."""
    image = decoded.image
    if value_range is None:
        if not image.mode.startswith("I;16") and image.format != "PPM":  # those of PGM are brought to 16 bits
            raise _NoRange(
                "floating-point and 32-bit values need a value range, and none was found on training images: give one "
                "with ./mvtec_dataset.sh NAME --value-range LOW HIGH before training, or save the image with 8 bits"
            )
        value_range = FULL_16_BIT
    grey = to_8_bit(np.asarray(image), value_range)
    return 255 - grey if decoded.white_is_zero else grey


def to_8_bit(values: np.ndarray, value_range: ValueRange) -> np.ndarray:
    """uint8 of the same shape: the range becomes 0 to 255, values beyond it are clipped, NaN becomes 0."""
    low, high = value_range
    levels = np.empty(values.shape, np.uint8)
    rows = max(1, AT_ONCE // max(1, values[:1].size))
    for start in range(0, len(values), rows):
        part = np.nan_to_num(values[start : start + rows].astype(np.float64), nan=low)
        levels[start : start + rows] = np.rint(np.clip((part - low) / (high - low), 0, 1) * 255)
    return levels


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
