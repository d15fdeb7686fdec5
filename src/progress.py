"""What a long job has done so far, so that it goes on after a stop."""

import json
from pathlib import Path


class Progress:
    """Named numbers, kept in a file from one run to the next until `finish`.

    `key` says what they hang on: with another key than the file's, the job starts anew.
    """

    def __init__(self, path: Path, key: str):
        self._path = path
        self._found: dict[str, float] = {}
        lines = path.read_text().splitlines() if path.exists() else []
        if lines[:1] == [json.dumps(key)]:
            for line in lines[1:]:
                try:
                    name, value = json.loads(line)
                except ValueError:  # the stop came while it was being written
                    continue
                self._found[name] = value
        path.parent.mkdir(parents=True, exist_ok=True)
        entries = [json.dumps(key), *map(json.dumps, self._found.items())]
        path.write_text("\n".join(entries) + "\n")
        self._file = path.open("a")

    def get(self, name: str) -> float | None:
        """What was put under this name, None if nothing was."""
        return self._found.get(name)

    def put(self, name: str, value: float) -> None:
        """Keep a number."""
        self._file.write(json.dumps([name, value]) + "\n")
        self._file.flush()

    def finish(self) -> None:
        """The job is done: the next one starts anew."""
        self._file.close()
        self._path.unlink()
