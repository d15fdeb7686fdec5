"""The project's folders."""

import os
from argparse import ArgumentParser
from pathlib import Path

from student_teacher.runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
PRETRAINED = "pretrained"  # the folder in model/ with the teachers that ship with the project


def category_name(text: str) -> str:
    """The category's name, without the slash that shell completion adds. Raises UserError if it is a path."""
    name = text.rstrip(f"/{os.sep}")
    if not name or name.startswith((".", "-")) or Path(name).name != name:
        raise UserError(f"'{text}': give a category's plain name, such as carpet")
    return name


def add_folders(options: ArgumentParser, *folders: str) -> None:
    """Add an option for each of the project's folders named, to use another folder instead."""
    for folder in folders:
        options.add_argument(
            f"--{folder}",
            type=Path,
            default=ROOT / folder,
            metavar="DIR",
            help=f"use this instead of the project's folder {folder}/",
        )
