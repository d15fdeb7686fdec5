"""One table over all categories: what each reached, beside what the paper published."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from student_teacher.reports import result_page
from student_teacher.runtime.files import write_atomically

# AU-PRO up to a false positive rate of 0.3 on MVTec AD as published by Bergmann et al., CVPR 2020: of one scale
# (p = 65), and of three scales together. In MVTec's order of categories.
PAPER = {
    "carpet": (0.695, 0.879),
    "grid": (0.819, 0.952),
    "leather": (0.819, 0.945),
    "tile": (0.912, 0.946),
    "wood": (0.725, 0.911),
    "bottle": (0.918, 0.931),
    "cable": (0.865, 0.818),
    "capsule": (0.916, 0.968),
    "hazelnut": (0.937, 0.965),
    "metal_nut": (0.895, 0.942),
    "pill": (0.935, 0.961),
    "screw": (0.928, 0.942),
    "toothbrush": (0.863, 0.933),
    "transistor": (0.701, 0.666),
    "zipper": (0.933, 0.951),
}
SOURCE = (
    "Paul Bergmann, Michael Fauser, David Sattlegger, Carsten Steger: Uninformed Students: Student-Teacher Anomaly "
    "Detection with Discriminative Latent Embeddings. CVPR 2020"
)

MEASURES = ("image_au_roc", "pixel_au_roc", "au_pro")
PUBLISHED = ("paper_p65", "paper_multiscale")
COLUMNS = ("category", "status", *MEASURES, *PUBLISHED, "seconds", "error")
HEADINGS = ("Category", "Image AU-ROC", "Pixel AU-ROC", "AU-PRO", "Paper, p = 65", "Paper, multi-scale", "Time")

METRICS = "metrics.json"
RECORD = "run.json"
RECORD_STATES = ("unfinished", "failed", "done")


@dataclass
class Record:
    """How the last run of all_categories.py over a category ended: results/CATEGORY/run.json.

    Attributes:
        status: one of RECORD_STATES.
        error: the failure's last line, empty unless `status` is "failed".
        tested: whether there was anything to test.
        seconds: time that training and test took, without what was done before.
        commands: every stage with its options; with --restart among them while none has begun.
    """

    status: str = "unfinished"
    error: str = ""
    tested: bool = True
    seconds: float = 0.0
    commands: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> "Record | None":
        """The record in results/CATEGORY; None where there is none that can be read."""
        try:
            record = cls(**json.loads((folder / RECORD).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None
        return record if record.status in RECORD_STATES else None

    def write(self, folder: Path) -> None:
        """Write the record into results/CATEGORY. Raises UserError where that can't be done."""
        write_atomically(folder / RECORD, json.dumps(asdict(self), indent=1) + "\n")


def in_order(categories: Sequence[str]) -> list[str]:
    """Categories, MVTec's first and in MVTec's order, then the others by name."""
    places = {category: place for place, category in enumerate(PAPER)}
    return sorted(categories, key=lambda category: (places.get(category, len(places)), category))


def collect(results: Path) -> list[dict]:
    """What lies in `results`: a row for each category, and where there are any, a last one, "mean".

    A row holds COLUMNS: `status` is "done" or "failed", `error` a line or empty, and what is to be a number is a float
    or None. The mean of a measure is over the categories that have it; the paper's is over those of its categories
    that have an AU-PRO here.
    """
    folders = [entry.name for entry in results.iterdir() if entry.is_dir()] if results.is_dir() else []
    rows = [row for category in in_order(folders) if (row := _row(results / category)) is not None]
    if not rows:
        return []
    mean = {name: _mean([row[name] for row in rows]) for name in (*MEASURES, "seconds")}
    mean |= {name: _mean([row[name] for row in compared(rows)]) for name in PUBLISHED}
    return [*rows, _columns("mean", mean)]


def _row(folder: Path) -> dict | None:
    """A category's row; None where nothing has come of it yet."""
    record, metrics = Record.read(folder), folder / METRICS
    fields = dict(zip(PUBLISHED, PAPER.get(folder.name, (None, None)), strict=True))
    # Whoever ran the last stage by hand since then knows better than the record.
    by_hand = metrics.exists() and (record is None or metrics.stat().st_mtime_ns > _time(folder / RECORD))
    if not by_hand:
        if record is None or record.status == "unfinished":
            return None
        if record.status == "failed":
            return _columns(folder.name, fields | {"error": record.error}, "failed")
        fields["seconds"] = record.seconds
        if not record.tested:
            return _columns(folder.name, fields)
    try:
        measures = json.loads(metrics.read_text(encoding="utf-8"))
        fields |= {name: _number(measures.get(name)) for name in MEASURES}
    except (OSError, ValueError, AttributeError):
        error = f"{metrics} can't be read: run anomaly_detection.py {folder.name} again"
        return _columns(folder.name, fields | {"error": error}, "failed")
    return _columns(folder.name, fields)


def _columns(category: str, fields: Mapping, status: str = "done") -> dict:
    known = {"category": category, "status": status, "error": ""} | fields
    return {name: known.get(name) for name in COLUMNS}


def _time(path: Path) -> int:
    return path.stat().st_mtime_ns


def _number(value) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def compared(rows: Sequence[Mapping]) -> list[Mapping]:
    """Those of the rows whose AU-PRO stands beside the paper's: like with like."""
    return [row for row in rows if row["category"] in PAPER and row["au_pro"] is not None]


def as_csv(rows: Sequence[Mapping]) -> str:
    """The rows for a program: figures as exact as they are, nothing where there is none."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_markdown(rows: Sequence[Mapping]) -> str:
    """The rows for a reader, with what there is to say about the comparison."""
    lines = [
        "# Summary",
        "",
        f"| {' | '.join(HEADINGS)} |",
        f"|---{'|--:' * (len(HEADINGS) - 1)}|",
        *(_markdown_row(row) for row in rows),
        "",
        "AU-PRO: the area under the per-region overlap, up to a false positive rate of 0.3. "
        "–: what can't be measured, or was not published.",
        "",
        f"Paper: AU-PRO as published by {SOURCE}. {_comparison(rows)}",
    ]
    return "\n".join(lines) + "\n"


def _markdown_row(row: Mapping) -> str:
    name = row["category"] if row["status"] == "done" else f"{row['category']} (failed: {row['error']})"
    shown = ["–" if row[key] is None else f"{row[key]:.3f}" for key in (*MEASURES, *PUBLISHED)]
    cells = [name.replace("|", "\\|"), *shown, _duration(row["seconds"])]
    if row["category"] == "mean":
        cells = [f"**{cell}**" for cell in cells]
    return f"| {' | '.join(cells)} |"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def _comparison(rows: Sequence[Mapping]) -> str:
    beside = compared(rows)
    if not beside:
        return f"None of its {len(PAPER)} categories has an AU-PRO here."
    ours, single, several = (_mean([row[name] for row in beside]) for name in ("au_pro", *PUBLISHED))
    if len(beside) == len(PAPER):
        those = f"all {len(PAPER)} categories"
    else:
        those = f"{len(beside)} of its {len(PAPER)} categories ({', '.join(row['category'] for row in beside)})"
    return (
        f"Its means are over what has an AU-PRO here too, {those}: "
        f"{single:.3f} at one scale and {several:.3f} at three, against {ours:.3f} here."
    )


def write(results: Path) -> list[dict]:
    """Write summary.csv, summary.md and summary.html into `results`, and return their rows.

    Raises UserError where they can't be written.
    """
    rows = collect(results)
    write_atomically(results / "summary.csv", as_csv(rows))
    write_atomically(results / "summary.md", as_markdown(rows))
    result_page.write_summary_page(results / "summary.html", rows)
    return rows
