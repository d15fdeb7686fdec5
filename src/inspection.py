"""New images, without labels: a score, a p-value, a decision, a map and a picture of each."""

import csv
import hashlib
import io
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

import distributed
import figures
import stages
from command_line import UserError
from Detector import Detector, at_own_size
from files import make_folder, write_whole
from images import encoded, is_image, load_rgb
from prefetch import prefetched
from progress import Progress
from result_page import ResultPage

OURS = ("anomaly_maps", "overlays", "page")  # the folders under the output
COLUMNS = ("path", "image_score", "p_value", "anomalous", "anomalous_pixels")


def files_in(paths: Sequence[Path], output: Path) -> list[tuple[Path, Path]]:
    """Each image among `paths` and in folders below them, with the name under which its results are written.

    In folders, what is hidden or no image by its ending is passed over, and the pictures that an earlier run has left
    in `output`. A file that is named is taken as it is. Raises UserError where a path does not exist, or where there is
    no image.
    """
    own = [(output / folder).resolve() for folder in OURS]
    found: dict[Path, Path] = {}
    for path in paths:
        if path.is_dir():
            for file in sorted(file for file in path.rglob("*") if is_image(file)):
                inside = file.relative_to(path)
                hidden = any(part.startswith(".") for part in inside.parts)
                if not hidden and file.is_file() and not any(map(file.resolve().is_relative_to, own)):
                    found[file] = Path(path.resolve().name) / inside
        elif path.exists():
            found[path] = Path(path.name)
        else:
            raise UserError(f"{path}: no such file or folder; --input takes images, or folders with images in them")
    if not found:
        raise UserError(f"{', '.join(map(str, paths))}: no images in there")
    taken: set[Path] = set()
    for path, name in found.items():  # two folders of the same name would overwrite each other
        number = 1
        while found[path] in taken:
            number += 1
            found[path] = name.with_stem(f"{name.stem}-{number}")
        taken.add(found[path])
    return list(found.items())


def inspect(
    detector: Detector,
    paths: Sequence[Path],
    output: Path,
    category: str,
    kind: str,
    false_alarm_rate: float,
    pixel_false_alarm_rate: float,
) -> int:
    """Look at all images of `paths`, write what is found under `output`, and return how many could not be read.

    decisions.csv has a line for each image; anomaly_maps/ float32 TIFFs at the images' own size; overlays/ the maps on
    the images, on one colour scale, pixels above the pixel threshold outlined; index.html shows all of them, the most
    anomalous first. Goes on after a stop. Each of several processes looks at its share of the images, and the first
    writes table and page.
    """
    calibration = detector.calibration
    files = files_in(paths, output)
    make_folder(output)
    pixel_threshold = calibration.pixel_threshold(pixel_false_alarm_rate) if calibration else None
    # 0 is usual on good images; the colours end well above what their pixels reach.
    highest = max(1.0, 2 * pixel_threshold) if calibration else 10.0

    def map_of(name: Path) -> Path:
        return output / "anomaly_maps" / name.with_name(f"{name.name}.tiff")

    def look_at(picture: Image.Image, name: Path) -> list[str]:
        small_map, score = detector.look_at(picture, kind)
        p_value = detector.p_value_of(score, kind)
        anomaly_map = at_own_size(small_map, picture)
        write_whole(map_of(name), encoded(Image.fromarray(anomaly_map), "TIFF"))
        shown = figures.overlay(np.asarray(picture), anomaly_map, 0, highest)
        row = [f"{score:.6g}"]
        if p_value is None:
            row += ["", "", ""]
        else:
            above = anomaly_map >= pixel_threshold
            shown = figures.outline(shown, above, max(1, max(picture.size) // 200))
            row += [f"{p_value:.6g}", str(int(p_value <= false_alarm_rate)), str(int(above.sum()))]
        write_whole(output / "overlays" / name.with_name(f"{name.name}.png"), encoded(Image.fromarray(shown), "PNG"))
        return row

    # Not by the files' contents: one that can't be read shall not stop the others.
    stamps = [(str(name), (found := path.stat()).st_size, found.st_mtime_ns) for path, name in files]
    digest = hashlib.sha256(repr(stamps).encode()).hexdigest()
    options = f"{detector.fingerprint} {kind} {false_alarm_rate} {pixel_false_alarm_rate}"
    progress = Progress(output / "inspection.unfinished", f"{options} {digest}")
    rows = {name: row for _, name in files if (row := progress.get(str(name)))}
    broken = {}
    wanted = distributed.share([(path, name) for path, name in files if name not in rows])
    loaded = prefetched(_load, [path for path, _ in wanted])
    for (_, name), picture in zip(wanted, stages.with_bar(loaded, len(wanted), "images"), strict=True):
        if isinstance(picture, UserError):
            broken[name] = str(picture)
        else:
            rows[name] = look_at(picture, name)
            progress.put(str(name), rows[name])
    for others in distributed.gathered((rows, broken)):
        for found, theirs in zip((rows, broken), others, strict=True):
            found |= theirs
    if distributed.is_first():
        table = _table([[str(path), *rows[name]] for path, name in files if name in rows])
        write_whole(output / "decisions.csv", table)
        least = calibration.threshold(false_alarm_rate, kind) if calibration else None
        from_score = min((float(row[0]) for row in rows.values() if row[2] == "1"), default=least)
        page = ResultPage(output, category, 0, highest)
        shown = [(path, name) for path, name in files if name in rows]
        loaded = prefetched(_load, [path for path, _ in shown])
        for (path, name), picture in zip(shown, stages.with_bar(loaded, len(shown), "page"), strict=True):
            if isinstance(picture, Image.Image):
                anomaly_map = np.asarray(Image.open(map_of(name)))
                score = float(rows[name][0])
                folder = name.parent if name.parent.name else Path(path.resolve().parent.name)
                page.add(name.name, str(folder), None, score, np.asarray(picture), None, anomaly_map)
        page_path = page.finish({}, threshold=from_score)
        print(f"{len(rows)} images, {output / 'decisions.csv'}; page to look at: {page_path}")
        if calibration:
            flagged = sum(row[2] == "1" for row in rows.values())
            print(f"{flagged} called anomalous, at a false-alarm rate of {false_alarm_rate:g}: scores from {least:.4g}")
        for _, name in files:
            if name in broken:
                print(f"not inspected: {broken[name]}", file=sys.stderr)
    progress.finish()
    return len(broken)


def _load(path):
    try:
        return load_rgb(path)
    except UserError as error:
        return error


def _table(rows: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([COLUMNS, *rows])
    return text.getvalue()
