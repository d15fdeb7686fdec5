"""A category's folder, checked and turned into its index: train/good, test/KIND, ground_truth/KIND/NAME_mask.png."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from student_teacher.images.folders import told
from student_teacher.images.index import COLUMNS, write_index
from student_teacher.images.reading import is_image, load_mask, load_rgb
from student_teacher.runtime.errors import UserError


def index_category(category: Path) -> list[dict[str, str | int]]:
    """Check all images of a category's folder, write its index unless it is there already, and return its rows.

    Raises:
        UserError: something is wrong; every wrong thing is named.
    """
    rows, problems, others = list_images(category)
    broken, unmarked = check_images(category, rows)
    problems += broken
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError("\n  ".join([f"{category}: {count}, no index written", *problems]))
    if others:
        print(told(others, category), file=sys.stderr)
    for mask in unmarked:
        print(f"{mask}: marks nothing, so the defect has no pixels to be found", file=sys.stderr)
    write_index(category / f"{category.name}.csv", rows)
    return rows


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
            if is_image(file):
                masks[file.stem] = file
            else:
                others.append(file)
        unused, seen = set(masks.values()), {}
        for image in images:
            stem = Path(image).stem
            if seen.setdefault(stem, image) != image:  # maps and figures are named by it
                problems.append(f"{image}: has the name of {seen[stem]}, but for the ending; rename one")
            mask = masks.get(f"{stem}_mask", masks.get(stem))
            if kind == "good" or without_masks:
                mask = None
            elif mask is None:
                expected = f"ground_truth/{kind}/{stem}_mask.png"
                problems.append(f"{image}: a defect without a mask; add {expected}, or move the image to test/good")
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
                    images.append(name)
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


def check_images(category: Path, rows: list[dict[str, str | int]]) -> tuple[list[str], list[str]]:
    """Open every image and mask once.

    Returns:
        what cannot be read or does not fit each other, one line each; and the masks without a defect in them.
    """
    problems, unmarked = [], []

    def check(row):
        opened = []
        for name, load in ((row["image_name"], load_rgb), (row["gt_name"], load_mask)):
            if name:
                try:
                    opened.append(load(category / name))
                except UserError as error:
                    opened.append(str(error).replace(str(category / name), name, 1))
        errors = [line for line in opened if isinstance(line, str)]
        if errors or len(opened) == 1:
            return errors, False
        image_size, mask_size = (f"{one.width}x{one.height}" for one in opened)
        if image_size != mask_size:
            errors = [f"{row['gt_name']}: {mask_size}, but {row['image_name']} is {image_size}; they must agree"]
        return errors, opened[1].getbbox() is None

    with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter's lock
        checks = tqdm(pool.map(check, rows), total=len(rows), desc="checking", unit="image", disable=None)
        for row, (errors, empty) in zip(rows, checks, strict=True):
            problems += errors
            unmarked += [row["gt_name"]] * empty
    return problems, unmarked
