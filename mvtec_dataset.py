"""Check every image of a category and write its index, data/CATEGORY/CATEGORY.csv.

The category is a folder in the layout of MVTec AD: train/good, and where there are any test/good, test/DEFECT and
ground_truth/DEFECT/NAME_mask.png. Where the folder is missing, it is taken out of CATEGORY.tar.xz or
mvtec_anomaly_detection.tar.xz in the data folder.
"""

import argparse
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "src"))

from student_teacher.images.index import COLUMNS, write_index  # noqa: E402
from student_teacher.images.reading import IMAGE_SUFFIXES, is_image, load_mask, load_rgb  # noqa: E402
from student_teacher.runtime.archives import unpack_category  # noqa: E402
from student_teacher.runtime.errors import UserError, run  # noqa: E402
from student_teacher.runtime.paths import category_name  # noqa: E402

WHOLE_ARCHIVE = "mvtec_anomaly_detection.tar.xz"


def prepare(category: Path) -> list[dict[str, str | int]]:
    """Make `category` ready: unpack it if need be, check it, write its index unless it is there already.

    Returns:
        the rows of the index.

    Raises:
        UserError: there is no such category, or something in it is wrong; every wrong thing is named.
    """
    if not category.is_dir() or not any(category.iterdir()):
        archives = [category.parent / f"{category.name}.tar.xz", category.parent / WHOLE_ARCHIVE]
        archive = next((path for path in archives if path.is_file()), None)
        if archive is None:
            raise UserError(f"{category}: no such category; ./mvtec_dataset.sh {category.name} says where to get it")
        unpack_category(archive, category.name, category)

    rows, problems = list_images(category)
    broken, unmarked = check_images(category, rows)
    problems += broken
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError("\n  ".join([f"{category}: {count}, no index written", *problems]))
    for mask in unmarked:
        print(f"{mask}: marks nothing, so the defect has no pixels to be found", file=sys.stderr)
    write_index(category / f"{category.name}.csv", rows)
    return rows


def list_images(category: Path) -> tuple[list[dict[str, str | int]], list[str]]:
    """What lies in a category's folder, in the index's columns and order, and what is wrong with it.

    Raises:
        UserError: there is nothing to train on.
    """
    problems = []
    train = _kinds(category, "train", problems)
    test = _kinds(category, "test", problems)
    problems += [
        f"train/{kind}: training takes good images only; move them to test/{kind}, or to train/good if they are good"
        for kind in train
        if kind != "good"
    ]
    if not train.get("good"):
        raise UserError(f"{category / 'train' / 'good'}: no images to train on ({', '.join(IMAGE_SUFFIXES)})")

    rows = [_row(image, "", 0, "train") for image in train["good"]]
    without_masks = not (category / "ground_truth").is_dir()
    for kind, images in test.items():
        masks = _masks(category / "ground_truth" / kind)
        seen = {}
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
            mask_name = mask.relative_to(category).as_posix() if mask else ""
            rows.append(_row(image, mask_name, int(kind != "good"), "test"))
    return rows, problems


def _row(image, mask, label, part):
    return dict(zip(COLUMNS, (image, mask, label, part), strict=True))


def _kinds(category, part, problems):
    """The images of every folder in train or test: paths relative to the category, sorted."""
    kinds = {}
    folder = category / part
    for entry in _visible(folder):
        if entry.is_dir():
            images = []
            for file in _visible(entry):
                name = file.relative_to(category).as_posix()
                if file.is_dir():
                    problems.append(f"{name}: a folder where images are expected; move its images to {part}/NAME")
                elif is_image(file):
                    images.append(name)
            if images:
                kinds[entry.name] = images
        elif is_image(entry):
            problems.append(f"{part}/{entry.name}: lies in no folder; move it to {part}/good or another folder")
    return kinds


def _masks(folder):
    """The masks in a folder by their name: files, or in MVTec LOCO folders with a file for each region."""
    entries = _visible(folder)
    return {entry.name: entry for entry in entries if entry.is_dir()} | {
        entry.stem: entry for entry in entries if is_image(entry)
    }


def _visible(folder):
    """A folder's entries, sorted, without hidden ones; none where there is no folder."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".")) if folder.is_dir() else []


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


def summary(category: Path, rows: list[dict[str, str | int]]) -> str:
    """What the category holds, in a few lines."""
    count = Counter((row["type"], Path(row["image_name"]).parent.name) for row in rows)
    defects = {kind: number for (part, kind), number in count.items() if part == "test" and kind != "good"}
    lines = [f"{category.name}: {count['train', 'good']} good to train, {count['test', 'good']} good to test"]
    if defects:
        kinds = ", ".join(f"{number} {kind}" for kind, number in defects.items())
        lines[0] += f", {sum(defects.values())} with defects ({kinds})"
    if any(row["label"] and not row["gt_name"] for row in rows):
        lines.append("There is no ground_truth folder: images can be told apart, but nothing can be said of pixels.")
    lines.append(f"index: {category / category.name}.csv")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, prepare the category and say what it holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("category", help="the category's folder in the data folder, such as carpet")
    parser.add_argument("--data", type=Path, default=ROOT / "data", help="folder of the categories (%(default)s)")
    parser.add_argument(
        "--check-leaks",
        action="store_true",
        help="also tell how many test images show a part that is in training, and what knowing that alone is worth",
    )
    arguments = parser.parse_args(arguments)
    category = arguments.data / category_name(arguments.category)
    rows = prepare(category)
    print(summary(category, rows))
    if arguments.check_leaks:
        from student_teacher.reports.leak_report import find_leaks, report  # late: it takes seconds to import

        print(report(find_leaks(category)))


if __name__ == "__main__":
    run(main)
