"""A log of what a long job has done, so that it can continue after a stop."""

import errno
import glob
import json
import os
from pathlib import Path
from threading import Lock
from typing import Any

from student_teacher.runtime import distributed
from student_teacher.runtime.files import write_atomically, writing


class ResumeLog:
    """Named results (numbers, texts or lists of them), kept in a file from one run to the next until `finish`.

    `key` describes what the results depend on: if the file has another key, its results are dropped. Each of several
    processes writes its own file beside `path` and reads all of them.
    """

    def __init__(self, path: Path, key: str):
        self._path = path
        self._entries: dict[str, Any] = {}
        for file in self._files():
            lines = file.read_text(encoding="utf-8").splitlines()
            for line in lines[1:] if lines[:1] == [json.dumps(key)] else []:
                try:
                    name, value = json.loads(line)
                except ValueError:  # the stop came while it was being written
                    continue
                self._entries[name] = value
        distributed.wait_for_all()  # until the others have read the files too
        if distributed.is_first():
            entries = [json.dumps(key), *map(json.dumps, self._entries.items())]
            write_atomically(path, "\n".join(entries) + "\n")
            # Else old results of another key would be used when that key comes back.
            for file in set(self._files()) - {path}:
                file.unlink()
        distributed.wait_for_all()
        if not distributed.is_first():
            path = path.with_name(f"{path.name}.{distributed.rank()}")
            write_atomically(path, json.dumps(key) + "\n")
        # Unbuffered: else what a full disk refuses is tried again at the very end, with a second message.
        self._file = path.open("ab", buffering=0)
        self._lock = Lock()

    def get(self, name: str) -> Any:
        """The result under this name, None if there is none."""
        return self._entries.get(name)

    def entries(self) -> dict[str, Any]:
        """All results by their names."""
        return dict(self._entries)

    def put(self, name: str, value: Any) -> None:
        """Keep a result. Safe to call from several threads. Raises UserError if it can't be written."""
        line = (json.dumps([name, value]) + "\n").encode()
        with self._lock, writing(self._path):
            self._entries[name] = value
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def finish(self) -> None:
        """Remove the files: the job is done in all processes."""
        self._file.close()
        if distributed.is_first():
            for file in self._files():
                file.unlink()

    def _files(self) -> list[Path]:
        return sorted(self._path.parent.glob(f"{glob.escape(self._path.name)}*"))
