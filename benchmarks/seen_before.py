"""How much of a category's image AU-ROC needs no look for defects: it is enough to know which parts were seen before.

What `./mvtec_dataset.sh CATEGORY --check-leaks` tells, for each kind of defect, and as JSON. How: images/leaks.py.

    python3 benchmarks/seen_before.py magnetic_tile
"""

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import measuring
import torch

from student_teacher.reports.leak_report import find_leaks
from student_teacher.runtime.errors import run
from student_teacher.runtime.paths import add_folders


def parse_arguments(arguments: list[str] | None = None) -> Namespace:
    """Read the command line."""
    options = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    options.add_argument("category", help="a folder in data/, prepared by ./mvtec_dataset.sh CATEGORY")
    add_folders(options, "data")
    options.add_argument("--output", type=Path, help="write the figures here, as JSON")
    return options.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table, write JSON."""
    args = parse_arguments(arguments)
    rows = [
        {"kind": seen.kind, "seen_before": seen.seen_before / seen.images, "image_au_roc": seen.image_au_roc}
        for seen in find_leaks(args.data / args.category).kinds
    ]
    shown = [
        (row["kind"], f"{row['seen_before']:.0%}", "-" if row["image_au_roc"] is None else f"{row['image_au_roc']:.3f}")
        for row in rows
    ]
    print(measuring.table(("kind", "seen before", "image AU-ROC of that alone"), shown))
    measuring.write_json(args.output, "seen_before", args, measuring.machine(torch.device("cpu")), rows=rows)


if __name__ == "__main__":
    run(main, resumes=False)
