"""A category's folder, checked and turned into its index."""

import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from student_teacher.images.folders import changes, entries, files_below, listed, told
from student_teacher.images.index import (
    LEARNED,
    digest_of_index,
    index_path,
    read_index,
    read_settings,
    write_index,
)
from student_teacher.images.layouts import list_images, split_file
from student_teacher.images.masks import Mask, look_at_mask, warnings_of
from student_teacher.images.reading import ValueRange, load_deep
from student_teacher.images.value_range import Extremes, common_range, extremes_of
from student_teacher.runtime.errors import UserError, shown
from student_teacher.runtime.files import real_path
from student_teacher.runtime.prefetch import processors


def index_category(
    category: Path,
    value_range: ValueRange | str | None = None,
    mask_threshold: float | str | None = None,
    split_csv: Path | str | None = None,
    *,
    index: Path | None = None,
) -> list[dict[str, str | int]]:
    """Check all images of a category's folder, write index and settings unless they are there, and return the rows.

    `value_range` of images of more than 8 bits: None for that of the training images, or the one that was given before;
    "auto" for that of the training images anyway. `mask_threshold` is that of `load_mask`, `split_csv` that of
    `list_images`; None for the one that was given before, "auto" for none. `index` says where the index is, as for
    `index_path`.

    Raises:
        UserError: something is wrong; every wrong thing is named.
    """
    _require_own(category, index)
    before = read_settings(category, index)
    threshold = {None: before["mask_threshold"], "auto": None}.get(mask_threshold, mask_threshold)
    given = {None: before["split_csv"], "auto": None}.get(split_csv, split_csv)
    given = given and str(Path(given).absolute())
    files = _files(category, split_file(category, given))  # first: what comes or changes meanwhile is seen next time
    listing = list_images(category, given)
    rows, problems, others = listing.rows, listing.problems, listing.others
    checked = check_images(category, rows, threshold)
    problems += [problem for row in checked for problem in row.problems]
    if value_range is None and before["given"]:
        value_range = before["value_range"]
    settings = _range_settings(rows, checked, value_range, problems)
    settings |= {"mask_threshold": threshold, "split_csv": given, "files": files}
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError("\n  ".join([f"{category}: {count}, no index written", *map(shown, problems)]))
    print(f"layout: {'; '.join(listing.layout)}")
    if others:
        print(told(others, category), file=sys.stderr)
    masks = [(row["gt_name"], found.mask) for row, found in zip(rows, checked, strict=True) if found.mask]
    for line in warnings_of(masks, thresholded=threshold is not None):
        print(line, file=sys.stderr)
    _tell_range(rows, checked, settings)
    write_index(category, rows, settings, index)
    return rows


def _require_own(category, index):
    """Raise UserError where the index's place is among the images, or taken by another file."""
    if index is None:
        return
    path, folder = index_path(category, index), real_path(category)
    if folder in real_path(path).parent.parents:
        raise UserError(f"{path}: among the images; give --index a file elsewhere")
    if path.exists():
        read_index(category, index)


def renew_index(category: Path, index: Path | None = None) -> None:
    """Bring the index up to date where files in the folder have come, gone or changed since it was written.

    By their names, sizes and times. An index that was changed by hand stays as it is. `index`: as for `index_path`.

    Raises:
        UserError: there is no index, or it is not one; it is of an earlier version and does not fit the folder; or
            something is wrong with the images.
    """
    path = index_path(category, index)
    rows, settings = read_index(category, index), read_settings(category, index)
    if settings["files"] is None:
        there = list_images(category).rows
        if change := changes({row["image_name"]: row for row in rows}, {row["image_name"]: row for row in there}):
            raise UserError(f"{path} does not say what lies there ({change}): run ./mvtec_dataset.sh {category.name}")
    elif settings["index"] != digest_of_index(path):
        print(f"{path} was changed by hand: it is taken as it is", file=sys.stderr)
    elif change := changes(settings["files"], _files(category, split_file(category, settings["split_csv"]))):
        print(f"{path} is written again: {change}")
        index_category(category, index=index)


def is_current(category: Path, index: Path | None = None) -> bool:
    """Whether no file in the folder, nor the one that splits it, has come, gone or changed since the index was made.

    `index`: as for `index_path`.
    """
    try:
        settings = read_settings(category, index)
        return settings["files"] == _files(category, split_file(category, settings["split_csv"]))
    except UserError:  # who reads it for use says so
        return False


def _files(category, split):
    """Size and time of all that lies in the folders of a category and is not hidden, and of the file that splits it."""
    folders = [entry for entry in entries(category) if entry.is_dir() and not entry.name.startswith(".")]
    files = {path.relative_to(category).as_posix(): path for folder in folders for path in files_below(folder)}
    files |= {f"{split.parent.name}/{split.name}": split} if split else {}
    return {
        name: [(found := path.stat()).st_size, found.st_mtime_ns]
        for name, path in files.items()
        if not path.name.startswith(".") and _is_file(path)
    }


def _is_file(path):
    try:
        return path.is_file()
    except OSError:  # no permission to look: reading it says so
        return False


def _range_settings(rows, checked, value_range, problems):
    """The settings of the value range; adds a problem if training images have no range in common."""
    if value_range not in (None, "auto"):
        return {"value_range": list(value_range), "given": True}
    deep = [
        (row["image_name"], found.extremes)
        for row, found in zip(rows, checked, strict=True)
        if found.extremes and row["type"] in LEARNED
    ]
    if not deep:
        return {"value_range": None, "given": False}
    for name, extremes in deep:
        if extremes.integers != deep[0][1].integers:
            problems.append(
                f"{name}: {deep[0][0]} holds integers, this one floating point, or the other way round; save them "
                "alike, or give --value-range LOW HIGH"
            )
            break
    return {"value_range": list(common_range([extremes for _, extremes in deep])), "given": False}


def _tell_range(rows, checked, settings):
    """Say which values become black and white, and which images lie beyond."""
    if settings["value_range"] is None:
        return
    low, high = settings["value_range"]
    deep = [(row, found.extremes) for row, found in zip(rows, checked, strict=True) if found.extremes]
    train = [extremes for row, extremes in deep if row["type"] in LEARNED]
    used = (
        f"{len(train)} training images have {min(one.low for one in train):g} to {max(one.high for one in train):g}"
        if train
        else "no training image has more than 8 bits"
    )
    way = "given" if settings["given"] else "found; --value-range LOW HIGH sets others"
    print(f"values {low:g} to {high:g} become black to white ({way}): {used}")
    beyond = [row["image_name"] for row, extremes in deep if extremes.low < low or extremes.high > high]
    _tell_not_finite([row["image_name"] for row, extremes in deep if not extremes.finite])
    if beyond:
        images = "1 image" if len(beyond) == 1 else f"{len(beyond)} images"
        print(f"values beyond {low:g} to {high:g} are cut, in {images}: {listed(beyond)}", file=sys.stderr)


def _tell_not_finite(names):
    if names:
        images = "1 image" if len(names) == 1 else f"{len(names)} images"
        print(f"values that are not finite, in {images}: {listed(names)}; NaN becomes black", file=sys.stderr)


class Checked(NamedTuple):
    """What was found in an image and its mask."""

    problems: list[str]  # what can't be read or does not fit each other, one line each
    mask: Mask | None = None
    extremes: Extremes | None = None  # of an image of more than 8 bits


def check_images(category: Path, rows: list[dict[str, str | int]], threshold: float | None = None) -> list[Checked]:
    """Open every image and mask once, masks with the threshold of `load_mask`: what was found, for each row."""

    def opened(name, load):
        try:
            return load(category / name), []
        except UserError as error:
            return None, [str(error).replace(shown(category / name), shown(name), 1)]

    def check(row):
        image, problems = opened(row["image_name"], load_deep)
        extremes = extremes_of(image[0]) if image and image[0] is not None else None
        if not row["gt_name"]:
            return Checked(problems, extremes=extremes)
        mask, more = opened(row["gt_name"], partial(look_at_mask, threshold=threshold))
        if problems or more:
            return Checked(problems + more)
        image_size, mask_size = (f"{width}x{height}" for height, width in (image[1], mask.size))
        if image_size != mask_size:
            problems = [f"{row['gt_name']}: {mask_size}, but {row['image_name']} is {image_size}; they must agree"]
        return Checked(problems, mask, extremes)

    with ThreadPoolExecutor(processors()) as pool:  # Pillow decodes outside the interpreter's lock
        return list(tqdm(pool.map(check, rows), total=len(rows), desc="checking", unit="image", disable=None))
