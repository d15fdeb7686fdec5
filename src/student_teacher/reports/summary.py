"""One table over all categories: what each reached, beside what others published."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from student_teacher.reports.published import BESIDE, FIGURES, SOURCES, figures_of
from student_teacher.reports.result_page import SUMMARY_COLUMNS, shown, write_summary_page
from student_teacher.runtime.files import write_atomically

MEASURES = ("image_au_roc", "image_f1", "pixel_au_roc", "pixel_f1", "au_pro", "au_spro_0.05", "aupimo")
COLUMNS = ("category", "status", *(key for key in SUMMARY_COLUMNS if key != "category"), "error")

METRICS = "metrics.json"
RECORD = "run.json"
RECORD_STATES = ("unfinished", "failed", "done")


@dataclass
class Record:
    """How the last run of all_categories.py over a category ended: results/CATEGORY/run.json.

    Attributes:
        status: one of RECORD_STATES.
        error: the script that failed and its exit status, empty unless `status` is "failed".
        tested: whether there was anything to test.
        seconds: time that training and test took, without what was done before.
        commands: every stage with its options.
        restart: they are to train again what is trained, and none of them has begun.
    """

    status: str = "unfinished"
    error: str = ""
    tested: bool = True
    seconds: float = 0.0
    commands: dict[str, list[str]] = field(default_factory=dict)
    restart: bool = False

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
    places = {category: place for place, category in enumerate(FIGURES)}
    return sorted(categories, key=lambda category: (places.get(category, len(places)), category))


def collect(results: Path) -> list[dict]:
    """What lies in `results`: a row for each category, and where there are any, a last one, "mean".

    A row holds COLUMNS: `status` is "done" or "failed", `error` a line or empty, and what is to be a number is a float
    or None. The mean of a measure is over the categories that have it; that of published figures is over those of
    their categories that have the same measure here.
    """
    folders = [entry.name for entry in results.iterdir() if entry.is_dir()] if results.is_dir() else []
    rows = [row for category in in_order(folders) if (row := _row(results / category)) is not None]
    if not rows:
        return []
    mean = {name: _mean([row[name] for row in rows]) for name in (*MEASURES, "seconds")}
    mean |= {name: _mean([row[name] for row in rows if row[measure] is not None]) for name, measure in BESIDE.items()}
    return [*rows, _columns("mean", mean)]


def _row(folder: Path) -> dict | None:
    """A category's row; None where nothing has come of it yet."""
    record, metrics = Record.read(folder), folder / METRICS
    fields = figures_of(folder.name)
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


def as_csv(rows: Sequence[Mapping]) -> str:
    """The rows for a program: figures as exact as they are, nothing where there is none."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_json(rows: Sequence[Mapping]) -> str:
    """The rows for a program, as `categories` and `mean` (null where there are none), with the published sources."""
    content = {"categories": rows[:-1], "mean": rows[-1] if rows else None, "sources": SOURCES}
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def as_markdown(rows: Sequence[Mapping]) -> str:
    """The rows for a reader, without columns that are empty, with what there is to say about the comparison."""
    columns = [key for key in SUMMARY_COLUMNS if key == "category" or any(row[key] is not None for row in rows)]
    lines = [
        "# Summary",
        "",
        f"| {' | '.join(map(_heading, columns))} |",
        f"|---{'|--:' * (len(columns) - 1)}|",
        *(_markdown_row(row, columns) for row in rows),
        "",
        "AU-PRO: the area under the per-region overlap, up to a false positive rate of 0.3. "
        "–: what can't be measured, or was not published.",
        "",
        *(f"- {_comparison(measure, rows)}" for measure in dict.fromkeys(BESIDE.values())),
        *(f"- {name}: {source}" for name, source in SOURCES.items()),
    ]
    return "\n".join(lines) + "\n"


def _heading(key: str) -> str:
    return SUMMARY_COLUMNS[key][0].replace("\n", " ")


def _markdown_row(row: Mapping, columns: Sequence[str]) -> str:
    name = row["category"] if row["status"] == "done" else f"{row['category']} (failed: {row['error']})"
    cells = [name.replace("|", "\\|"), *(shown(key, row[key]) for key in columns if key != "category")]
    if row["category"] == "mean":
        cells = [f"**{cell}**" for cell in cells]
    return f"| {' | '.join(cells)} |"


def _comparison(measure: str, rows: Sequence[Mapping]) -> str:
    both = [row for row in rows[:-1] if row["category"] in FIGURES and row[measure] is not None]
    if not both:
        return f"{_heading(measure)}: none of the {len(FIGURES)} published categories has one here."
    keys = [measure, *(key for key in BESIDE if BESIDE[key] == measure)]
    means = [f"{'here' if key == measure else _heading(key)} {_mean([row[key] for row in both]):.3f}" for key in keys]
    names = "all of them" if len(both) == len(FIGURES) else ", ".join(row["category"] for row in both)
    over = f"{len(both)} of {len(FIGURES)} published categories ({names})"
    return f"{_heading(measure)}, mean over {over}: {'; '.join(means)}."


def write(results: Path) -> list[dict]:
    """Write summary.csv, .json, .md and .html into `results`, and return their rows.

    Raises UserError where they can't be written.
    """
    rows = collect(results)
    write_atomically(results / "summary.csv", as_csv(rows))
    write_atomically(results / "summary.json", as_json(rows))
    write_atomically(results / "summary.md", as_markdown(rows))
    write_summary_page(results / "summary.html", rows)
    return rows
