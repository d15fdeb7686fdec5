"""Accuracy of the default settings on whole categories: trains and tests each, and prints one table.

For comparison, nearest neighbours among the same teacher's descriptors (10,000 of the good images', levels with stride
16), which need no training. Everything is written under --folder, so that no other models are touched.

How to read the table: AU-PRO is up to a false positive rate of 0.3, at the images' own sizes. "false alarms" is the
fraction of good test images called anomalous at a false-alarm rate of 0.05, "found" that of the defective ones.
Training is the time of the whole command, from image files to detector.pt. "ms" is for one decoded picture, to map and
score. For categories with a name of MVTec AD's, published figures follow.

    python3 benchmarks/accuracy.py bottle demo_carpet --output accuracy.json
"""

import json
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import described
import measuring
import numpy as np
import torch

from AnomalyDataset import AnomalyDataset
from student_teacher.detection import scoring
from student_teacher.detection.Detector import Detector, load_detector
from student_teacher.images import preprocessing
from student_teacher.images.index import LEARNED
from student_teacher.reports.published import BESIDE, FIGURES, figures_of
from student_teacher.runtime import command_line, device
from student_teacher.runtime.errors import UserError, run
from student_teacher.runtime.paths import ROOT, add_folders
from student_teacher.runtime.prefetch import prefetched
from student_teacher.students.LocalStudent import neighbourhoods

BANK, QUERIES = 10_000, 1_024  # descriptors of good images; descriptors compared with them at once
TIMED = 20  # pictures


def parse_arguments(arguments: list[str] | None = None) -> Namespace:
    """Read the command line."""
    options = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    options.add_argument("categories", nargs="+", help="prepared by mvtec_dataset.sh, with defects and masks")
    add_folders(options, "data")
    options.add_argument("--folder", type=Path, default=ROOT / "results" / "accuracy", help="for models and results")
    options.add_argument("--precision", choices=device.PRECISIONS, default="auto")
    options.add_argument("--seed", type=command_line.seed, default=0)
    options.add_argument(
        "--no-neighbours", action="store_true", help="leave out nearest neighbours, which take a minute"
    )
    options.add_argument(
        "--training", default="", metavar="OPTIONS", help='further options for students_training.py, as "..."'
    )
    options.add_argument("--output", type=Path, help="write machine, settings and the table here, as JSON")
    return options.parse_args(arguments)


def stage(name: str, category: str, args: Namespace, *options: str) -> float:
    """Run a stage and return the seconds that it took. Raises UserError if it fails."""
    folders = ["--data", args.data, "--model", args.folder / "model", "--precision", args.precision]
    command = [sys.executable, ROOT / "src" / f"{name}.py", category, *folders, *options]
    begun = time.perf_counter()
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        raise UserError(f"{category}: {name}.py failed")
    return time.perf_counter() - begun


def measure(category: str, args: Namespace) -> dict:
    """One row of the table."""
    training = stage("students_training", category, args, "--restart", "--seed", str(args.seed), *args.training.split())
    results = args.folder / "results"
    stage("anomaly_detection", category, args, "--results", str(results))
    measures = json.loads((results / category / "metrics.json").read_text(encoding="utf-8"))
    path = args.folder / "model" / category / "detector.pt"
    detector = load_detector(path, precision=args.precision)
    test = AnomalyDataset(args.data / category, type="test")
    row = {"category": category} | {name: measures[name] for name in ("image_au_roc", "pixel_au_roc", "au_pro")}
    row |= {name: measures["decisions"].get(name) for name in ("observed_false_alarm_rate", "found")}
    pictures = [test[index]["image"] for index in range(min(TIMED, len(test)))]
    took = [measuring.seconds(lambda picture=picture: detector.predict(picture)) for picture in pictures]
    row |= {"training_seconds": training, "milliseconds": 1e3 * float(np.median(took))}
    row |= {"megabytes": path.stat().st_size / 1e6}
    return row if args.no_neighbours or detector.size is None else row | neighbours(detector, category, args)


@torch.inference_mode()
def neighbours(detector: Detector, category: str, args: Namespace) -> dict:
    """Image AU-ROC and AU-PRO of the distance to the nearest of the good images' descriptors."""
    teacher = detector.networks.teacher
    around = neighbourhoods(teacher.strides)[0]

    def descriptors_of(dataset):
        for sample in prefetched(dataset.__getitem__, range(len(dataset))):
            seen = preprocessing.to_tensor(preprocessing.resize(sample.pop("image"), detector.size))[None]
            stacked, _ = around.of([level.float() for level in teacher(seen)])
            yield sample, stacked[0].flatten(1).T, stacked.shape[2:]

    good = AnomalyDataset(args.data / category, type=LEARNED, label=0)
    random = device.generator(args.seed, "bank")
    each = -(-BANK // len(good))
    bank = torch.cat([d[torch.randperm(len(d), generator=random)[:each]] for _, d, _ in descriptors_of(good)])
    samples, maps = [], []
    for sample, descriptors, size in descriptors_of(AnomalyDataset(args.data / category, type="test")):
        samples.append(sample)
        maps.append(torch.cat([torch.cdist(part, bank).amin(1) for part in descriptors.split(QUERIES)]).view(size))
    scores = [scoring.image_scores(nearest[None], scoring.TOP).item() for nearest in maps]
    found = described.measures(maps, scores, samples)
    return {"neighbours_image_au_roc": found["image_au_roc"], "neighbours_au_pro": found["au_pro"]}


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table, write JSON."""
    args = parse_arguments(arguments)
    rows = [measure(category, args) for category in args.categories]
    machine = measuring.machine()
    print(f"{measuring.machine_line(machine)}; seed {args.seed}, precision {args.precision} {args.training}\n")
    lines = [
        (
            row["category"],
            *(f"{row[name]:.3f}" for name in ("image_au_roc", "pixel_au_roc", "au_pro")),
            *(f"{row[name]:.2f}" if row[name] is not None else "" for name in ("observed_false_alarm_rate", "found")),
            *(f"{row[name]:.0f}" for name in ("training_seconds", "milliseconds", "megabytes")),
            *(f"{row[name]:.3f}" if name in row else "" for name in ("neighbours_image_au_roc", "neighbours_au_pro")),
        )
        for row in rows
    ]
    columns = "image AU-ROC", "pixel AU-ROC", "AU-PRO", "false alarms", "found", "training s", "ms", "MB"
    print(measuring.table(("category", *columns, "neighbours: image AU-ROC", "AU-PRO"), lines))
    if published := [(category, *figures_of(category).values()) for category in args.categories if category in FIGURES]:
        print("\npublished for MVTec AD's images (src/student_teacher/reports/published.py names the sources):\n")
        shown = ((name, *(f"{value:.3f}" for value in values)) for name, *values in published)
        print(measuring.table(("category", *(name.replace("_", " ") for name in BESIDE)), list(shown)))
    measuring.write_json(args.output, "accuracy", args, machine, rows=rows)


if __name__ == "__main__":
    run(main, resumes=False)
