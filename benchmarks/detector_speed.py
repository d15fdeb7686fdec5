"""Speed of the default detector, a frozen backbone and its students, from uint8 image to map and score.

It is fitted here to images of noise (the time doesn't depend on them), then timed for a batch of one and of many, on
images that are on the device already. All variants take turns; the first turn isn't counted. On a GPU a batch is also
replayed as a CUDA graph, and with --compile compiled by torch.compile and replayed. Before timing, all variants must
give the same map, within TOLERANCE of its range.

    python3 benchmarks/detector_speed.py --output detector_speed.json
"""

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import measuring
import torch

from student_teacher.detection import scoring
from student_teacher.detection.BackboneDetector import BackboneDetector
from student_teacher.detection.Detector import Calibration, Detector
from student_teacher.images.store import ImageStore
from student_teacher.runtime import command_line, device
from student_teacher.runtime.cuda_graph import Recorded
from student_teacher.runtime.errors import run
from student_teacher.teachers import backbone_weights
from student_teacher.teachers.BackboneTeacher import seen_size
from student_teacher.training import backbone_students

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}  # of the map's range


def parse_arguments(arguments: list[str] | None = None) -> Namespace:
    """Read the command line."""
    options = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    options.add_argument("--device", default="auto", help="auto (a GPU if available), cpu, cuda ...")
    options.add_argument("--image-size", type=command_line.positive, default=512, help="height and width (default 512)")
    options.add_argument(
        "--images", type=command_line.positive, default=209, help="number of good images to fit to (default 209)"
    )
    options.add_argument("--batch-size", type=command_line.positive, nargs="+", default=[1, 32], help="(default 1 32)")
    options.add_argument("--precision", nargs="+", choices=device.PRECISIONS[1:], default=["float32", "bfloat16"])
    options.add_argument("--compile", action="store_true", help="also measure it compiled, on a GPU: takes a minute")
    options.add_argument(
        "--repeat", type=command_line.positive, default=5, help="turns that count, for each variant (default 5)"
    )
    options.add_argument("--seed", type=command_line.seed, default=0)
    options.add_argument("--output", type=Path, help="write machine, settings and every turn here, as JSON")
    return options.parse_args(arguments)


def noise(args: Namespace, seed: int, number: int) -> torch.Tensor:
    """uint8 images (number,3,H,W) of noise, smooth enough to have features."""
    height, width = seen_size((args.image_size, args.image_size))
    coarse = torch.rand(number, 3, height // 8, width // 8, generator=device.generator(args.seed, seed))
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear").mul_(255).to(torch.uint8)


def fitted(args: Namespace) -> tuple[dict[str, Any], Calibration]:
    """The default detector, fitted to images of noise, as a checkpoint; and its calibration."""
    images = noise(args, 0, args.images)
    store = ImageStore(images.__getitem__, len(images))
    compute = device.Compute(device.choose(args.device), "auto", args.seed)
    backbone = backbone_weights.backbone("efficientnet_lite0", "imagenet")
    detector, calibration = backbone_students.fit(backbone, images.shape[2:], store, compute)
    return detector.to_checkpoint("efficientnet_lite0"), calibration


def ways(content: dict[str, Any], images: torch.Tensor, precision: str, args: Namespace) -> dict[str, Callable]:
    """The variants to time: functions without arguments that return maps and scores."""
    where = images.device
    networks = BackboneDetector.of_checkpoint(content)
    Detector(
        networks, images.shape[2:], None, calibrated_stride=networks.stride, where=where, precision=precision
    )  # moves and converts the networks
    plain = partial(detect, networks, precision, networks.errors)
    found = {"as it is": partial(plain, images)}
    if where.type == "cuda":
        found["CUDA graph"] = partial(Recorded(plain), images)
        if args.compile:
            compiled = partial(detect, networks, precision, torch.compile(networks.errors))
            found["compiled, CUDA graph"] = partial(Recorded(compiled), images)
    return found


def detect(networks, precision, errors, images):
    """Maps and image scores, on the device; `errors` is the networks' method, or its compiled version."""
    with torch.no_grad(), device.autocast(images.device, precision):
        found = networks.maps_of(errors(images))
        return found.anomaly_maps, scoring.image_scores(found.scored_maps, scoring.SMOOTH)


def measure(args: Namespace) -> list[dict]:
    """A row for each batch size, precision and variant."""
    (content, _), works, expected = fitted(args), {}, {}
    for number in args.batch_size:
        images = noise(args, 1, number).to(device.choose(args.device))
        for precision in args.precision:
            for way, work in ways(content, images, precision, args).items():
                maps = work()[0].float().clone()
                expected.setdefault(number, maps)
                error = (maps - expected[number]).abs().max() / (expected[number].max() - expected[number].min())
                if not error < TOLERANCE[precision]:
                    raise AssertionError(f"{way}, {precision}: maps differ by {error:.2g} of their range")
                works[number, precision, way] = work
    timings = measuring.interleaved(works, args.repeat, device.choose(args.device))
    first = {number: timings[number, args.precision[0], "as it is"].median for number in args.batch_size}
    return [
        {"batch_size": number, "precision": precision, "way": way, "images_per_second": number / timing.median}
        | timing.summary()
        | {"times_first": first[number] / timing.median}
        for (number, precision, way), timing in timings.items()
    ]


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table, write JSON."""
    args = parse_arguments(arguments)
    torch.manual_seed(args.seed)
    rows = measure(args)
    machine = measuring.machine(device.choose(args.device))
    print(
        f"Default detector, {args.image_size} x {args.image_size}, fitted to {args.images} images, {args.repeat} turns"
    )
    print(f"{measuring.machine_line(machine)}\n")
    lines = [
        (
            row["batch_size"],
            row["precision"],
            row["way"],
            measuring.Timing(row["turns"]).rounded,
            f"{row['images_per_second']:,.0f}",
            measuring.ratio(row["times_first"]),
        )
        for row in rows
    ]
    print(measuring.table(("batch", "precision", "way", "ms a batch: median (spread)", "images/s", "to first"), lines))
    measuring.write_json(args.output, "detector_speed", args, machine, warm_up_turns=measuring.WARM_UP, rows=rows)


if __name__ == "__main__":
    run(main, resumes=False)
