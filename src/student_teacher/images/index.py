"""The index of a category: a row for each image, in data/CATEGORY/CATEGORY.csv."""

import csv
import io
import os
from pathlib import Path

from student_teacher.runtime.errors import UserError
from student_teacher.runtime.files import write_atomically

COLUMNS = ("image_name", "gt_name", "label", "type")


def read_index(path: Path) -> list[dict[str, str | int]]:
    """Read a category's index: a dict of COLUMNS for each image, `label` an int.

    Raises:
        UserError: the file is missing, or is no index.
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
    content = os.fsencode(text.getvalue())
    if path.is_file() and path.read_bytes() == content:
        return
    try:
        write_atomically(path, content)
    except UserError as error:
        raise UserError(f"{error}; make the folder writable, or copy the category to data/") from None
