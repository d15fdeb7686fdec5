"""The index of a category: a row for each image in data/CATEGORY/CATEGORY.csv; CATEGORY.json says how they are read."""

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from student_teacher.runtime.errors import UserError
from student_teacher.runtime.files import write_atomically

COLUMNS = ("image_name", "gt_name", "label", "type")
LEARNED = ("train", "validation")  # types of good images that students learn from; left out, they calibrate, too
UNLABELLED = -1  # the label of images of which nothing is known
TESTED_BELOW = ("test", "test_public", "Data/Images")  # folders that hold a folder for each kind of defect
NO_SETTINGS = {"value_range": None, "given": False, "mask_threshold": None, "split_csv": None}
NO_SETTINGS |= {"index": None, "files": None}


def place_of(image_name: str) -> PurePosixPath:
    """An image's path below the folder that holds the kinds of defects: cut/000.png of test/cut/000.png."""
    name = PurePosixPath(image_name)
    return next((name.relative_to(folder) for folder in TESTED_BELOW if name.is_relative_to(folder)), name)


def kind_of(row: Mapping[str, str | int]) -> str:
    """An image's kind of defect: the folder that it lies in, those of dates not counted. "good" for good images."""
    if row["label"] == 0:
        return "good"
    folders = place_of(row["image_name"]).parent.parts
    named = [folder for folder in folders if not re.fullmatch(r"[\d\s._-]+", folder)]
    return named[-1] if named else folders[0] if folders else "defect"


def read_index(path: Path) -> list[dict[str, str | int]]:
    """Read a category's index: a dict of COLUMNS for each image, `label` an int: 0 good, 1 defective, or UNLABELLED.

    Raises:
        UserError: the file is missing, or is not an index.
    """
    command = f"run ./mvtec_dataset.sh {path.parent.name}"
    try:
        with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = list(csv.DictReader(file))
        return [{**{column: row[column] for column in COLUMNS}, "label": int(row["label"])} for row in rows]
    except FileNotFoundError:
        missing = "the category has no index yet" if path.parent.is_dir() else "no such category"
        raise UserError(f"{path}: {missing}; {command}") from None
    except (KeyError, ValueError, TypeError, csv.Error):
        raise UserError(f"{path}: no index of a category; {command}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def write_index(path: Path, rows: list[dict[str, str | int]]) -> None:
    """Write the index, whole or not at all; leave it alone where it says the same already.

    Raises:
        UserError: the folder takes no files.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    _write(path, os.fsencode(text.getvalue()))


def digest_of_index(path: Path) -> str:
    """Digest of the index's content: whether it is as it was written."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def read_settings(category: Path) -> dict[str, Any]:
    """How a category's images are read: `value_range`, None where all have 8 bits, and whether it was `given`.

    `mask_threshold` is that of `load_mask`. `split_csv` is the file that splits them, where one was given. `index` and
    `files` say what the index was made of: see indexing.renew_index.

    Raises UserError where the file is there, but can't be read.
    """
    category = Path(category)
    path = category / f"{category.name}.json"
    try:
        return NO_SETTINGS | json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return NO_SETTINGS
    except (OSError, ValueError) as error:
        way = f"remove it and run ./mvtec_dataset.sh {category.name}"
        raise UserError(f"{path}: cannot be read ({error}); {way}") from None


def write_settings(category: Path, settings: Mapping[str, Any]) -> None:
    """Write what `read_settings` reads; leave it alone where it says the same already. Raises UserError as above."""
    _write(category / f"{category.name}.json", (json.dumps(settings, indent=1) + "\n").encode())


def _write(path, content):
    if path.is_file() and path.read_bytes() == content:
        return
    try:
        write_atomically(path, content)
    except UserError as error:
        links = f"make a folder {path.parent.name} elsewhere, with links to what lies in this one"
        raise UserError(f"{error}; make the folder writable, or {links}, and name its parent with --data") from None
