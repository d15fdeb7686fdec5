"""What a long job has done so far, so that it goes on after a stop."""

import glob
import json
from pathlib import Path
from threading import Lock
from typing import Any

from student_teacher.runtime import distributed
from student_teacher.runtime.files import write_atomically


class ResumeLog:
    """Named numbers, texts or lists of them, kept in a file from one run to the next until `finish`.

    `key` says what they hang on: with another key than the file's, the job starts anew. Of several processes each has a
    file of its own beside `path`, and reads those of all.
    """

    def __init__(self, path: Path, key: str):
        self._path = path
        self._entries: dict[str, Any] = {}
        for file in self._files():
            lines = file.read_text().splitlines()
            for line in lines[1:] if lines[:1] == [json.dumps(key)] else []:
                try:
                    name, value = json.loads(line)
                except ValueError:  # the stop came while it was being written
                    continue
                self._entries[name] = value
        distributed.wait_for_all()  # until they have read, too
        if distributed.is_first():
            entries = [json.dumps(key), *map(json.dumps, self._entries.items())]
            write_atomically(path, "\n".join(entries) + "\n")
            # Else those of another key would be taken for the truth again when that key comes back.
            for file in set(self._files()) - {path}:
                file.unlink()
        distributed.wait_for_all()
        if not distributed.is_first():
            path = path.with_name(f"{path.name}.{distributed.rank()}")
            write_atomically(path, json.dumps(key) + "\n")
        self._file = path.open("a")
        self._lock = Lock()

    def get(self, name: str) -> Any:
        """What was put under this name, None if nothing was."""
        return self._entries.get(name)

    def put(self, name: str, value: Any) -> None:
        """Keep it; threads may do so at once."""
        with self._lock:
            self._file.write(json.dumps([name, value]) + "\n")
            self._file.flush()

    def finish(self) -> None:
        """The job is done, in all processes: the next one starts anew."""
        self._file.close()
        if distributed.is_first():
            for file in self._files():
                file.unlink()

    def _files(self) -> list[Path]:
        return sorted(self._path.parent.glob(f"{glob.escape(self._path.name)}*"))
