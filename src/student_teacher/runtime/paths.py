"""Where the project lies, and its folders."""

from argparse import ArgumentParser
from pathlib import Path

from student_teacher.runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
PRETRAINED = "pretrained"  # the folder in model/ of the teachers that ship


def category_name(text: str) -> str:
    """A category as the user names it, without the slash that completion leaves. Raises UserError for a path."""
    name = text.rstrip("/")
    if not name or name.startswith((".", "-")) or "/" in name:
        raise UserError(f"'{text}': wants a category's plain name, such as carpet")
    return name


def add_folders(options: ArgumentParser, *folders: str) -> None:
    """Add an option for each of the project's folders named, to take another in its place."""
    for folder in folders:
        options.add_argument(
            f"--{folder}",
            type=Path,
            default=ROOT / folder,
            metavar="DIR",
            help=f"in place of the project's folder {folder}/",
        )
