"""Which files in a folder of results are ours: other files are neither overwritten nor removed."""

import json
import textwrap
from collections.abc import Iterable
from pathlib import Path

from student_teacher.runtime import distributed
from student_teacher.runtime.errors import UserError
from student_teacher.runtime.files import make_folder, real_path, remove_unfinished, write_atomically

NAME = ".student_teacher.json"  # in the folder: what its results are of, and the files that were written


class Ledger:
    """The list of files that a command writes in a folder; it is kept there from one run to the next."""

    def __init__(
        self,
        folder: Path,
        source: str,
        files: Iterable[Path],
        *,
        overwrite: bool,
        inputs: Iterable[Path] = (),
        record: Path | None = None,
    ):
        """Claim the folder for this run, and create it if it is missing.

        `source` says where the results come from, such as "--input scans"; `files` are all that may be written, below
        the folder; `inputs` are the files that are read; `record` is the file that keeps the list, if not the folder's
        own. Raises UserError if an input would be replaced; and without
        `overwrite` also if one of the files exists and is not ours, or if the folder has results of another source.
        """
        self._folder, self._source = folder, source
        self._files = {file.relative_to(folder).as_posix() for file in files}
        self._record = record or folder / NAME
        there = _read(self._record)
        self._before = set(there["files"])
        replaced = {real_path(file) for file in inputs} & {real_path(folder / name) for name in self._files}
        if replaced:
            raise UserError(f"{min(replaced)} would be replaced by a result of it: give another --output")
        if not overwrite and there["source"] not in (None, source):
            raise UserError(
                f"{folder} holds the results of {_short(there['source'])}: give another folder for those of "
                f"{_short(source)}, or add --overwrite to replace them"
            )
        taken = [name for name in sorted(self._files - self._before) if (folder / name).exists()]
        if taken and not overwrite:
            more = f" and {len(taken) - 1} more" if len(taken) > 1 else ""
            raise UserError(
                f"{folder / taken[0]}{more}: there already, and not written by this command or by an older version: "
                "move it away, give another folder for results, or add --overwrite to replace it"
            )
        distributed.wait_for_all()  # until all have looked
        if distributed.is_first():
            make_folder(folder)
            make_folder(self._record.parent)
            remove_unfinished([self._record, *(folder / name for name in self._files | self._before)])
            self._write(self._files | self._before)
        distributed.wait_for_all()

    def finish(self, kept: Iterable[Path]) -> None:
        """Remove our files that are not to be kept: those of images that are gone, or that can't be read any more."""
        if not distributed.is_first():
            return
        kept = {file.relative_to(self._folder).as_posix() for file in kept}
        for name in (self._before | self._files) - kept:
            path = self._folder / name
            path.unlink(missing_ok=True)
            while (path := path.parent) != self._folder and path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        self._write(kept)

    def _write(self, files):
        content = {"source": self._source, "files": sorted(files)}
        write_atomically(self._record, json.dumps(content, indent=1) + "\n")


def _short(source):
    return textwrap.shorten(source, 200, placeholder=" ...")


def own_files(folder: Path) -> set[Path]:
    """The files that earlier runs wrote in a folder, as resolved paths."""
    names = _read(folder / NAME)["files"]
    return {real_path(folder / name) for name in (*names, NAME)}


def _read(record):
    try:
        return json.loads(record.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {"source": None, "files": []}
    except (OSError, ValueError) as error:
        raise UserError(f"{record}: cannot be read ({error}); give another folder for results") from None
