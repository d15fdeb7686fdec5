"""Masks of several regions, as in MVTec LOCO: ground_truth/KIND/NAME/000.png, 001.png ..., a file for each region.

A region's grey value is its kind of defect, and CATEGORY/defects_config.json says of each value when a region of that
kind counts as wholly found: a list of `{"pixel_value": 255, "saturation_threshold": 0.5, "relative_saturation": true}`,
where the threshold is a share of the region's area, or a number of pixels.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from student_teacher.images import labelme
from student_teacher.images.reading import load_grey, load_mask, mask_files
from student_teacher.runtime.errors import UserError

CONFIG = "defects_config.json"


class Saturation(NamedTuple):
    """When a region of some kind counts as wholly found."""

    threshold: float
    relative: bool  # the threshold is a share of the region's area; else a number of pixels


def read_saturations(category: Path) -> dict[int, Saturation] | None:
    """When regions saturate, by their grey value; None where the category has no defects_config.json.

    Raises:
        UserError: the file can't be read or is not such a list.
    """
    path = category / CONFIG
    if not path.exists():
        return None
    try:
        found = {int(entry["pixel_value"]): _saturation(entry) for entry in json.loads(path.read_bytes())}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except KeyError as error:
        raise UserError(f"{path}: a kind of defect lacks {error}") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: not a list of defects as in MVTec LOCO ({error}); mend or remove it") from None
    return found


def _saturation(entry):
    threshold, relative = float(entry["saturation_threshold"]), bool(entry["relative_saturation"])
    if not 0 < threshold <= (1 if relative else float("inf")):
        raise ValueError(f"saturation_threshold {threshold:g}, {'a share' if relative else 'a number of pixels'}")
    return Saturation(threshold, relative)


def load_regions(
    mask: Path, saturations: dict[int, Saturation], threshold: float | None = None
) -> list[tuple[np.ndarray, float, bool]]:
    """The regions of a mask, a file or a folder of files: of each its pixels' numbers, row by row, and `Saturation`.

    `threshold` is that of `load_mask`. Files without a defect in them are left out.

    Raises:
        UserError: a file is missing or broken, has several grey values, or one that defects_config.json does not name.
    """
    regions = []
    for path in mask_files(mask):
        if path.suffix.lower() == labelme.SUFFIX:
            raise UserError(f"{path}: shapes have no grey value, which {CONFIG} needs; save masks, or remove that file")
        pixels = np.flatnonzero(load_mask(path, threshold))
        values = np.unique(np.asarray(load_grey(path)).ravel()[pixels]).tolist()
        if not values:
            continue
        if len(values) > 1:
            raise UserError(f"{path}: has the grey values {', '.join(map(str, values))}, where a region has one")
        if values[0] not in saturations:
            raise UserError(f"{path}: {CONFIG} has no kind of defect with the grey value {values[0]}")
        regions.append((pixels, *saturations[values[0]]))
    return regions
