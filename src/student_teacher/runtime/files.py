"""Files that appear complete or not at all."""

import os
import tempfile
from pathlib import Path

from student_teacher.runtime.errors import UserError


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a temporary file beside `path`, then rename it: an older file stays until the new one is complete.

    Text is written as UTF-8; undecodable bytes of file names become question marks. Raises UserError if the file can't
    be written.
    """
    if isinstance(content, str):
        content = content.encode(errors="replace")
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # else a power cut could leave an empty file under the new name
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror or error}") from error
    finally:
        if temporary:
            Path(temporary).unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Make a folder and its parents. Raises UserError if it can't be made, or files can't be written into it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UserError(f"{path} can't be written into: {error.strerror or error}") from error
