"""TIFFs as no writer at hand makes them: any number of bands, any type, either end for white."""

import struct

import numpy as np


def tiff_of(pixels: np.ndarray, white_is_zero: bool = False) -> bytes:
    """An uncompressed TIFF of (H,W) or (H,W,C) values of any type."""
    pixels = np.ascontiguousarray(pixels)
    height, width, *more = pixels.shape
    bands = more[0] if more else 1
    kind, bits = {"u": 1, "i": 2, "f": 3}[pixels.dtype.kind], 8 * pixels.dtype.itemsize
    photometric = 0 if white_is_zero else 2 if bands >= 3 else 1
    tags = [(256, "I", [width]), (257, "I", [height]), (258, "H", [bits] * bands), (259, "H", [1])]
    tags += [(262, "H", [photometric]), (273, "I", None), (277, "H", [bands]), (278, "I", [height])]
    tags += [(279, "I", [pixels.nbytes]), (339, "H", [kind] * bands)]
    start = 8 + 2 + 12 * len(tags) + 4
    behind = [2 * bands if bands > 2 else 0] * 2  # of tags 258 and 339, which do not fit into their entries
    data = start + sum(behind)
    entries, values = b"", b""
    for tag, form, numbers in tags:
        packed = struct.pack(f"<{len(numbers or [0])}{form}", *(numbers or [data]))
        if len(packed) > 4:
            place = struct.pack("<I", start + len(values))
            values += packed
            packed = place
        entries += struct.pack("<HHI", tag, {"H": 3, "I": 4}[form], len(numbers or [0])) + packed.ljust(4, b"\0")
    head = struct.pack("<2sHI", b"II", 42, 8) + struct.pack("<H", len(tags))
    return head + entries + bytes(4) + values + pixels.tobytes()
