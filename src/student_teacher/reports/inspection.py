"""Inspection of new images without labels: score, p-value, decision, map and overlay of each."""

import csv
import hashlib
import io
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from student_teacher.detection.decisions import Decisions
from student_teacher.detection.Detector import Detector
from student_teacher.detection.regions import AnomalousRegion, regions_above
from student_teacher.images.folders import images_below, told
from student_teacher.images.reading import at_most, encoded, file_and_page, load_reduced, pages_of, write_map
from student_teacher.reports import figures
from student_teacher.reports.result_page import LARGE_SIDE, ResultPage, page_files, page_pictures
from student_teacher.runtime import distributed
from student_teacher.runtime.bars import with_bar
from student_teacher.runtime.errors import UserError, shown
from student_teacher.runtime.files import fitting, real_path, write_atomically
from student_teacher.runtime.ledger import Ledger, own_files
from student_teacher.runtime.prefetch import alone, prefetched
from student_teacher.runtime.resume_log import ResumeLog

COLUMNS = ("path", "image_score", "p_value", "anomalous", "anomalous_pixels")
SAVED = ("maps", "overlays", "page")  # what can be written beside the tables
REGION_COLUMNS = ("path", *AnomalousRegion._fields)


def files_in(paths: Sequence[Path], output: Path) -> tuple[list[tuple[Path, Path]], list[str]]:
    """The images in `paths` and their subfolders, each with the name under which its results are written.

    In folders, hidden files, files that are not images, and the results of an earlier run in `output` are skipped: the
    second result counts and names these, a line for each of `paths`. A file that is given itself is always taken. Each
    page of a file is an image, `name.tif#2`. Raises UserError if a path does not exist, or if there are no images.
    """
    own = own_files(output)
    found: dict[Path, Path] = {}
    passed_over = []
    for path in paths:
        if path.is_dir():
            images, others = images_below(path)
            theirs = [image for image in images if real_path(file_and_page(image)[0]) not in own]
            found |= {file: Path(path.resolve().name) / file.relative_to(path) for file in theirs}
            if others := [file for file in others if real_path(file) not in own]:
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


class Prediction(NamedTuple):
    """A file and the detector's result; `error` if it could not be read."""

    number: int
    name: Path
    error: str = ""
    picture: Image.Image | None = None
    size: tuple[int, int] | None = None
    anomaly_map: Tensor | None = None
    score: float = 0.0


@dataclass(frozen=True)
class Outputs:
    """Where results go, and which of `kinds` are written beside the tables."""

    folder: Path
    kinds: frozenset[str] = frozenset(SAVED)

    def pictures_of(self, name: Path) -> list[Path]:
        """Map and overlay of an image, as far as they are written."""
        return [path for kind in ("maps", "overlays") if kind in self.kinds for path in [self.path_of(kind, name)]]

    def files_of(self, number: int, name: Path) -> list[Path]:
        """All files that are written of one image."""
        return self.pictures_of(name) + (page_pictures(self.folder, number) if "page" in self.kinds else [])

    def path_of(self, kind: str, name: Path) -> Path:
        """Where a map or an overlay of an image goes."""
        folder, suffix = {"maps": ("anomaly_maps", "tiff"), "overlays": ("overlays", "jpg")}[kind]
        return self.folder / folder / fitting(name.with_name(f"{name.name}.{suffix}"))

    def written(self, numbered: Iterable[tuple[int, Path]]) -> list[Path]:
        """All files that are written of images with these numbers and names."""
        numbered = list(numbered)
        files = [self.folder / name for name in ("decisions.csv", "regions.csv")]
        files += [path for each in numbered for path in self.files_of(*each)]
        return files + (page_files(self.folder, ()) if "page" in self.kinds else [])


class Row(NamedTuple):
    """What the tables say of an image: the cells of COLUMNS and of REGION_COLUMNS, without its path."""

    cells: list[str]
    regions: list[list[str]]


class Inspector:
    """Predicts images and writes their results: threads load and write while others are predicted."""

    def __init__(
        self,
        detector: Detector,
        decisions: Decisions,
        outputs: Outputs,
        *,
        page: ResultPage | None = None,
        log: ResumeLog | None = None,
    ):
        self.detector, self.decisions = detector, decisions
        self.outputs, self.page, self.log = outputs, page, log
        pictured = outputs.kinds & {"overlays", "page"}
        self.least_side = shown_side(detector) if pictured else detector.least_side
        # Good images have 0 on average; the colour scale ends well above their highest pixels.
        pixel_threshold = decisions.pixel_threshold
        self.highest = 10.0 if pixel_threshold is None else max(1.0, 2 * pixel_threshold)

    def inspected(self, files: Sequence[tuple[int, Path, Path]]) -> Iterator[tuple[Path, Row | str]]:
        """For each (number, path, name): the name, and its row of the table or the reason why it can't be read."""
        # In this order: a generator that is not read to its end loses a Ctrl-C while it is being closed.
        predictions = map(self._predict, prefetched(self._load, files), files)
        return prefetched(self._write, predictions, finish=True)

    def _load(self, file):
        try:
            return load_reduced(file[1], self.least_side, self.detector.value_range)
        except UserError as error:
            return str(error)

    def _predict(self, loaded, file):
        number, _, name = file
        if isinstance(loaded, str):
            return Prediction(number, name, loaded)
        return Prediction(number, name, "", *loaded, *self.detector.predict(loaded[0], self.decisions.image_score))

    def _write(self, prediction):
        if prediction.error:
            return prediction.name, prediction.error
        with alone(prediction.size[0] * prediction.size[1]):
            return prediction.name, self._written(prediction)

    def _written(self, prediction):
        anomaly_map = self.detector.at_own_size(prediction.anomaly_map, prediction.size)
        if "maps" in self.outputs.kinds:
            write_map(self.outputs.path_of("maps", prediction.name), anomaly_map)
        if self.outputs.kinds & {"overlays", "page"}:
            self._write_pictures(prediction)
        row = self._row(prediction.score, anomaly_map)
        if self.log:
            self.log.put(str(prediction.name), row)
        return row

    def _write_pictures(self, prediction):
        picture, threshold = at_most(prediction.picture, LARGE_SIDE), self.decisions.pixel_threshold
        picture = with_ignored(self.detector, picture)
        shown_map = self.detector.at_own_size(prediction.anomaly_map, picture.size[::-1])
        if self.page:
            self.page.save_image(prediction.number, picture)
            self.page.save_map(prediction.number, shown_map, 0, self.highest)
        if "overlays" in self.outputs.kinds:
            shown = figures.overlay(np.asarray(picture), shown_map, 0, self.highest)
            if threshold is not None:
                shown = figures.outline(shown, shown_map >= threshold, max(1, max(picture.size) // 200))
            content = encoded(Image.fromarray(shown), "JPEG", **figures.JPEG)
            write_atomically(self.outputs.path_of("overlays", prediction.name), content)

    def _row(self, score, anomaly_map):
        p_value = self.detector.p_value_of(score, self.decisions.image_score)
        anomalous, threshold = self.decisions.anomalous(score), self.decisions.pixel_threshold
        regions = [] if threshold is None else regions_above(anomaly_map, threshold)
        cells = [
            f"{score:.6g}",
            "" if p_value is None else f"{p_value:.6g}",
            "" if anomalous is None else str(int(anomalous)),
            "" if threshold is None else str(sum(region.area for region in regions)),
        ]
        return Row(cells, [region.cells() for region in regions])


def inspect(
    detector: Detector,
    decisions: Decisions,
    paths: Sequence[Path],
    outputs: Outputs,
    *,
    category: str,
    overwrite: bool = False,
) -> int:
    """Predict all images of `paths`, write the results to `outputs`, and return the number that could not be read.

    decisions.csv has a line for each image, regions.csv one for each region above the pixel threshold. anomaly_maps/
    has float32 TIFFs at the images' own size; overlays/ has the maps over the images, at most LARGE_SIDE long, on one
    colour scale, with pixels above the pixel threshold outlined; index.html shows all images, the most anomalous first.
    Resumes after a stop. Each of several processes takes its share of the images, and the first writes tables and page.
    Raises UserError if files that are not ours, or the results of other `paths`, would be replaced, unless told to
    `overwrite`.
    """
    output = outputs.folder
    files, passed_over = files_in(paths, output)
    source = " ".join(["--input", *(str(path.absolute()) for path in paths)])
    unfinished = output / "inspection.unfinished"
    written = [unfinished, *outputs.written(enumerate(name for _, name in files))]
    ledger = Ledger(output, source, written, overwrite=overwrite, inputs=[file_and_page(path)[0] for path, _ in files])
    # Not from the files' contents: a file that can't be read should not stop the others.
    stamps = [(str(name), stamp_of(path)) for path, name in files]
    digest = hashlib.sha256(repr(stamps).encode()).hexdigest()
    log = ResumeLog(unfinished, f"{detector.fingerprint} {decisions} {sorted(outputs.kinds)} {digest}")
    page = ResultPage(output, category) if "page" in outputs.kinds else None
    numbered = [(number, *file) for number, file in enumerate(files)]
    rows = {
        name: Row(*row)
        for number, _, name in numbered
        if (row := log.get(str(name))) and all(path.exists() for path in outputs.files_of(number, name))
    }
    broken = {}
    wanted = distributed.share([file for file in numbered if file[-1] not in rows])
    inspector = Inspector(detector, decisions, outputs, page=page, log=log)
    for name, row in with_bar(inspector.inspected(wanted), len(wanted), "images"):
        (broken if isinstance(row, str) else rows)[name] = row
    for others in distributed.gathered((rows, broken)):
        for found, theirs in zip((rows, broken), others, strict=True):
            found |= theirs
    if distributed.is_first():
        write_tables(output, [(str(path), rows[name]) for path, name in files if name in rows])
        flagged = [float(row.cells[0]) for row in rows.values() if row.cells[2] == "1"]
        from_score = min(flagged, default=decisions.threshold)
        page_note = f"; result page: {_finished(page, numbered, rows, from_score)}" if page else ""
        print(f"{len(rows)} images, {output / 'decisions.csv'}{page_note}")
        if decisions.threshold is not None:
            from_where = f": scores from {decisions.threshold:.4g}" if decisions.threshold != np.inf else ""
            print(f"{len(flagged)} called anomalous, {decisions.described()}{from_where}")
        for line in (*passed_over, *(f"not inspected: {broken[name]}" for _, name in files if name in broken)):
            print(shown(line), file=sys.stderr)
    log.finish()
    ledger.finish(outputs.written(((number, name) for number, _, name in numbered if name in rows)))
    return len(broken)


def stamp_of(path: Path) -> list[int] | None:
    """Size and time of the last change of an image's file, as JSON holds it; None where it is missing."""
    try:
        found = file_and_page(path)[0].stat()
    except (OSError, ValueError):  # a zero byte in its name
        return None
    return [found.st_size, found.st_mtime_ns]


def _finished(page, numbered, rows, threshold):
    """Write the page of all images that have a row."""
    for number, path, name in numbered:
        if name in rows:
            folder = name.parent if name.parent.name else Path(path.resolve().parent.name)
            page.add(number, name.name, folder.as_posix(), label=None, score=float(rows[name].cells[0]))
    return page.finish({}, threshold=threshold)


def shown_side(detector: Detector) -> int | None:
    """The length that both sides of a picture must have at least, for the detector and for the page."""
    return detector.least_side and max(LARGE_SIDE, detector.least_side)


def with_ignored(detector: Detector, picture: Image.Image) -> Image.Image:
    """The picture with what the detector ignores hatched."""
    ignored = detector.ignored_at(picture.size[::-1])
    return picture if ignored is None else Image.fromarray(figures.hatch(np.asarray(picture), ignored))


def write_tables(folder: Path, rows: Sequence[tuple[str, Row]]) -> None:
    """Write decisions.csv and regions.csv of images' paths and rows."""
    write_atomically(folder / "decisions.csv", table(COLUMNS, ([path, *row.cells] for path, row in rows)))
    write_atomically(folder / "regions.csv", regions_table((path, row.regions) for path, row in rows))


def regions_table(found: Iterable[tuple[str, Sequence[Sequence[str]]]]) -> str:
    """regions.csv of images' paths and AnomalousRegion.cells."""
    return table(REGION_COLUMNS, ([path, *cells] for path, regions in found for cells in regions))


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()
