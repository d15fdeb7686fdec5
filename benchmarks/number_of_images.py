"""How many good images are needed: image AU-ROC and AU-PRO of detectors trained on more and more of them.

For each number, that many images of train/good are drawn at random, and patch students are trained on them, each time
for the same number of images in all; they are tested on the same test images. Options after `--` go to
students_training.py.

    python3 benchmarks/number_of_images.py magnetic_tile --numbers 10 30 100 300 762 -- --patch-size 65 --students 1
"""

import json
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import measuring
import numpy as np

import anomaly_detection
import mvtec_dataset
import students_training
from AnomalyDataset import AnomalyDataset
from student_teacher.images import category
from student_teacher.runtime import command_line, device
from student_teacher.runtime.errors import UserError, run
from student_teacher.runtime.paths import add_folders, category_name
from student_teacher.training import patch_students


def parse_arguments(arguments: list[str]) -> tuple[Namespace, list[str]]:
    """Read the command line: this script's options, and those for students_training.py."""
    options = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    options.add_argument("category", type=category_name, help="a folder in data/, prepared by ./mvtec_dataset.sh")
    options.add_argument("--numbers", type=command_line.positive, nargs="+", default=[10, 30, 100, 300], metavar="N")
    options.add_argument(
        "--visits",
        type=command_line.positive,
        default=patch_students.VISITS,
        help="images in all for each student, counting repetitions (default %(default)s, as in students_training.py)",
    )
    add_folders(options, "data")
    options.add_argument("--seed", type=command_line.seed, default=0, help="draws the images (default 0)")
    options.add_argument(
        "--folder", type=Path, required=True, metavar="DIR", help="for the data, models and results of all detectors"
    )
    options.add_argument("--output", type=Path, help="write the figures here, as JSON")
    end = arguments.index("--") if "--" in arguments else len(arguments)
    return options.parse_args(arguments[:end]), arguments[end + 1 :]


def make_category(args: Namespace, good: Sequence[Path], number: int) -> str:
    """A category of `number` of the good images and all test images, as links. Returns its name."""
    source = args.data / args.category
    name = f"{args.category}_{number}_{args.seed}"
    target = args.folder / "data" / name
    folder = target / "train" / "good"
    folder.mkdir(parents=True, exist_ok=True)
    chosen = np.random.default_rng(device.seed_of(args.seed, "number")).permutation(len(good))[:number]
    links = {folder / good[index].name: good[index] for index in chosen}
    links |= {target / part: source / part for part in ("test", "ground_truth") if (source / part).exists()}
    for link, to in links.items():
        if not link.is_symlink():
            link.symlink_to(to.resolve())
    mvtec_dataset.main([name, "--data", str(target.parent)])
    return name


def main(arguments: list[str] | None = None) -> None:
    """Train, test, print the table, write JSON."""
    args, theirs = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    source = args.data / args.category
    good = category.image_paths(AnomalyDataset(source, type="train", label=0))
    if max(args.numbers) > len(good):
        raise UserError(f"--numbers {max(args.numbers)}: {source} has {len(good)} images in train/good")
    rows = []
    for number in args.numbers:
        name = make_category(args, good, number)
        learned, _ = category.validation_split(number, 0)
        folders = [f"--{folder}={args.folder / folder}" for folder in ("data", "model")]
        students_training.main([name, *folders, "--epochs", str(args.visits / len(learned)), *theirs])
        anomaly_detection.main([name, *folders, f"--results={args.folder / 'results'}"])
        measures = json.loads((args.folder / "results" / name / "metrics.json").read_text(encoding="utf-8"))
        rows.append({"images": number} | {key: measures.get(key) for key in ("image_au_roc", "au_pro")})
    lines = [
        (row["images"], *("-" if row[key] is None else f"{row[key]:.3f}" for key in ("image_au_roc", "au_pro")))
        for row in rows
    ]
    print(measuring.table(("good images", "image AU-ROC", "AU-PRO"), lines))
    measuring.write_json(args.output, "number_of_images", args, measuring.machine(device.choose("auto")), rows=rows)


if __name__ == "__main__":
    run(main)
