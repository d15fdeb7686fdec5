"""What lies in folders of images: links are followed, and nothing is passed over without a word."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from student_teacher.images.reading import is_image, pages_of
from student_teacher.runtime.errors import UserError, shown

IGNORED = "ignore.png"  # in a category's folder: regions to ignore, see ignored.py
NAMED = 5  # of the files that are passed over; the others are counted
# What network drives and desktops put into every folder, thumbnails among it: passed over without a word.
LITTER = {
    *("@eadir", "#recycle", "@recycle", "#snapshot", "@recently-snapshot", ".@__thumb", "$recycle.bin", "lost+found"),
    *(".ds_store", "__macosx", ".trashes", ".spotlight-v100", ".fseventsd", "thumbs.db", "desktop.ini"),
    "system volume information",
}


def is_litter(name: str) -> bool:
    """Whether a file or folder of this name is a network drive's or a desktop's own."""
    return name.casefold() in LITTER or name.startswith("._")


def entries(folder: Path) -> list[Path]:
    """What lies in a folder, sorted, without litter; nothing where there is no folder."""
    return sorted(path for path in folder.iterdir() if not is_litter(path.name)) if folder.is_dir() else []


def images_below(folder: Path) -> tuple[list[Path], list[Path]]:
    """All images in a folder and below it, sorted, each page of a file, and the other files that lie there.

    Linked folders are followed, each folder once, so that loops end. Hidden files and folders are not looked into and
    are among the others; litter is not. Raises UserError where a folder can't be read.
    """
    images, others = [], []
    for path in files_below(folder):
        (images if is_image(path) else others).append(path)
    return [page for path in sorted(images) for page in pages_of(path)], sorted(others)


def refuse(error: OSError) -> None:
    """Raise UserError for a folder that can't be read."""
    name = shown(error.filename)
    raise UserError(f"{name}: cannot be read ({error.strerror}); make it readable, or move it away") from None


def files_below(folder: Path, on_error: Callable[[OSError], None] = refuse) -> Iterator[Path]:
    """All files in a folder and below it, and in place of a hidden folder's files the folder; as `images_below`.

    `on_error` is called for a folder that can't be read.
    """
    seen, waiting = set(), [folder]

    while waiting:
        for place, folders, files in os.walk(waiting.pop(0), onerror=on_error):
            if (real := os.path.realpath(place)) in seen:
                folders.clear()
                continue
            seen.add(real)
            root = Path(place)
            folders[:] = sorted(name for name in folders if not is_litter(name))
            yield from (root / name for name in folders if name.startswith("."))
            folders[:] = [name for name in folders if not name.startswith(".")]
            waiting += [root / name for name in folders if (root / name).is_symlink()]
            yield from (root / name for name in files if not is_litter(name))


def told(others: Sequence[Path], root: Path) -> str:
    """One line that counts and names files that are passed over, relative to `root` where they lie below it."""
    names = [str(path.relative_to(root)) if path.is_relative_to(root) else str(path) for path in others]
    files = "1 file" if len(names) == 1 else f"{len(names)} files"
    return f"{shown(root)}: passed over {files}, hidden or not images by name: {listed(names)}"


def listed(names: Sequence[str]) -> str:
    """The first of the names, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(map(shown, names[:NAMED])) + more


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """How many files came, went and changed, and which, from two mappings of names; nothing where they agree."""
    groups = {
        "came": now.keys() - before.keys(),
        "went": before.keys() - now.keys(),
        "changed": {name for name in now.keys() & before.keys() if now[name] != before[name]},
    }
    return "; ".join(f"{len(names)} {what}: {listed(sorted(names))}" for what, names in groups.items() if names)
