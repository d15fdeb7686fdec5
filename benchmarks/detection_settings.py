"""Effect of stride and precision of detection on time and accuracy, for a category that has a detector.

Each test image is scored by all settings in turn, so that other load on the machine affects all of them; the first
image is scored twice, and the first time isn't counted. Measures are those of src/anomaly_detection.py: image AU-ROC of
the default image score, and AU-PRO up to a false positive rate of 0.3 on maps at the images' own size.

How to read the table: "change" is the difference from the first setting, stride 1 in float32 by default. Time is the
median for one image, from the decoded image to its map.

    python3 benchmarks/detection_settings.py magnetic_tile --output detection_settings.json
"""

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import measuring
import numpy as np
import torch
from measuring import Timing

from AnomalyDataset import AnomalyDataset
from student_teacher.detection.Detector import at_own_size, load_detector
from student_teacher.evaluation import metrics
from student_teacher.runtime import device
from student_teacher.runtime.bars import with_bar
from student_teacher.runtime.errors import run
from student_teacher.runtime.paths import add_folders
from student_teacher.runtime.prefetch import prefetched


def parse_arguments(arguments: list[str] | None = None) -> Namespace:
    """Read the command line."""
    options = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    options.add_argument("category", help="a category whose students have been trained")
    measuring.add_strides(options, measuring.STRIDES)
    options.add_argument(
        "--precision", nargs="+", choices=device.PRECISIONS[1:], default=["float32", "bfloat16"], help="default: both"
    )
    options.add_argument("--device", default="auto")
    add_folders(options, "data", "model")
    options.add_argument("--output", type=Path, help="write every time and the table here, as JSON")
    return options.parse_args(arguments)


@torch.inference_mode()
def measure(args: Namespace) -> list[dict]:
    """A row for each precision and stride."""
    where = device.choose(args.device)
    path = args.model / args.category / "detector.pt"
    settings = [(stride, precision) for precision in args.precision for stride in args.stride]
    detectors = {
        (stride, precision): load_detector(path, stride=stride, device_name=args.device, precision=precision)
        for stride, precision in settings
    }
    dataset = AnomalyDataset(args.data / args.category, type="test")
    measuring.require_measurable(dataset)
    maps, scores, turns = ({setting: [] for setting in settings} for _ in range(3))
    masks, found = [], {}
    samples = prefetched(dataset.__getitem__, range(len(dataset)))
    for number, sample in enumerate(with_bar(samples, len(dataset), "images")):
        masks.append(np.asarray(sample["mask"]) > 0)
        for setting in settings * (1 + (number == 0)):

            def work(detector=detectors[setting], picture=sample["image"]):
                found["map"], found["score"] = detector.predict(picture)

            turns[setting].append(measuring.seconds(work, where))
            if len(maps[setting]) == number:
                maps[setting].append(at_own_size(found["map"], sample["size"]))
                scores[setting].append(found["score"])
    labels = np.array([row["label"] for row in dataset.rows])
    rows = []
    for stride, precision in settings:
        key = stride, precision
        row = {"precision": precision, "stride": stride} | Timing(turns[key][1:]).summary()
        row |= {"image_au_roc": metrics.au_roc(np.array(scores[key]), labels)}
        rows.append(row | {"au_pro": metrics.au_pro(maps[key], masks)})
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table, write JSON."""
    args = parse_arguments(arguments)
    rows = measure(args)
    machine = measuring.machine(device.choose(args.device))
    print(f"{args.category}\n{measuring.machine_line(machine)}\n")
    first = rows[0]
    lines = [
        (
            row["precision"],
            row["stride"],
            Timing(row["turns"]).rounded,
            *(
                text
                for name in ("image_au_roc", "au_pro")
                for text in (f"{row[name]:.4f}", f"{row[name] - first[name]:+.4f}")
            ),
        )
        for row in rows
    ]
    header = "precision", "stride", "ms: median (spread)", "image AU-ROC", "change", "AU-PRO", "change"
    print(measuring.table(header, lines))
    measuring.write_json(args.output, "detection_settings", args, machine, rows=rows)


if __name__ == "__main__":
    run(main, resumes=False)
