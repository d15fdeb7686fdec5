"""The index of a category: a row for each image in data/CATEGORY/CATEGORY.csv; CATEGORY.json says how they are read."""

import csv
import errno
import hashlib
import io
import json
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from student_teacher.runtime.errors import UserError
from student_teacher.runtime.files import real_path, write_atomically
from student_teacher.runtime.paths import ROOT

COLUMNS = ("image_name", "gt_name", "label", "type")
LEARNED = ("train", "validation")  # types of good images that students learn from; left out, they calibrate, too
UNLABELLED = -1  # the label of images of which nothing is known
TESTED_BELOW = ("test", "test_public", "Data/Images")  # folders that hold a folder for each kind of defect
NO_SETTINGS = {"value_range": None, "given": False, "mask_threshold": None, "split_csv": None}
NO_SETTINGS |= {"index": None, "files": None, "category": None}
ELSEWHERE = ROOT / "index"  # for indexes of folders that take no files
TAKES_NO_FILES = {errno.EROFS, errno.EACCES, errno.EPERM}


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


def index_path(category: Path, given: Path | None = None) -> Path:
    """The file of a category's index; its settings lie beside it, in a file of the same name with .json.

    `given` is a .csv, or a folder that has CATEGORY.csv. Without it the index is in the category's folder; but where
    there is one in ELSEWHERE, which `write_index` makes for a folder that takes no files, it is that one.
    """
    if given is not None:
        return given if given.suffix.lower() == ".csv" else given / f"{category.name}.csv"
    elsewhere = _elsewhere(category)
    return elsewhere if elsewhere.exists() else category / elsewhere.name


def _elsewhere(category):
    """Named by the folder's own path, however it was reached."""
    real = real_path(category)
    return ELSEWHERE / real.relative_to(real.anchor) / f"{category.name}.csv"


def _command(category, given):
    return f"./mvtec_dataset.sh {category.name}{f' --index {shlex.quote(str(given))}' if given else ''}"


def read_index(category: Path, given: Path | None = None) -> list[dict[str, str | int]]:
    """Read a category's index: a dict of COLUMNS for each image, `label` an int: 0 good, 1 defective, or UNLABELLED.

    `given`: see `index_path`.

    Raises:
        UserError: the file is missing, or is not an index.
    """
    path, command = index_path(category, given), f"run {_command(category, given)}"
    try:
        with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = list(csv.DictReader(file))
        return [{**{column: row[column] for column in COLUMNS}, "label": int(row["label"])} for row in rows]
    except FileNotFoundError:
        missing = "the category has no index yet" if category.is_dir() else "no such category"
        raise UserError(f"{path}: {missing}; {command}") from None
    except (KeyError, ValueError, TypeError, csv.Error):
        raise UserError(f"{path}: no index of a category; move it away, and {command}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def digest_of_index(path: Path) -> str:
    """Digest of the index's content: whether it is as it was written."""
    return _digest(path.read_bytes())


def _digest(content):
    return hashlib.sha256(content).hexdigest()[:16]


def read_settings(category: Path, given: Path | None = None) -> dict[str, Any]:
    """How a category's images are read: `value_range`, None where all have 8 bits, and whether it was `given`.

    `mask_threshold` is that of `load_mask`. `split_csv` is the file that splits them, where one was given. `index` and
    `files` say what the index was made of: see indexing.renew_index. `category` is its name.

    Raises UserError where the file is there, but can't be read, or is of another category.
    """
    path = index_path(category, given).with_suffix(".json")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not (isinstance(content, dict) and content.keys() <= NO_SETTINGS.keys()):
            raise ValueError("not the settings of an index")
    except FileNotFoundError:
        return NO_SETTINGS
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); move it away, and run {_command(category, given)}"
        ) from None
    settings = NO_SETTINGS | content
    if settings["category"] not in (None, category.name):
        raise UserError(f"{path} is of {settings['category']}, not of {category.name}: give another --index")
    return settings


def write_index(
    category: Path, rows: list[dict[str, str | int]], settings: Mapping[str, Any], given: Path | None = None
) -> Path:
    """Write the index and its settings, each whole or not at all; what says the same already is left alone.

    Where the category's folder takes no files they go to ELSEWHERE, unless a place was `given`: see `index_path`.
    Returns the index's path.

    Raises:
        UserError: they can't be written.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    content = os.fsencode(text.getvalue())
    settings = {**settings, "index": _digest(content), "category": category.name}
    path = index_path(category, given)
    try:
        _write(path, content)
        _write(path.with_suffix(".json"), (json.dumps(settings, indent=1) + "\n").encode())
    except UserError as error:
        if given is not None or path.parent != category or error.__cause__.errno not in TAKES_NO_FILES:
            raise UserError(f"{error}; --index FILE names another place for the index") from None
        print(f"{category} takes no files: its index goes below {ELSEWHERE}")
        return write_index(category, rows, settings, _elsewhere(category))
    return path


def _write(path, content):
    if not (path.is_file() and path.read_bytes() == content):
        write_atomically(path, content)
