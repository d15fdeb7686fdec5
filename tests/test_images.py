import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, TiffImagePlugin

from student_teacher.images import reading
from student_teacher.images.arrays import picture_of
from student_teacher.images.folders import images_below, told
from student_teacher.images.reading import (
    as_rgb,
    is_image,
    load_deep,
    load_mask,
    load_reduced,
    load_rgb,
    mapped,
    pages_of,
    stem_of,
    write_map,
)
from student_teacher.images.value_range import common_range, extremes_of
from student_teacher.runtime.errors import UserError
from student_teacher.runtime.paths import ROOT
from tests.tiff import tiff_of


def pixels(path):
    image = load_rgb(path)
    assert image.mode == "RGB"
    return np.asarray(image)


def save(image, path, **options):
    image.save(path, **options)
    return path


def test_grey_becomes_three_equal_channels(tmp_path):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    got = pixels(save(Image.fromarray(grey), tmp_path / "a.png"))
    assert (got == grey[..., None]).all()


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_fills_0_to_255(tmp_path, suffix):
    deep = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    got = pixels(save(Image.fromarray(deep), tmp_path / f"a.{suffix}"))
    assert got[0, :, 0].tolist() == [0, 1, 128, 255]


def test_16_bit_dark_image_stays_dark(tmp_path):
    deep = np.full((4, 4), 10 * 257, np.uint16)
    assert (pixels(save(Image.fromarray(deep), tmp_path / "a.png")) == 10).all()


@pytest.mark.parametrize(
    ("values", "value_range", "expected"),
    [
        (np.array([[0, 1, 2048, 4095, 9999]], np.uint16), (0, 4095), [0, 0, 128, 255, 255]),
        (np.array([[0, 512, 1023]], np.uint16), (0, 1023), [0, 128, 255]),
        (np.array([[-5, 128 * 257, 65535]], np.int32), (0, 65535), [0, 128, 255]),
        (np.array([[-2, -1, 0, 1, 2]], np.float32), (-1, 1), [0, 0, 128, 255, 255]),
        (np.array([[np.nan, np.inf, -np.inf, 128, 500]], np.float32), (0, 255), [0, 255, 0, 128, 255]),
    ],
)
def test_one_range_for_all_images_that_are_deep(tmp_path, values, value_range, expected):
    path = save(Image.fromarray(values), tmp_path / "a.tif")
    assert np.asarray(load_rgb(path, value_range))[0, :, 0].tolist() == expected
    with Image.open(path) as picture:
        assert np.asarray(as_rgb(picture, value_range))[0, :, 0].tolist() == expected


def test_values_without_a_range_are_refused_by_name(tmp_path):
    for dtype in (np.float32, np.int32):
        path = save(Image.fromarray(np.ones((4, 4), dtype)), tmp_path / "a.tif")
        with pytest.raises(UserError, match=r"a\.tif: floating-point and 32-bit values.*--value-range LOW HIGH"):
            load_rgb(path)
        with pytest.raises(UserError, match=r"the picture: floating-point"):
            as_rgb(Image.open(path))


def png_of(pixels):
    """A PNG of 16-bit colours, which Pillow does not write: (H,W,3) or, with opacity, (H,W,4) or grey (H,W,2)."""
    height, width, bands = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[bands], 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("write, suffix", [(png_of, "png"), (tiff_of, "tif")])
def test_16_bit_colours_keep_all_their_bits(tmp_path, write, suffix):
    colours = np.random.default_rng(0).integers(0, 4096, (5, 7, 3), dtype=np.uint16)
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(write(colours))
    values, size = load_deep(path)
    assert (values == colours).all() and size == (5, 7)
    assert (np.asarray(load_rgb(path, (0, 4095))) == np.rint(colours / 4095 * 255)).all()
    assert np.abs(pixels(path) - colours / 257).max() <= 1


def test_opacity_of_16_bits(tmp_path):
    pixel = np.array([[[4095, 0, 2048, 65535], [0, 0, 0, 0]]], np.uint16)
    (tmp_path / "a.png").write_bytes(png_of(pixel))
    assert np.asarray(load_rgb(tmp_path / "a.png", (0, 4095))).tolist() == [[[255, 0, 128], [255] * 3]]
    (tmp_path / "a.png").write_bytes(png_of(pixel[..., 2:]))
    assert np.asarray(load_rgb(tmp_path / "a.png", (0, 4095))).tolist() == [[[128] * 3, [255] * 3]]


@pytest.mark.parametrize("dtype, full", [(np.uint8, 255), (np.uint16, 65535)])
def test_white_may_be_zero_at_any_depth(tmp_path, dtype, full):
    values = np.array([[0, full // 5, full]], dtype)
    (tmp_path / "a.tif").write_bytes(tiff_of(values, white_is_zero=True))
    assert pixels(tmp_path / "a.tif")[0, :, 0].tolist() == [255, 204, 0]
    assert np.asarray(as_rgb(Image.open(tmp_path / "a.tif")))[0, :, 0].tolist() == [255, 204, 0]
    assert np.asarray(load_mask(tmp_path / "a.tif"))[0].tolist() == [255, 255, 0]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("deflate", [False, True])
def test_floating_point_of_any_length_order_and_compression(tmp_path, dtype, order, deflate):
    values = np.random.default_rng(0).normal(0, 1000, (5, 7)).astype(dtype)
    (tmp_path / "a.tif").write_bytes(tiff_of(values, order=order, deflate=deflate))
    found, size = load_deep(tmp_path / "a.tif")
    assert size == (5, 7) and np.array_equal(found, values.astype(np.float32))


@pytest.mark.parametrize("kind", [1, 2])
def test_the_second_of_two_bands_is_opacity_if_the_file_says_so(tmp_path, kind):
    grey = np.array([[[60, 255], [0, 0], [60, 120]]], np.uint8)  # in kind 1 grey is multiplied by opacity
    (tmp_path / "a.tif").write_bytes(tiff_of(grey, extra=kind))
    opaque = 60 * 255 / 120 if kind == 1 else 60
    expected = [60, 255, 255 - (255 - opaque) * 120 / 255]
    assert pixels(tmp_path / "a.tif")[0, :, 0].tolist() == pytest.approx(expected, abs=1)
    assert np.array_equal(np.asarray(as_rgb(Image.open(tmp_path / "a.tif"))), pixels(tmp_path / "a.tif"))
    assert np.asarray(load_mask(tmp_path / "a.tif")).tolist() == [[255, 0, 255]]


@pytest.mark.parametrize(
    "values, form",
    [
        (np.zeros((4, 5), np.float16), "1 band of 16 bits in floating point"),
        (np.zeros((4, 5, 2), np.uint8), "2 bands of 8 bits"),
        (np.zeros((4, 5, 5), np.uint16), "5 bands of 16 bits"),
        (np.zeros((4, 5, 3), np.float32), "3 bands of 32 bits in floating point"),
    ],
)
def test_sound_tiffs_that_are_not_read_are_not_called_broken(tmp_path, values, form):
    (tmp_path / "a.tif").write_bytes(tiff_of(values))
    with pytest.raises(
        UserError, match=rf"a\.tif: a TIFF with {form}, which is not read; save (it|the bands that matter) with"
    ) as error:
        load_rgb(tmp_path / "a.tif")
    assert "broken" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([0, 255], np.uint16), (0, 255)),
        (np.array([300, 1023], np.uint16), (0, 1023)),
        (np.array([0, 3977], np.uint16), (0, 4095)),
        (np.array([0, 65000], np.uint16), (0, 65535)),
        (np.array([0.02, 0.97], np.float32), (0, 1)),
        (np.array([-0.01, 1.02], np.float32), (0, 1)),
        (np.array([3, np.nan, np.inf, 250], np.float32), (0, 255)),
        (np.array([-1.0, 1.0], np.float32), (-1.2, 1.2)),
        (np.array([100.0, 100.5], np.float32), (99.95, 100.55)),
        (np.array([-500, 500], np.int32), (-600, 600)),
    ],
)
def test_the_range_that_is_found(values, expected):
    assert common_range([extremes_of(values[:1]), extremes_of(values)]) == pytest.approx(expected)


def test_palette_shows_its_colours(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([200, 30, 40, 1, 2, 3])
    image.putpixel((1, 0), 1)
    assert pixels(save(image, tmp_path / "a.png")).tolist() == [[[200, 30, 40], [1, 2, 3]]]
    assert pixels(save(image, tmp_path / "b.png", transparency=0)).tolist() == [[[255] * 3, [1, 2, 3]]]


def test_transparent_parts_show_white(tmp_path):
    clear = Image.new("RGBA", (2, 1), (10, 20, 30, 0))
    clear.putpixel((1, 0), (0, 0, 0, 128))
    assert pixels(save(clear, tmp_path / "a.png")).tolist() == [[[255] * 3, [127] * 3]]
    assert pixels(save(Image.new("LA", (1, 1), (7, 0)), tmp_path / "b.png")).tolist() == [[[255] * 3]]
    assert pixels(save(Image.new("RGB", (1, 1), (7, 8, 9)), tmp_path / "c.png", transparency=(7, 8, 9))).min() == 255


def test_transparent_parts_of_a_large_image_show_white_too(tmp_path, monkeypatch):
    path = save(Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 4), np.uint8)), tmp_path / "a.png")
    whole = pixels(path)
    monkeypatch.setattr(reading, "AT_ONCE", 14)  # two rows
    assert np.array_equal(pixels(path), whole)


@pytest.mark.parametrize("suffix", ["tif", "jpg"])
def test_cmyk_shows_its_colours(tmp_path, suffix):
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    got = pixels(save(red, tmp_path / f"a.{suffix}", quality=95)).reshape(-1, 3).mean(axis=0)
    assert np.abs(got - [255, 0, 0]).max() < 8


def test_exif_turns_image_and_mask_upright(tmp_path):
    image = Image.new("L", (4, 2))
    image.putpixel((0, 0), 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: top left is shown top right
    path = save(image, tmp_path / "a.png", exif=exif)
    assert pixels(path).shape == (4, 2, 3)
    assert pixels(path)[0, 1].tolist() == [255] * 3
    assert load_mask(path).size == (2, 4)
    assert load_mask(path).getpixel((1, 0)) == 255


def test_masks_of_all_kinds_become_0_and_255(tmp_path):
    defect = np.zeros((16, 16), np.uint8)
    defect[4:9, 5:13] = 1
    palette = Image.fromarray(defect).convert("P")
    palette.putpalette([0, 0, 0, 128, 0, 0])
    inverse = Image.fromarray(1 - defect).convert("P")  # index 0 is white here: colours count, not indices
    inverse.putpalette([255, 255, 255, 0, 0, 0])
    colour = np.zeros((16, 16, 3), np.uint8)
    colour[..., 2] = defect
    clear = np.dstack([np.full((16, 16, 3), 255, np.uint8), defect * 255])
    masks = {
        "one.png": Image.fromarray(defect),
        "bit.png": Image.fromarray(defect * 255).convert("1"),
        "palette.png": palette,
        "inverse.png": inverse,
        "colour.png": Image.fromarray(colour),
        "clear.png": Image.fromarray(clear),
        "deep.png": Image.fromarray(defect.astype(np.uint16)),
        "float.tif": Image.fromarray(defect.astype(np.float32)),
        "bmp.bmp": Image.fromarray(defect * 255),
    }
    for name, mask in masks.items():
        got = load_mask(save(mask, tmp_path / name))
        assert got.mode == "L"
        assert (np.asarray(got) == defect * 255).all(), name


def test_jpeg_traces_are_no_defects(tmp_path):
    defect = np.zeros((32, 32), np.uint8)
    defect[5:20, 7:23] = 255
    path = save(Image.fromarray(defect), tmp_path / "a.jpg", quality=40)
    assert (np.asarray(Image.open(path))[defect == 0] > 0).any()  # there are traces
    assert (np.asarray(load_mask(path)) == defect).all()


@pytest.mark.parametrize("load", [load_rgb, load_mask])
@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tif"])
@pytest.mark.parametrize("kept", [0, 0.02, 0.5])
def test_truncated_files_are_named(tmp_path, load, suffix, kept):
    whole = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(whole, format={"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix))
    path = tmp_path / f"half.{suffix}"
    path.write_bytes(whole.getvalue()[: int(len(whole.getvalue()) * kept)])
    with pytest.raises(UserError, match=r"half\.") as error:
        load(path)
    assert "\n" not in str(error.value)


def test_missing_file_text_file_and_folder_are_named(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    for name in ("missing.png", "text.png", "folder.png"):
        with pytest.raises(UserError, match=name):
            load_rgb(tmp_path / name)


def test_too_large_an_image_is_named(tmp_path, monkeypatch):
    path = save(Image.new("L", (100, 100)), tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    with pytest.raises(UserError, match=r"large\.png.*megapixels"):
        load_rgb(path)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("least, factor", [(None, 1), (130, 1), (120, 2), (40, 4), (1, 8)])
def test_a_large_jpeg_is_read_smaller_and_upright(tmp_path, turned, least, factor):
    coarse = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    whole = Image.fromarray(coarse).resize((400, 240))
    exif = Image.Exif()
    exif[0x0112] = 6 if turned else 1  # turned: stored on its side
    stored = whole.transpose(Image.Transpose.ROTATE_90) if turned else whole
    path = save(stored, tmp_path / "a.jpg", quality=95, exif=exif)
    found, size = load_reduced(path, least)
    assert size == (240, 400) and found.size == (400 // factor, 240 // factor)
    difference = np.asarray(found, int) - np.asarray(load_rgb(path).resize(found.size, Image.Resampling.BOX), int)
    assert np.abs(difference).mean() < 4


@pytest.mark.parametrize("shape", [(1, 1), (3, 4), (70_000, 2), (2, 70_000)])
def test_a_map_is_read_as_it_was_written_by_pillow_too(tmp_path, shape):
    values, path = np.random.default_rng(0).standard_normal(shape).astype(np.float32), tmp_path / "map.tiff"
    write_map(path, values)
    assert np.array_equal(mapped(path), values) and np.array_equal(np.asarray(Image.open(path)), values)


def test_what_is_no_jpeg_is_read_whole(tmp_path):
    path = save(Image.new("RGB", (400, 240)), tmp_path / "a.png")
    found, size = load_reduced(path, 1)
    assert (found.size, size) == ((400, 240), (240, 400))


def paged(path, number, **options):
    """A file of several pages, told apart by their grey."""
    pages = [Image.new("L", (4, 3), 60 * page) for page in range(number)]
    pages[0].save(path, save_all=True, append_images=pages[1:], **options)
    return path


@pytest.mark.parametrize("name", ["a.tif", "a.gif", "a.webp", "a.png", "a.avif"])
def test_each_page_is_an_image(tmp_path, name):
    path = paged(tmp_path / name, 3)
    pages = pages_of(path)
    assert [page.name for page in pages] == [f"{name}#1", f"{name}#2", f"{name}#3"]
    assert [stem_of(page) for page in pages] == ["a#1", "a#2", "a#3"]
    for number, page in enumerate(pages):
        assert np.abs(pixels(page).astype(int) - 60 * number).max() <= 2
        assert load_mask(page).getextrema() == ((255, 255) if number else (0, 0))
    assert images_below(tmp_path) == (pages, [])
    with pytest.raises(UserError, match=rf"{name}: has 3 pages; name one: add #2"):
        load_rgb(path)
    with pytest.raises(UserError, match=rf"{name}#4: has no page 4"):
        load_rgb(tmp_path / f"{name}#4")


def test_what_is_one_page(tmp_path):
    single = save(Image.new("L", (4, 3)), tmp_path / "a.tif")
    own_name = save(Image.new("L", (4, 3), 7), tmp_path / "a.tif#2", format="PNG")
    broken = tmp_path / "b.tif"
    broken.write_bytes(b"II*")
    for path in (single, broken):
        assert pages_of(path) == [path]
    assert (pixels(own_name) == 7).all()


def test_a_tiff_s_small_copies_and_masks_are_no_pages(tmp_path):
    pages = [Image.new("L", (8, 8), 10), Image.new("L", (4, 4), 20), Image.new("L", (8, 8), 30)]
    path = tmp_path / "a.tif"
    with TiffImagePlugin.AppendingTiffWriter(path, True) as file:
        for page, kind in zip(pages, (0, 1, 2), strict=True):
            page.save(file, "TIFF", tiffinfo={254: kind})
            file.newFrame()
    assert [page.name for page in pages_of(path)] == ["a.tif#1", "a.tif#3"]
    assert (pixels(tmp_path / "a.tif#3") == 30).all()


COLOURS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
GREY = COLOURS[..., 0]


@pytest.mark.parametrize(
    "array, value_range, expected",
    [
        (COLOURS, None, COLOURS),
        (COLOURS[:, ::-1], None, COLOURS[:, ::-1]),
        (COLOURS.transpose(2, 0, 1), None, COLOURS),
        (GREY, None, GREY),
        (GREY[..., None], None, GREY),
        (GREY[None], None, GREY),
        (GREY > 99, None, 255 * (GREY > 99)),
        (np.dstack([COLOURS, np.full_like(GREY, 255)]), None, COLOURS),
        (np.dstack([COLOURS, np.zeros_like(GREY)]), None, np.full_like(COLOURS, 255)),
        (COLOURS.astype(np.uint16) * 257, None, COLOURS),
        (GREY.astype(np.uint16) * 16, (0, 4080), GREY),
        (COLOURS / 255, (0, 1), COLOURS),
        ((COLOURS / 255).astype(np.float32).transpose(2, 0, 1), (0, 1), COLOURS),
        (COLOURS.astype(np.int64), (0, 255), COLOURS),
    ],
)
def test_arrays_and_tensors_are_taken_as_they_are_meant(array, value_range, expected):
    expected = expected if expected.ndim == 3 else np.repeat(expected[..., None], 3, 2)
    assert (np.asarray(picture_of(array, value_range)) == expected).all()
    assert (np.asarray(picture_of(torch.from_numpy(array.copy()), value_range)) == expected).all()


@pytest.mark.parametrize(
    "image, told",
    [
        (COLOURS / 255, r"an array of float64: which values are black and white.*convert it to uint8"),
        (COLOURS.astype(np.int32), r"an array of int32: which values"),
        (COLOURS[None], r"an array \(1, 5, 7, 3\) of uint8: a detector takes"),
        (COLOURS[..., :2], r"an array \(5, 7, 2\) of uint8"),
        (COLOURS[:0], r"an array \(0, 7, 3\) of uint8"),
        (COLOURS.astype(complex), "an array of complex128: a detector takes"),
        (np.array("a"), "an array"),
        (b"\x89PNG", "bytes: a detector takes a file's path, a Pillow picture, or an array"),
        ([[1, 2], [3, 4]], "list: a detector takes"),
        (None, "NoneType: a detector takes"),
    ],
)
def test_what_is_no_image_is_refused_with_what_is_taken(image, told):
    with pytest.raises(UserError, match=told):
        picture_of(image)


def test_is_image_by_suffix(tmp_path):
    assert all(is_image(tmp_path / name) for name in ("a.png", "a.JPG", "a.Jpeg", "a.bmp", "a.TIF", "a.tiff"))
    assert not any(is_image(tmp_path / name) for name in ("a.mpg", "a.txt", "Thumbs.db", "._a.png", "png"))


def test_no_torch_is_needed():
    path = f"sys.path.insert(0, {str(ROOT / 'src')!r})"
    code = f"import sys; {path}; from student_teacher.images import reading; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


NAMES = ("a.png", "b.JPG", "c.webp", "d.jfif", "e.jp2", "f.ppm", "g.avif", "h.gif", "i.bmp", "j.TIF", "k.tga", "l.qoi")


@pytest.fixture
def mixed(tmp_path):
    """A folder with an image of each kind, two without an ending, a linked folder with a loop, and other files."""
    folder, linked = tmp_path / "mixed", tmp_path / "linked"
    folder.mkdir()
    linked.mkdir()
    kinds = Image.registered_extensions()
    for name in NAMES:
        Image.new("RGB", (16, 16), (200, 30, 40)).save(folder / name, kinds[Path(name).suffix.lower()])
    for place in (folder / "noending", folder / "scan.001", linked / "inside.png"):
        Image.new("RGB", (16, 16), (200, 30, 40)).save(place, "PNG")
    (folder / "links").symlink_to(linked)
    (linked / "loop").symlink_to(folder)
    (folder / "gone.png").symlink_to(tmp_path / "nowhere")
    for name in ("notes.txt", "README", ".hidden.png", "film.mpg"):
        (folder / name).write_text("no image")
    (folder / ".trash").mkdir()
    os.mkfifo(folder / "pipe.png")
    return folder


def test_what_pillow_reads_is_found_links_are_followed_and_the_rest_is_told(mixed):
    images, others = images_below(mixed)
    expected = {*NAMES, "noending", "scan.001", "links/inside.png", "gone.png"}
    assert {str(path.relative_to(mixed)) for path in images} == expected
    assert images == sorted(images)
    for path in images:
        if path.name != "gone.png":
            assert np.abs(pixels(path).astype(int) - (200, 30, 40)).max() < 30, path
    rest = ["notes.txt", "README", ".hidden.png", "film.mpg", ".trash", "pipe.png"]
    assert [path.name for path in others] == sorted(rest)
    assert "passed over 6 files" in told(others, mixed) and told(others, mixed).endswith(" and 1 more")


@pytest.mark.parametrize("suffix", ["heic", "jxl", "dng", "exr", "eps"])
def test_images_of_other_formats_are_found_and_refused_by_name(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(b"something else")
    assert is_image(path)
    with pytest.raises(UserError, match=rf"a\.{suffix}: .*({suffix}|pillow-heif|not an image)"):
        load_rgb(path)


def test_pillow_heif_is_used_where_it_is_installed(tmp_path):
    (tmp_path / "pillow_heif.py").write_text(
        "from PIL import Image, PngImagePlugin\n"
        "def register_heif_opener():\n"
        "    Image.register_open('HEIF', PngImagePlugin.PngImageFile, lambda start: start[:4] == b'\\x89PNG')\n"
        "    Image.register_extension('HEIF', '.heic')\n"
    )
    Image.new("RGB", (3, 2), (1, 2, 3)).save(tmp_path / "a.heic", "PNG")
    code = (
        "import sys; from student_teacher.images import reading as r; from pathlib import Path; p = Path(sys.argv[1])"
    )
    code += "; assert r.HEIF and '.heic' in r.readable_suffixes(); print(r.load_rgb(p).getpixel((0, 0)))"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{tmp_path}"}
    command = [sys.executable, "-c", code, tmp_path / "a.heic"]
    assert subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout == "(1, 2, 3)\n"
