"""One table of the results of benchmarks/gpu.sh in a folder.

python3 benchmarks/gpu_table.py results/gpu
"""

import json
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import measuring

PARTS = ("descriptors", "maps", "students", "detector")


def lines_of(part: str, report: dict) -> list[tuple[str, ...]]:
    """The rows of one benchmark's JSON: part, what was timed, milliseconds, fraction of the product's rate, ratio."""
    found = []
    for row in report.get("baselines", []) + report["rows"]:
        what = [row.get(name) for name in ("patch_size", "stride", "precision", "way")]
        batch = row.get("batch_size", report["settings"].get("batch_size"))
        times = row.get("times_published", row.get("times_first"))
        found.append(
            (
                part,
                ", ".join(str(value) for value in what if value),
                str(batch),
                measuring.milliseconds(row["seconds"]),
                f"{row['share_of_product']:.0%}" if "share_of_product" in row else "",
                measuring.ratio(times) if times else "",
            )
        )
    return found


def main() -> None:
    """Print the table."""
    options = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path, help="with the JSON files")
    folder = options.parse_args().folder
    lines = []
    for part in PARTS:
        path = folder / f"{part}.json"
        if path.exists():
            report = json.loads(path.read_text(encoding="utf-8"))
            if not lines:
                print(measuring.machine_line(report["machine"]), "\n")
            lines += lines_of(part, report)
        else:
            lines.append((part, "not measured", "", "", "", ""))
    teacher = folder / "teacher.json"
    if teacher.exists():
        taught = json.loads(teacher.read_text(encoding="utf-8"))
        lines.append(
            ("teacher", f"{taught['steps']} steps, start included", "4", f"{1e3 * taught['seconds']:,}", "", "")
        )
    print(
        measuring.table(("part", "patch, stride, precision, way", "batch", "ms", "of product", "to published"), lines)
    )


if __name__ == "__main__":
    main()
