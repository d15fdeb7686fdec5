"""Training speed of patch students, compared with the published way.

Ours is the step of src/students_training.py: one pass of the teacher for all students, at random positions a stride
apart, in the precision given. The published way trains one student after another on an image, each time with a pass of
the teacher, on every pixel by multi-pooling in float32. Both start with a decoded uint8 image on the device, and end
when the optimiser has updated the weights of all students. Before timing, both must have the same loss from the same
weights, with stride 1, in float32 and without batch normalisation. All take turns; the first turn isn't counted.

How to read the table: a visit is one image that all students have been trained on once. "visits/s" times the seconds of
a training is the number of images that it sees; "to published" is the speed-up over the published way.

    python3 benchmarks/students_training.py --patch-size 65 --output students_training.json
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import measuring
import torch
from measuring import Timing
from published import PublishedTraining
from torch import Tensor

from AnomalyNet import AnomalyNet
from FDFE import PADDING
from FDFEAnomalyNet import FDFEAnomalyNet
from student_teacher.runtime import command_line, device
from student_teacher.runtime.errors import run
from student_teacher.training.optimiser import Optimiser
from student_teacher.training.patch_students import Students

LEARNING_RATE, WEIGHT_DECAY = 1e-4, 1e-5  # the paper's
MUON_LEARNING_RATE = 0.05
CHECKED_SIZE = 24  # height and width of the image on which losses are compared, at most
TOLERANCE = 1e-4


def parse_arguments(arguments: list[str] | None = None) -> Namespace:
    """Read the command line."""
    options = measuring.parser(__doc__, repeat=3)
    options.set_defaults(patch_size=[65])
    measuring.add_strides(options, (1, 4, 8))
    options.add_argument(
        "--batch-size", type=command_line.positive, default=4, help="images per step of ours (default 4)"
    )
    options.add_argument(
        "--published-batch-size", type=command_line.positive, default=1, help="images per step as published (default 1)"
    )
    options.add_argument(
        "--published-repeat",
        type=command_line.positive,
        default=1,
        help="turns that count of the published way, at most --repeat; it is slow: 2 or 3 show its spread (default 1)",
    )
    options.add_argument("--students", type=command_line.positive, default=3, help="the paper takes 3 (default 3)")
    return measuring.read(options, arguments)


class OnePassTraining:
    """The step of src/students_training.py: one pass of the teacher for all students."""

    def __init__(self, teacher: AnomalyNet, students: Sequence[AnomalyNet], stride: int, precision: str):
        compute = device.Compute(next(teacher.parameters()).device, precision)
        self.students = Students(FDFEAnomalyNet(teacher, stride, padding=PADDING), students, compute)
        self.optimiser = Optimiser(students, "muon", MUON_LEARNING_RATE)
        self.steps = 0

    def step(self, images: Tensor, fraction: float = 1.0) -> list[float]:
        """Train all students on uint8 images (N,3,H,W), with a fraction of the learning rate. Returns the losses."""
        self.optimiser.zero_grad()
        random = device.generator("offset", self.steps)
        offset = tuple(torch.randint(self.students.teacher.stride, (2,), generator=random).tolist())
        self.steps += 1
        found = self.students.learn(images, 1.0, offset)
        self.optimiser.step(fraction)
        return found


def make_net(args: Namespace, patch_size: int, batch_normalisation: bool = False) -> AnomalyNet:
    """A teacher or a student with random weights."""
    net = AnomalyNet(patch_size, batch_normalisation)
    return net.to(args.device, memory_format=device.memory_format(args.device))


def require_same_losses(teacher: AnomalyNet, students: Sequence[AnomalyNet], images: Tensor) -> None:
    """Raise AssertionError if the two ways start with different losses. Doesn't change the students."""
    published = PublishedTraining(teacher, students, 0, 0)
    ours = OnePassTraining(teacher, students, 1, "float32")
    with measuring.exact_float32():
        pairs = list(zip(published.step(images), ours.step(images, 0.0), strict=True))
    assert all(abs(a - b) <= TOLERANCE * abs(b) for a, b in pairs), f"losses differ: published and ours {pairs}"


def measure(args: Namespace) -> tuple[list[dict], list[dict]]:
    """A row for each setting of ours, and a row for each patch size as published."""
    images = measuring.random_images(args, max(args.batch_size, args.published_batch_size))
    works, rows, fewer = {}, {}, {}
    for patch_size in args.patch_size:
        teacher = make_net(args, patch_size).eval().requires_grad_(False)
        students = [make_net(args, patch_size) for _ in range(args.students)]
        normalising = [make_net(args, patch_size, batch_normalisation=True) for _ in range(args.students)]
        require_same_losses(teacher, students, measuring.corner(images, CHECKED_SIZE))
        published = PublishedTraining(teacher, students, LEARNING_RATE, WEIGHT_DECAY)
        works["published", patch_size] = partial(published.step, images[: args.published_batch_size])
        fewer["published", patch_size] = args.published_repeat
        for stride in args.stride:
            for precision in args.precision:
                key = patch_size, stride, precision
                rows[key] = {"patch_size": patch_size, "stride": stride, "precision": precision}
                works[key] = partial(
                    OnePassTraining(teacher, normalising, stride, precision).step, images[: args.batch_size]
                )
    timings = measuring.interleaved(works, args.repeat, args.device, fewer=fewer)
    baselines = {}
    for patch_size in args.patch_size:
        timing = timings["published", patch_size]
        baselines[patch_size] = {"way": "published", "patch_size": patch_size, "batch_size": args.published_batch_size}
        baselines[patch_size] |= timing.summary() | {"visits_per_second": args.published_batch_size / timing.median}
    for key, row in rows.items():
        visits = args.batch_size / timings[key].median
        row |= timings[key].summary() | {
            "batch_size": args.batch_size,
            "visits_per_second": visits,
            "times_published": visits / baselines[key[0]]["visits_per_second"],
        }
    return list(rows.values()), list(baselines.values())


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table, write JSON."""
    args = parse_arguments(arguments)
    rows, baselines = measure(args)
    machine = measuring.machine(args.device)
    turns = f"{args.repeat} turns each, {min(args.repeat, args.published_repeat)} as published"
    print(f"Training, students: {args.students}, {args.image_size} x {args.image_size}, {turns}")
    print(f"{measuring.machine_line(machine)}\n")
    lines = [
        (
            row["patch_size"],
            row.get("stride", "1, published"),
            row.get("precision", "float32"),
            row["batch_size"],
            Timing(row["turns"]).rounded,
            f"{row['visits_per_second']:.3g}",
            measuring.ratio(row["times_published"]) if "times_published" in row else "",
        )
        for row in (*baselines, *rows)
    ]
    lines.sort(key=lambda line: line[0])  # stable: the baselines stay first
    columns = "batch", "ms a step: median (spread)", "visits/s", "to published"
    print(measuring.table(("patch", "stride", "precision", *columns), lines))
    measuring.write_json(
        args.output,
        "students_training",
        args,
        machine,
        warm_up_turns=measuring.WARM_UP,
        rows=rows,
        baselines=baselines,
    )


if __name__ == "__main__":
    run(main, resumes=False)
