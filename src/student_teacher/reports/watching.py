"""Images looked at as they arrive, in folders or named on standard input: a decision as soon as a file is whole."""

import csv
import hashlib
import io
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import TextIO

from student_teacher.detection.decisions import Decisions
from student_teacher.detection.Detector import Detector
from student_teacher.images.folders import files_below, told
from student_teacher.images.reading import is_image, pages_of
from student_teacher.reports.inspection import COLUMNS, Inspector, Outputs, Row, stamp_of, write_tables
from student_teacher.runtime.errors import UserError, shown
from student_teacher.runtime.files import real_path, remove_unfinished, writing
from student_teacher.runtime.ledger import Ledger, own_files
from student_teacher.runtime.resume_log import ResumeLog
from student_teacher.runtime.stopping import stops_later

PAUSE = 0.1  # seconds from one look to the next
PATIENCE = 5.0  # seconds until a file that does not change, and can't be read, is named
STANDARD_INPUT = Path("-")
LOG = "watch.log"

Stamp = list[int]  # size and time of the last change: as a JSON file holds it


class Folders:
    """The images in folders and their subfolders, whenever one looks, but for those below `output`.

    Links are followed. A folder that can't be read is named once.
    """

    ended = False

    def __init__(self, folders: Sequence[Path], output: Path):
        for folder in folders:
            if not folder.is_dir():
                raise UserError(f"{folder}: not a folder; --watch takes folders, or --input - for paths line by line")
        if len({folder.resolve().name for folder in folders}) < len(folders):
            raise UserError("--watch: two folders of the same name; watch them one by one")
        self._folders, self._output, self._unreadable = folders, real_path(output), set()

    def __call__(self) -> Iterator[Path]:
        """Every file that may be an image."""
        for folder in self._folders:
            yield from sorted(files_below(folder, self._refuse))

    def _refuse(self, error):
        if not isinstance(error, FileNotFoundError) and error.filename not in self._unreadable:
            self._unreadable.add(error.filename)
            print(f"not looked into: {shown(error.filename)} ({error.strerror})", file=sys.stderr, flush=True)

    def wants(self, path: Path) -> bool:
        """Whether a whole file is an image."""
        return is_image(path) and not self._is_result(path)

    def name_of(self, path: Path) -> Path:
        """The name of an image's results."""
        folder = next(folder for folder in self._folders if path.is_relative_to(folder))
        return Path(folder.resolve().name) / path.relative_to(folder)

    def forget(self, path: Path) -> None:
        """The file is decided."""

    def told(self, others: Sequence[Path]) -> list[str]:
        """A line for each folder that counts and names the files in it that are not wanted."""
        others = [path for path in others if not self._is_result(path)]
        below = {folder: [path for path in others if path.is_relative_to(folder)] for folder in self._folders}
        return [told(files, folder) for folder, files in below.items() if files]

    def _is_result(self, path):
        return real_path(path).is_relative_to(self._output)


class Lines:
    """The paths that stand on lines of a text, such as standard input, as they come."""

    def __init__(self, text: TextIO):
        self._queue: SimpleQueue[Path | None] = SimpleQueue()
        self._waiting: dict[Path, None] = {}
        self._closed = False
        Thread(target=self._read, args=[text], daemon=True).start()

    def _read(self, text):
        for line in text:
            if line := line.rstrip("\r\n"):
                self._queue.put(Path(line))
        self._queue.put(None)

    def __call__(self) -> list[Path]:
        """Every path that was named and is not decided."""
        while not self._queue.empty():
            path = self._queue.get()
            if path is None:
                self._closed = True
            else:
                self._waiting[path] = None
        return list(self._waiting)

    @property
    def ended(self) -> bool:
        """Whether no path is left, nor will come."""
        return self._closed and not self._waiting and self._queue.empty()

    def wants(self, path: Path) -> bool:
        """Every file that is named is wanted."""
        return True

    def name_of(self, path: Path) -> Path:
        """The name of an image's results."""
        return Path(*path.absolute().parts[1:])  # two folders may have an image of the same name

    def forget(self, path: Path) -> None:
        """The path is decided."""
        self._waiting.pop(path, None)

    def told(self, others: Sequence[Path]) -> list[str]:
        """Nothing: every file is wanted."""
        return []


class Watch:
    """Decides on files that arrive, until `stopped()`, and writes a line for each image."""

    def __init__(self, inspector: Inspector, source: Folders | Lines, log: ResumeLog, stopped: Callable[[], bool]):
        self._inspector, self._source, self._log, self._stopped = inspector, source, log, stopped
        # By path: its stamp, of each page path and row, and what pages a kill may have left files of.
        self.done: dict[str, list] = log.entries()
        self.broken: set[Path] = set()
        self._seen: dict[Path, Stamp | None] = {}  # in the last look
        self._left: dict[Path, Stamp | None] = {}  # no images, or broken for too long
        self._others: set[Path] = set()  # no images
        self._failed: dict[Path, tuple[Stamp | None, float]] = {}  # can't be read, since when

    def look(self, write: Callable[[Sequence[tuple[str, Row]]], None]) -> bool:
        """Decide on files that are whole by now; whether there were any. `write` gets the paths and rows of each."""
        ready, decided = [], False
        for path in self._source():
            stamp = _stamp(path)
            settled, self._seen[path] = self._seen.get(path, ()) == stamp, stamp
            if (known := self.done.get(str(path))) and known[0] == stamp:
                if isinstance(self._source, Lines):  # asked again, answered again
                    write([(page, Row(*row)) for page, row in known[1]])
                self._source.forget(path)
            elif settled and self._left.get(path, ()) != stamp:
                if self._source.wants(path):
                    self._others.discard(path)
                    ready.append((path, stamp, pages_of(path) if stamp else [path]))
                else:
                    self._left[path] = stamp
                    self._others.add(path)
        for path, _, pages in ready if self._inspector.outputs.kinds else ():
            self._log.put(str(path), [*self.done.get(str(path), [[], []])[:2], list(map(str, pages))])
        files = [file for path, _, pages in ready for file in self._files(path, pages)]
        with closing(self._inspector.inspected(files)) as found:
            for path, stamp, pages in ready:
                if self._stopped():
                    break
                decided |= self._decide(path, stamp, {page: next(found)[1] for page in pages}, write)
        return decided

    def passed_over(self) -> list[str]:
        """Lines that count and name the files that are there, but are no images by name."""
        return self._source.told(sorted(path for path in self._others if path.is_symlink() or path.exists()))

    def _files(self, path, pages):
        name = self._source.name_of(path)
        return [(0, page, name.with_name(page.name)) for page in pages]

    def _decide(self, path, stamp, found, write):
        if errors := [row for row in found.values() if isinstance(row, str)]:
            self._put_off(path, stamp, errors[0])
            return False
        rows = [(str(page), row) for page, row in found.items()]
        self.done[str(path)] = [stamp, rows]
        self._log.put(str(path), [stamp, rows])
        self.broken.discard(path)
        self._source.forget(path)
        write(rows)
        return True

    def _put_off(self, path, stamp, error):
        """Try a file again that can't be read, perhaps as it is not whole yet; when it no longer changes, name it."""
        before, since = self._failed.get(path, ((), 0.0))
        if before != stamp:
            since = time.monotonic()
        self._failed[path] = stamp, since
        if time.monotonic() - since > PATIENCE:
            print(f"not inspected: {shown(error)}", file=sys.stderr, flush=True)
            self._left[path] = stamp
            self.broken.add(path)
            self._source.forget(path)


def written_before(log: ResumeLog, source: Folders | Lines, output: Path) -> set[Path]:
    """Maps and overlays of the images in the log, as far as they are there; what is half-written is removed."""
    pages = [
        (path, page)
        for path, (_, rows, *begun) in log.entries().items()
        for page in {*(page for page, _ in rows), *(page for each in begun for page in each)}
    ]
    names = [source.name_of(Path(path)).with_name(Path(page).name) for path, page in pages]
    outputs = Outputs(output, frozenset({"maps", "overlays"}))
    pictures = {picture for name in names for picture in outputs.pictures_of(name)}
    remove_unfinished(pictures)
    return {picture for picture in pictures if picture.exists()}


def watch(detector: Detector, decisions: Decisions, paths: Sequence[Path], outputs: Outputs, *, overwrite: bool) -> int:
    """Decide on images as they arrive, until Ctrl-C or the end of the input; the number that could not be read.

    `paths` are folders, or STANDARD_INPUT alone. Each decision is a line on standard output and in decisions.csv, at
    once. What was decided before, by the same detector with the same thresholds, is not decided again, unless the file
    has changed. Raises UserError if results would go into a watched folder, or replace others.
    """
    text = list(paths) == [STANDARD_INPUT]
    output = outputs.folder
    if isinstance(sys.stdin, io.TextIOWrapper):  # else a name that is not UTF-8 would end the reading
        sys.stdin.reconfigure(errors="surrogateescape")
    source = Lines(sys.stdin) if text else Folders(paths, output)
    if not text and any(output.resolve().is_relative_to(path.resolve()) for path in paths):
        raise UserError(f"{output} lies in a folder that is watched: give another --output")
    key = f"{detector.fingerprint} {decisions}"
    told = " ".join(["--watch --input", *(str(path if text else path.absolute()) for path in paths)])
    told += f" by detector and thresholds {hashlib.sha256(key.encode()).hexdigest()[:8]}"
    files = [output / name for name in (LOG, "decisions.csv", "regions.csv")]
    own = own_files(output)
    ledger = Ledger(output, told, files, overwrite=overwrite)
    log = ResumeLog(output / LOG, key)
    own |= {path.resolve() for path in written_before(log, source, output)}
    there = {
        path for folder in ("anomaly_maps", "overlays") for path in (output / folder).rglob("*.*") if path.is_file()
    }
    if (others := {path for path in there if path.resolve() not in own}) and not overwrite:
        raise UserError(f"{min(others)}: not written by this command: move it away, or give another --output")
    rows = [(page, Row(*row)) for _, pages, *_ in log.entries().values() for page, row in pages]
    write_tables(output, rows)
    with stops_later() as stopped, _appended(files[1]) as decided, _appended(files[2]) as regions:
        watching = Watch(Inspector(detector, decisions, outputs), source, log, stopped)

        def write(rows: Sequence[tuple[str, Row]]) -> None:
            for stream, lines, place in (
                (regions, ([path, *cells] for path, row in rows for cells in row.regions), writing(files[2])),
                (decided, ([path, *row.cells] for path, row in rows), writing(files[1])),
                (sys.stdout, ([path, *row.cells] for path, row in rows), nullcontext()),
            ):
                with place:
                    csv.writer(stream, lineterminator="\n").writerows(lines)
                    stream.flush()

        print(",".join(COLUMNS), flush=True)
        while not (source.ended or stopped()):
            if not watching.look(write):
                time.sleep(PAUSE)
    for line in watching.passed_over():
        print(line, file=sys.stderr)
    ledger.finish([*files, *written_before(log, source, output)])
    return len(watching.broken)


def _appended(path):
    """A table, opened to add rows, in the encoding of `write_atomically`."""
    return path.open("a", newline="", encoding="utf-8", errors="replace")


def _stamp(path):
    """The size and time of a file; None while it is missing or empty."""
    found = stamp_of(path)
    return found if found and found[0] else None
