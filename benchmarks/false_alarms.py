"""Check of the false-alarm rate: students are fitted to many random splits, and false alarms are counted.

For each split a fifth of the category's good images, training and test images together, is set aside; images that look
alike stay together. The default detector is fitted to the others and calibrated, as in students_training.py. Then the
fraction of the good images set aside that it calls anomalous is measured, and the fraction of the defective ones.

How to read the table: the observed rate should equal the possible one on average over the splits; a single split of few
images varies widely. "Possible" is the highest rate up to the requested one that so many training images can give.

    python3 benchmarks/false_alarms.py bottle demo_carpet
"""

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import described
import measuring
import numpy as np

from AnomalyDataset import AnomalyDataset
from student_teacher.detection import scoring
from student_teacher.detection.Detector import alarms_allowed
from student_teacher.images.index import LEARNED
from student_teacher.runtime import command_line, device
from student_teacher.runtime.bars import with_bar
from student_teacher.runtime.errors import UserError, run
from student_teacher.runtime.paths import add_folders
from student_teacher.training import backbone_students

SET_ASIDE = 5  # one image of this many
PARTS = (LEARNED, 0), ("test", 0), ("test", 1)


def parse_arguments(arguments: list[str] | None = None) -> Namespace:
    """Read the command line."""
    options = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    options.add_argument("categories", nargs="+", help="prepared by mvtec_dataset.sh")
    options.add_argument("--rates", type=command_line.fraction, nargs="+", default=[0.05, 0.1], metavar="X")
    options.add_argument("--splits", type=command_line.positive, default=20, help="random ones (default 20)")
    options.add_argument("--image-size", type=command_line.positive, default=512, help="height and width (default 512)")
    options.add_argument("--image-score", choices=scoring.IMAGE_SCORES, default=scoring.SMOOTH)
    options.add_argument("--seed", type=command_line.seed, default=0)
    options.add_argument("--device", default="auto")
    options.add_argument("--precision", choices=device.PRECISIONS, default="auto")
    add_folders(options, "data")
    options.add_argument("--output", type=Path, help="write the figures here, as JSON")
    return options.parse_args(arguments)


def split(groups: Sequence[Sequence[int]], seed: int) -> tuple[list[list[int]], list[int]]:
    """Groups to train on, and images to set aside: random groups until there are enough."""
    number = sum(map(len, groups))
    learned, aside = [], []
    for place in np.random.default_rng(seed).permutation(len(groups)):
        if len(aside) + len(groups[place]) <= number / SET_ASIDE:
            aside += groups[place]
        else:
            learned.append(list(groups[place]))
    return learned, aside


def measure(category: str, args: Namespace) -> list[dict]:
    """A row for each rate."""
    sets = [AnomalyDataset(args.data / category, type=kind, label=label) for kind, label in PARTS]
    good, compute = len(sets[0]) + len(sets[1]), measuring.compute(args)
    if good < 2 * SET_ASIDE:
        raise UserError(f"{args.data / category} has {good} good images: {2 * SET_ASIDE} are the least to split")
    teacher, maps = described.teacher_and_maps(sets, (args.image_size,) * 2, compute)
    groups = backbone_students.look_alikes([level[:good] for level in maps], teacher.strides)
    possible, observed, found = ({rate: [] for rate in args.rates} for _ in range(3))
    for number in with_bar(range(args.splits), args.splits, category):
        learned, aside = split(groups, device.seed_of(args.seed, "split", number))
        indices = sorted(index for group in learned for index in group)
        place = {index: order for order, index in enumerate(indices)}
        renumbered = [[place[index] for index in group] for group in learned]
        fitted = backbone_students.fit_students(teacher, [level[indices] for level in maps], renumbered, compute)
        networks, calibration = backbone_students.calibrated(teacher, fitted)
        tested = aside + list(range(good, len(maps[0])))
        found_in = networks.maps_of(described.errors(networks, [level[tested] for level in maps], compute))
        scores = scoring.image_scores(found_in.scored_maps, args.image_score).tolist()
        p_values = np.array([calibration.p_value(score, args.image_score) for score in scores])
        for rate in args.rates:
            anomalous = p_values <= rate
            possible[rate].append(alarms_allowed(len(indices), rate) * calibration.smallest_rate)
            observed[rate].append(anomalous[: len(aside)].mean())
            found[rate].append(anomalous[len(aside) :].mean() if len(aside) < len(tested) else None)
    return [
        {"category": category, "good": good, "parts": len(groups), "asked": rate}
        | {"possible": float(np.mean(possible[rate]))}
        | {"observed": [float(value) for value in observed[rate]]}
        | {"found": None if None in found[rate] else float(np.mean(found[rate]))}
        for rate in args.rates
    ]


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table, write JSON."""
    args = parse_arguments(arguments)
    rows = [row for category in args.categories for row in measure(category, args)]
    print(f"{args.splits} random splits, a fifth set aside; seed {args.seed}, precision {args.precision}")
    lines = [
        (
            row["category"],
            row["good"],
            row["parts"],
            row["asked"],
            f"{row['possible']:.3f}",
            f"{np.mean(row['observed']):.3f} +- {np.std(row['observed']):.3f}",
            "" if row["found"] is None else f"{row['found']:.3f}",
        )
        for row in rows
    ]
    columns = "category", "good images", "parts", "requested", "possible", "observed: mean and std", "defects found"
    print(measuring.table(columns, lines))
    measuring.write_json(args.output, "false_alarms", args, measuring.machine(device.choose(args.device)), rows=rows)


if __name__ == "__main__":
    run(main, resumes=False)
