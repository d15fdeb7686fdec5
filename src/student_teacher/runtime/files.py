"""Files that appear complete or not at all."""

import contextlib
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from student_teacher.runtime.errors import UserError


def write_atomically(path: Path, content: bytes | memoryview | str) -> None:
    """Write a temporary file beside `path`, then rename it: an older file stays until the new one is complete.

    Text is written as UTF-8; undecodable bytes of file names become question marks. Permissions are those of any new
    file. Raises UserError if the file can't be written.
    """
    if isinstance(content, str):
        content = content.encode(errors="replace")
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")  # not of mkstemp, which ignores the umask
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("xb") as file:
                file.write(content)
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
        raise UserError(f"{path} can't be written: {error.strerror or error}") from error


def make_folder(path: Path) -> None:
    """Make a folder and its parents. Raises UserError if it can't be made, or files can't be written into it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UserError(f"{path} can't be written into: {error.strerror or error}") from error
