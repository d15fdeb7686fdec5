"""A category's folder, checked and turned into its index: train/good, test/KIND, ground_truth/KIND/NAME_mask.png."""

import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from student_teacher.images.folders import changes, listed, told
from student_teacher.images.index import (
    COLUMNS,
    digest_of_index,
    read_index,
    read_settings,
    write_index,
    write_settings,
)
from student_teacher.images.masks import Mask, look_at_mask, warnings_of
from student_teacher.images.reading import ValueRange, is_image, load_deep, pages_of, stem_of
from student_teacher.images.value_range import Extremes, common_range, extremes_of
from student_teacher.runtime.errors import UserError
from student_teacher.runtime.prefetch import processors


def index_category(
    category: Path, value_range: ValueRange | str | None = None, mask_threshold: float | str | None = None
) -> list[dict[str, str | int]]:
    """Check all images of a category's folder, write index and settings unless they are there, and return the rows.

    `value_range` of images of more than 8 bits: None for that of the training images, or the one that was given before;
    "auto" for that of the training images anyway. `mask_threshold` is that of `load_mask`; None for the one that was
    given before, "auto" for none.

    Raises:
        UserError: something is wrong; every wrong thing is named.
    """
    files = _files(category)  # before they are read: what comes or changes meanwhile is seen the next time
    rows, problems, others = list_images(category)
    before = read_settings(category)
    threshold = {None: before["mask_threshold"], "auto": None}.get(mask_threshold, mask_threshold)
    checked = check_images(category, rows, threshold)
    problems += [problem for row in checked for problem in row.problems]
    if value_range is None and before["given"]:
        value_range = before["value_range"]
    settings = _range_settings(rows, checked, value_range, problems) | {"mask_threshold": threshold, "files": files}
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError("\n  ".join([f"{category}: {count}, no index written", *problems]))
    if others:
        print(told(others, category), file=sys.stderr)
    masks = [(row["gt_name"], found.mask) for row, found in zip(rows, checked, strict=True) if found.mask]
    for line in warnings_of(masks, thresholded=threshold is not None):
        print(line, file=sys.stderr)
    _tell_range(rows, checked, settings)
    index = category / f"{category.name}.csv"
    write_index(index, rows)
    write_settings(category, settings | {"index": digest_of_index(index)})
    return rows


def renew_index(category: Path) -> None:
    """Bring the index up to date where files in the folder have come, gone or changed since it was written.

    By their names, sizes and times. An index that was changed by hand stays as it is.

    Raises:
        UserError: there is no index, or it is not one; it is of an earlier version and does not fit the folder; or
            something is wrong with the images.
    """
    path = category / f"{category.name}.csv"
    rows, settings = read_index(path), read_settings(category)
    if settings["files"] is None:
        there = list_images(category)[0]
        if change := changes({row["image_name"]: row for row in rows}, {row["image_name"]: row for row in there}):
            raise UserError(f"{path} does not say what lies there ({change}): run ./mvtec_dataset.sh {category.name}")
    elif settings["index"] != digest_of_index(path):
        print(f"{path} was changed by hand: it is taken as it is", file=sys.stderr)
    elif change := changes(settings["files"], _files(category)):
        print(f"{path} is written again: {change}")
        index_category(category)


def _files(category):
    """Size and time of all that lies in the folders of a category and is not hidden."""
    entries = [
        entry
        for part in ("train", "test", "ground_truth")
        for entry in _entries(category / part)
        if not entry.name.startswith(".")
    ]
    kinds = [file for entry in entries for file in _entries(entry) if not file.name.startswith(".")]
    entries += [*kinds, *(file for kind in kinds for file in _entries(kind))]
    return {
        path.relative_to(category).as_posix(): [(found := path.stat()).st_size, found.st_mtime_ns]
        for path in entries
        if not path.name.startswith(".") and path.is_file()
    }


def _range_settings(rows, checked, value_range, problems):
    """The settings of the value range; adds a problem if training images have no range in common."""
    if value_range not in (None, "auto"):
        return {"value_range": list(value_range), "given": True}
    deep = [
        (row["image_name"], found.extremes)
        for row, found in zip(rows, checked, strict=True)
        if found.extremes and row["type"] == "train"
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
    train = [extremes for row, extremes in deep if row["type"] == "train"]
    used = (
        f"{len(train)} training images have {min(one.low for one in train):g} to {max(one.high for one in train):g}"
        if train
        else "no training image has more than 8 bits"
    )
    way = "given" if settings["given"] else "found; --value-range LOW HIGH sets others"
    print(f"values {low:g} to {high:g} become black to white ({way}): {used}")
    beyond = [row["image_name"] for row, extremes in deep if extremes.low < low or extremes.high > high]
    if beyond:
        images = "1 image" if len(beyond) == 1 else f"{len(beyond)} images"
        print(f"values beyond {low:g} to {high:g} are cut, in {images}: {listed(beyond)}", file=sys.stderr)


def list_images(category: Path) -> tuple[list[dict[str, str | int]], list[str], list[Path]]:
    """What lies in a category's folder, in the index's columns and order; what is wrong with it; what is passed over.

    Raises:
        UserError: there is nothing to train on.
    """
    problems, others = [], []
    train = _kinds(category, "train", problems, others)
    test = _kinds(category, "test", problems, others)
    problems += [
        f"train/{kind}: training takes good images only; move them to test/{kind}, or to train/good if they are good"
        for kind in train
        if kind != "good"
    ]
    if not train.get("good"):
        more = f"; {told(others, category)}" if others else ""
        raise UserError(f"{category / 'train' / 'good'}: no images to train on (PNG, JPEG, TIFF and others){more}")

    rows = [_row(image, "", 0, "train") for image in train["good"]]
    without_masks = not (category / "ground_truth").is_dir()
    for kind, images in test.items():
        masks = {}
        for file in _entries(category / "ground_truth" / kind):
            if file.is_dir() and not file.name.startswith("."):  # MVTec LOCO: a file for each region
                masks[file.name] = file
            elif is_image(file):
                masks |= {stem_of(page): page for page in pages_of(file)}
            else:
                others.append(file)
        unused, seen = set(masks.values()), {}
        for image in images:
            stem = stem_of(image)
            if seen.setdefault(stem, image) != image:  # maps and figures are named by it
                problems.append(f"{image}: has the name of {seen[stem]}, but for the ending; rename one")
            name, mark, page = stem.partition("#")  # of several pages: a mask for each, in one file or in several
            named = (masks.get(each) for each in (f"{stem}_mask", f"{name}_mask{mark}{page}", stem))
            mask = next((each for each in named if each), None)
            if kind == "good" or without_masks:
                mask = None
            unused.discard(mask)
            mask_name = mask.relative_to(category).as_posix() if mask else ""
            rows.append(_row(image, mask_name, int(kind != "good"), "test"))
        others += sorted(unused)  # masks of no image
    return rows, problems, others


def _row(image, mask, label, part):
    return dict(zip(COLUMNS, (image, mask, label, part), strict=True))


def _kinds(category, part, problems, others):
    """The images of every folder in train or test: paths relative to the category, sorted."""
    kinds = {}
    for entry in _entries(category / part):
        if entry.is_dir() and not entry.name.startswith("."):
            images = []
            for file in _entries(entry):
                name = file.relative_to(category).as_posix()
                if file.is_dir() and not file.name.startswith("."):
                    problems.append(f"{name}: a folder where images are expected; move its images to {part}/NAME")
                elif is_image(file):
                    images += [page.relative_to(category).as_posix() for page in pages_of(file)]
                else:
                    others.append(file)
            if images:
                kinds[entry.name] = images
        elif is_image(entry):
            problems.append(f"{part}/{entry.name}: lies in no folder; move it to {part}/good or another folder")
        else:
            others.append(entry)
    return kinds


def _entries(folder):
    """A folder's entries, sorted; none where there is no folder."""
    return sorted(folder.iterdir()) if folder.is_dir() else []


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
            return None, [str(error).replace(str(category / name), name, 1)]

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
