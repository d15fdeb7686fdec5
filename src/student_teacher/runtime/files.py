"""Files that appear complete or not at all."""

import contextlib
import hashlib
import os
import re
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from student_teacher.runtime.errors import UserError


def write_atomically(path: Path, content: bytes | memoryview | str | Callable[[BinaryIO], None]) -> None:
    """Write a temporary file beside `path`, then rename it: an older file stays until the new one is complete.

    Text is written as UTF-8; undecodable bytes of file names become question marks. Instead of the content, a function
    can write it into the open file. Permissions are those of any new file. Raises UserError if it can't be written.
    """
    if isinstance(content, str):
        content = content.encode(errors="replace")
    # Not of mkstemp, which ignores the umask.
    temporary = path.with_name(f".{_beginning(path.name)}.{uuid.uuid4().hex[:8]}")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("xb") as file:
                content(file) if callable(content) else file.write(content)
                file.flush()
                os.fsync(file.fileno())  # else a power cut could leave an empty file under the new name
            temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):  # such as a folder that can't be written: the first error says so
            temporary.unlink()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError into a UserError that says that `path` can't be written, and why."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or f"{error}; is the disk full?"  # NumPy says only how many values were not written
        raise UserError(f"{path} can't be written: {reason}") from error


def _beginning(name, length=200):
    """As much of a file's name as has so many bytes."""
    return os.fsencode(name)[:length].decode(errors="ignore") if len(os.fsencode(name)) > length else name


def remove_unfinished(files: Iterable[Path]) -> None:
    """Remove what a kill has left of these files while they were being written."""
    names: dict[Path, set[str]] = {}
    for path in files:
        names.setdefault(path.parent, set()).add(_beginning(path.name))
    for folder, own in names.items():
        for path in folder.iterdir() if folder.is_dir() else ():
            found = re.fullmatch(r"\.(.+)\.[0-9a-f]{8}", path.name, re.DOTALL)
            if found and found[1] in own:
                path.unlink(missing_ok=True)


def fitting(path: Path) -> Path:
    """The path; where its name is longer than file systems take, 255 bytes, with a digest in place of its middle."""
    name = os.fsencode(path.name)
    if len(name) <= 255:
        return path
    return path.with_name(f"{_beginning(path.name)}~{hashlib.sha256(name).hexdigest()[:16]}{path.suffix}")


def real_path(path: Path) -> Path:
    """The path without links; unlike Path.resolve also where links lead in a circle."""
    return Path(os.path.realpath(path))


def make_folder(path: Path) -> None:
    """Make a folder and its parents. Raises UserError if it can't be made, or files can't be written into it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UserError(f"{path} can't be written into: {error.strerror or error}") from error
