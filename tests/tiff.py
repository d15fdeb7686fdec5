"""TIFFs as no writer at hand makes them: any number of bands, any type, either end for white."""

import struct
import zlib

import numpy as np


def tiff_of(
    pixels: np.ndarray,
    white_is_zero: bool = False,
    *,
    order: str = "<",
    deflate: bool = False,
    extra: int | None = None,
) -> bytes:
    """A TIFF of (H,W) or (H,W,C) values of any type.

    `order` is that of bytes, "<" or ">"; `extra` the tag ExtraSamples.
    """
    pixels = np.ascontiguousarray(pixels)
    content = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    content = zlib.compress(content) if deflate else content
    height, width, *more = pixels.shape
    bands = more[0] if more else 1
    kind, bits = {"u": 1, "i": 2, "f": 3}[pixels.dtype.kind], 8 * pixels.dtype.itemsize
    photometric = 0 if white_is_zero else 2 if bands >= 3 else 1
    tags = [(256, "I", [width]), (257, "I", [height]), (258, "H", [bits] * bands), (259, "H", [8 if deflate else 1])]
    tags += [(262, "H", [photometric]), (273, "I", None), (277, "H", [bands]), (278, "I", [height])]
    tags += [(279, "I", [len(content)])]
    tags += [(338, "H", [extra])] if extra is not None else []
    tags += [(339, "H", [kind] * bands)]
    start = 8 + 2 + 12 * len(tags) + 4
    behind = [2 * bands if bands > 2 else 0] * 2  # of tags 258 and 339, which do not fit into their entries
    data = start + sum(behind)
    entries, values = b"", b""
    for tag, form, numbers in tags:
        packed = struct.pack(f"{order}{len(numbers or [0])}{form}", *(numbers or [data]))
        if len(packed) > 4:
            place = struct.pack(f"{order}I", start + len(values))
            values += packed
            packed = place
        entries += struct.pack(f"{order}HHI", tag, {"H": 3, "I": 4}[form], len(numbers or [0])) + packed.ljust(4, b"\0")
    head = struct.pack(f"{order}2sHIH", b"II" if order == "<" else b"MM", 42, 8, len(tags))
    return head + entries + bytes(4) + values + content
