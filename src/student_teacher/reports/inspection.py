"""New images, without labels: a score, a p-value, a decision, a map and a picture of each."""

import csv
import hashlib
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from student_teacher.detection.Detector import Detector, at_own_size
from student_teacher.images.folders import images_below, told
from student_teacher.images.reading import at_most, encoded, file_and_page, load_reduced, pages_of
from student_teacher.reports import figures
from student_teacher.reports.result_page import LARGE_SIDE, ResultPage, page_files
from student_teacher.runtime import distributed
from student_teacher.runtime.bars import with_bar
from student_teacher.runtime.errors import UserError
from student_teacher.runtime.files import write_whole
from student_teacher.runtime.ledger import Ledger, own_files
from student_teacher.runtime.prefetch import prefetched
from student_teacher.runtime.resume_log import Progress

COLUMNS = ("path", "image_score", "p_value", "anomalous", "anomalous_pixels")


def files_in(paths: Sequence[Path], output: Path) -> tuple[list[tuple[Path, Path]], list[str]]:
    """Each image among `paths` and in folders below them, with the name under which its results are written.

    In folders, what is hidden or no image is passed over, and the pictures that an earlier run has left in `output`:
    the second result counts and names these, a line for each of `paths`. A file that is named is taken as it is.
    Each page of a file is an image, `name.tif#2`. Raises UserError where a path does not exist, or where there is no
    image.
    """
    own = own_files(output)
    found: dict[Path, Path] = {}
    passed_over = []
    for path in paths:
        if path.is_dir():
            images, others = images_below(path)
            theirs = [image for image in images if file_and_page(image)[0].resolve() not in own]
            found |= {file: Path(path.resolve().name) / file.relative_to(path) for file in theirs}
            if others := [file for file in others if file.resolve() not in own]:
                passed_over.append(told(others, path))
            if len(theirs) < len(images):
                passed_over.append(f"{output}: passed over {len(images) - len(theirs)} pictures of earlier results")
        elif path.exists():
            found |= {page: Path(page.name) for page in pages_of(path)}
        elif file_and_page(path)[1]:
            found[path] = Path(path.name)
        else:
            raise UserError(f"{path}: no such file or folder; --input takes images, or folders with images in them")
    if not found:
        raise UserError("; ".join([f"{', '.join(map(str, paths))}: no images in there", *passed_over]))
    taken: set[Path] = set()
    for path, name in found.items():  # two folders of the same name would overwrite each other
        number = 1
        while found[path] in taken:
            number += 1
            found[path] = name.with_stem(f"{name.stem}-{number}")
        taken.add(found[path])
    return list(found.items()), passed_over


class LookedAt(NamedTuple):
    """A file, and what the detector says of it; `error` where it could not be read."""

    number: int
    name: Path
    error: str = ""
    picture: Image.Image | None = None
    size: tuple[int, int] | None = None
    anomaly_map: Tensor | None = None
    score: float = 0.0


class Inspector:
    """Looks at images, and writes of each what it found: threads load and write while others are looked at."""

    def __init__(
        self,
        detector: Detector,
        output: Path,
        page: ResultPage,
        progress: Progress,
        *,
        kind: str,
        rates: Sequence[float],
    ):
        """`kind` of image score; `rates`: of false alarms, of images and of pixels."""
        self.detector, self.output, self.page, self.progress = detector, output, page, progress
        self.kind, self.rate = kind, rates[0]
        self.pixel_threshold = detector.calibration.pixel_threshold(rates[1]) if detector.calibration else None
        # 0 is usual on good images; the colours end well above what their pixels reach.
        self.highest = 10.0 if self.pixel_threshold is None else max(1.0, 2 * self.pixel_threshold)

    def inspected(self, files: Sequence[tuple[int, Path, Path]]) -> Iterator[tuple[Path, list[str] | str]]:
        """For each number, path and name: the name, and the row of the table, or why the file can't be read."""
        looked_at = map(self._look_at, files, prefetched(self._load, files))
        return prefetched(self._write, looked_at, finish=True)

    def _load(self, file):
        try:
            return load_reduced(file[1], shown_side(self.detector), self.detector.value_range)
        except UserError as error:
            return str(error)

    def _look_at(self, file, loaded):
        number, _, name = file
        if isinstance(loaded, str):
            return LookedAt(number, name, loaded)
        return LookedAt(number, name, "", *loaded, *self.detector.look_at(loaded[0], self.kind))

    def _write(self, found):
        if found.error:
            return found.name, found.error
        anomaly_map = at_own_size(found.anomaly_map, found.size)
        map_path, overlay_path = pictures_of(self.output, found.name)
        write_whole(map_path, encoded(Image.fromarray(anomaly_map), "TIFF"))
        picture = at_most(found.picture, LARGE_SIDE)
        shown_map = at_own_size(found.anomaly_map, picture.size[::-1])
        self.page.save_image(found.number, picture)
        self.page.save_map(found.number, shown_map, 0, self.highest)
        shown = figures.overlay(np.asarray(picture), shown_map, 0, self.highest)
        p_value = self.detector.p_value_of(found.score, self.kind)
        row = [f"{found.score:.6g}"]
        if p_value is None:
            row += ["", "", ""]
        else:
            shown = figures.outline(shown, shown_map >= self.pixel_threshold, max(1, max(picture.size) // 200))
            above = (anomaly_map >= self.pixel_threshold).sum()
            row += [f"{p_value:.6g}", str(int(p_value <= self.rate)), str(int(above))]
        write_whole(overlay_path, encoded(Image.fromarray(shown), "JPEG", **figures.JPEG))
        self.progress.put(str(found.name), row)
        return found.name, row


def pictures_of(output: Path, name: Path) -> tuple[Path, Path]:
    """Where map and overlay of an image go."""
    return tuple(
        output / folder / name.with_name(f"{name.name}.{suffix}")
        for folder, suffix in (("anomaly_maps", "tiff"), ("overlays", "jpg"))
    )


def inspect(
    detector: Detector,
    paths: Sequence[Path],
    output: Path,
    category: str,
    kind: str,
    false_alarm_rate: float,
    pixel_false_alarm_rate: float,
    *,
    overwrite: bool = False,
) -> int:
    """Look at all images of `paths`, write what is found under `output`, and return how many could not be read.

    decisions.csv has a line for each image; anomaly_maps/ float32 TIFFs at the images' own size; overlays/ the maps on
    the images, at most LARGE_SIDE long, on one colour scale, pixels above the pixel threshold outlined; index.html
    shows all of them, the most anomalous first. Goes on after a stop. Each of several processes looks at its share of
    the images, and the first writes table and page. Raises UserError where files that are not ours, or the results of
    other `paths`, would be replaced, unless to `overwrite`.
    """
    calibration = detector.calibration
    files, passed_over = files_in(paths, output)
    source = " ".join(["--input", *(str(path.absolute()) for path in paths)])
    unfinished, table_path = output / "inspection.unfinished", output / "decisions.csv"
    written = [unfinished, *_written(output, enumerate(name for _, name in files))]
    ledger = Ledger(output, source, written, overwrite=overwrite, inputs=[file_and_page(path)[0] for path, _ in files])
    # Not by the files' contents: one that can't be read shall not stop the others.
    stamps = [(str(name), (found := file_and_page(path)[0].stat()).st_size, found.st_mtime_ns) for path, name in files]
    digest = hashlib.sha256(repr(stamps).encode()).hexdigest()
    options = f"{detector.fingerprint} {kind} {false_alarm_rate} {pixel_false_alarm_rate}"
    progress = Progress(unfinished, f"{options} {digest}")
    page = ResultPage(output, category)
    numbered = [(number, *file) for number, file in enumerate(files)]
    rows = {
        name: row
        for number, _, name in numbered
        if (row := progress.get(str(name))) and page.picture_of(number).exists()
    }
    broken = {}
    wanted = distributed.share([file for file in numbered if file[-1] not in rows])
    rates = false_alarm_rate, pixel_false_alarm_rate
    inspector = Inspector(detector, output, page, progress, kind=kind, rates=rates)
    for name, row in with_bar(inspector.inspected(wanted), len(wanted), "images"):
        (broken if isinstance(row, str) else rows)[name] = row
    for others in distributed.gathered((rows, broken)):
        for found, theirs in zip((rows, broken), others, strict=True):
            found |= theirs
    if distributed.is_first():
        table = _table([[str(path), *rows[name]] for path, name in files if name in rows])
        write_whole(table_path, table)
        least = calibration.threshold(false_alarm_rate, kind) if calibration else None
        from_score = min((float(row[0]) for row in rows.values() if row[2] == "1"), default=least)
        for number, path, name in numbered:
            if name in rows:
                folder = name.parent if name.parent.name else Path(path.resolve().parent.name)
                page.add(number, name.name, str(folder), label=None, score=float(rows[name][0]))
        page_path = page.finish({}, threshold=from_score)
        print(f"{len(rows)} images, {table_path}; page to look at: {page_path}")
        if calibration:
            flagged = sum(row[2] == "1" for row in rows.values())
            print(f"{flagged} called anomalous, at a false-alarm rate of {false_alarm_rate:g}: scores from {least:.4g}")
        for line in passed_over:
            print(line, file=sys.stderr)
        for _, name in files:
            if name in broken:
                print(f"not inspected: {broken[name]}", file=sys.stderr)
    progress.finish()
    ledger.finish(_written(output, ((number, name) for number, _, name in numbered if name in rows)))
    return len(broken)


def _written(output, numbered):
    """All files that are written of images with these numbers and names."""
    numbered = list(numbered)
    pictures = [path for _, name in numbered for path in pictures_of(output, name)]
    return [output / "decisions.csv", *pictures, *page_files(output, (number for number, _ in numbered))]


def shown_side(detector: Detector) -> int | None:
    """How long the sides of a picture must be at least, for the detector to see all and for the page."""
    return detector.least_side and max(LARGE_SIDE, detector.least_side)


def _table(rows: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([COLUMNS, *rows])
    return text.getvalue()
