"""Check every image of a category and write its index, data/CATEGORY/CATEGORY.csv.

The category is a folder in the layout of MVTec AD: train/good, and where there are any test/good, test/DEFECT and
ground_truth/DEFECT/NAME_mask.png. It may also be in that of MVTec AD 2, MVTec LOCO, VisA or BTAD, or two folders such
as OK and NG: one line says which was found. Where the folder is missing, it is taken out of CATEGORY.tar.xz or
mvtec_anomaly_detection.tar.xz in the data folder.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "src"))

from student_teacher.images.folders import listed  # noqa: E402
from student_teacher.images.index import UNLABELLED, index_path, kind_of  # noqa: E402
from student_teacher.images.indexing import index_category  # noqa: E402
from student_teacher.runtime.archives import unpack_category  # noqa: E402
from student_teacher.runtime.errors import UserError, run  # noqa: E402
from student_teacher.runtime.paths import category_name  # noqa: E402

WHOLE_ARCHIVE = "mvtec_anomaly_detection.tar.xz"


def prepare(category: Path, **reading: Any) -> list[dict[str, str | int]]:
    """Make `category` ready: unpack it if need be, check it, write its index unless it is there already.

    `reading` is how its images are read, and where the index is: see `index_category`.

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
    return index_category(category, **reading)


def summary(category: Path, rows: list[dict[str, str | int]], index: Path | None = None) -> str:
    """What the category holds, and where its index is, in a few lines."""
    count = Counter((row["type"], kind_of(row)) for row in rows)
    defects = {kind: number for (part, kind), number in count.items() if part == "test" and kind != "good"}
    good = [f"{count['train', 'good']} good to train"]
    good += [f"{number} in validation" for number in [count["validation", "good"]] if number]
    lines = [f"{category.name}: {', '.join(good)}, {count['test', 'good']} good to test"]
    if defects:
        kinds = ", ".join(f"{number} {kind}" for kind, number in defects.items())
        lines[0] += f", {sum(defects.values())} with defects ({kinds})"
    private = Counter(row["type"] for row in rows if row["label"] == UNLABELLED)
    lines[0] += "".join(f", {number} in {part} without labels" for part, number in private.items())
    unmasked = [row["image_name"] for row in rows if row["label"] == 1 and not row["gt_name"]]
    if len(unmasked) == sum(defects.values()) > 0:
        lines.append("No defect has a mask: images can be told apart, but nothing can be said of pixels.")
    elif unmasked:
        lines.append(
            f"Without a mask, and so not in figures of pixels: {listed(unmasked)}; a mask is added as "
            "ground_truth/KIND/NAME_mask.png, or drawn with labelme"
        )
    lines.append(f"index: {index_path(category, index)}")
    return "\n".join(lines)


def value_range(words: list[str] | None) -> tuple[float, float] | str | None:
    """What --value-range says, for `index_category`. Raises UserError where it says nothing of use."""
    if words in (None, ["auto"]):
        return words and "auto"
    try:
        low, high = map(float, words)
    except ValueError:
        low = high = 0.0
    if not -float("inf") < low < high < float("inf"):
        raise UserError(f"--value-range {' '.join(words)}: takes two numbers, LOW below HIGH, or auto")
    return low, high


def mask_threshold(text: str) -> float | str:
    """An option's value: a number from 0 to below 255, or auto."""
    try:
        if text == "auto" or 0 <= float(text) < 255:
            return text if text == "auto" else float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text}: takes a number from 0 to below 255, or auto")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("category", help="the category's folder in the data folder, such as carpet")
    parser.add_argument("--data", type=Path, default=ROOT / "data", help="folder of the categories (%(default)s)")
    parser.add_argument(
        "--value-range",
        nargs="+",
        metavar=("LOW", "HIGH"),
        help="the values that become black and white in all images of more than 8 bits, for good; auto: those found on "
        "the training images (default)",
    )
    parser.add_argument(
        "--mask-threshold",
        type=mask_threshold,
        metavar="X",
        help="pixels of masks brighter than this, 0 to 255, are defects, for good; auto: all that are not black, in "
        "JPEGs those above 127 (default)",
    )
    parser.add_argument(
        "--split-csv",
        metavar="FILE",
        help="what is for training and what for testing, for good: a file with columns object, split, label, image and "
        "mask, as VisA's; auto: VisA's own, split_csv/1cls.csv in the data folder (default)",
    )
    parser.add_argument(
        "--index",
        type=Path,
        metavar="FILE",
        help="where the index goes, a .csv, or a folder for CATEGORY.csv; all stages then need the same --index "
        "(default: the category's folder, or below the project's folder index/ if that takes no files)",
    )
    parser.add_argument(
        "--check-leaks",
        action="store_true",
        help="also tell how many test images show a part that is in training, and what knowing that alone is worth",
    )
    parser.add_argument(
        "--split-by-parts",
        type=Path,
        metavar="FILE",
        help="also write a split for --split-csv in which no part is both learned from and tested on",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, prepare the category and say what it holds."""
    arguments = parse_arguments(arguments)
    category = arguments.data / category_name(arguments.category)
    rows = prepare(
        category,
        value_range=value_range(arguments.value_range),
        mask_threshold=arguments.mask_threshold,
        split_csv=arguments.split_csv,
        index=arguments.index,
    )
    print(summary(category, rows, arguments.index))
    if arguments.check_leaks:
        from student_teacher.reports.leak_report import find_leaks, report  # late: it takes seconds to import

        print(report(find_leaks(category, arguments.index)))
    if arguments.split_by_parts:
        from student_teacher.reports.leak_report import write_split

        print(write_split(category, arguments.split_by_parts, arguments.index))


if __name__ == "__main__":
    run(main)
