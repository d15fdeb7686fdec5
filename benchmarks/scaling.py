"""Training speed of patch students in several processes, and an estimate for eight GPUs or machines.

Measured is a training step of src/students_training.py with Muon, with its batch split between the processes as under
torchrun; each gets an equal part of the cores. The estimate assumes that each of eight processes takes as long for a
step as one does here, with a batch eight times as large, and adds the time of a ring all-reduce of the gradients:
2 (n - 1) / n x bytes / bandwidth. It ignores latency and the small all-reduces of batch normalisation.

    python3 benchmarks/scaling.py --batch-size 4 --processes 1 2 --gpu-bandwidth 300 --network-bandwidth 1.25
"""

import json
import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import measuring
import torch
from measuring import Timing
from torch import nn

from AnomalyNet import AnomalyNet
from FDFE import PADDING
from FDFEAnomalyNet import FDFEAnomalyNet
from student_teacher.runtime import command_line, device, distributed
from student_teacher.runtime.errors import UserError, run
from student_teacher.runtime.prefetch import processors
from student_teacher.runtime.SyncBatchNorm2d import SyncBatchNorm2d
from student_teacher.training.optimiser import Optimiser
from student_teacher.training.patch_students import Students

ESTIMATED = 8  # GPUs, or machines
WORKER = "SCALING_WORKER"  # environment variable with the path of the file that a worker writes


def parse_arguments(arguments: list[str] | None = None) -> Namespace:
    """Read the command line."""
    options = measuring.parser(__doc__, repeat=5)
    options.set_defaults(patch_size=[65])
    options.add_argument("--stride", type=int, choices=measuring.STRIDES, default=4, help="as in training (default 4)")
    options.add_argument(
        "--batch-size", type=command_line.positive, default=4, help="images per step, over all processes"
    )
    options.add_argument("--students", type=command_line.positive, default=3, help="the paper takes 3 (default 3)")
    options.add_argument("--processes", type=command_line.positive, nargs="+", default=[1, 2], help="default 1 2")
    for name, default, what in (("gpu", 300, "GPUs of a machine"), ("network", 1.25, "machines")):
        options.add_argument(
            f"--{name}-bandwidth",
            type=command_line.positive_real,
            default=default,
            metavar="GB/S",
            help=f"bandwidth between {what} in each direction, for the estimate (default {default})",
        )
    return measuring.read(options, arguments)


def measure_steps(args: Namespace) -> dict:
    """Seconds of each step, measured as one of the processes, and the size of the gradients in bytes."""
    where, precision = args.device, args.precision[-1]
    size = args.patch_size[0]
    torch.manual_seed(0)
    nets = nn.ModuleList(AnomalyNet(size, batch_normalisation=True) for _ in range(args.students))
    SyncBatchNorm2d.convert(nets)
    teacher, nets = (
        part.to(where, memory_format=device.memory_format(where))
        for part in (AnomalyNet(size).eval().requires_grad_(False), nets)
    )
    students = Students(FDFEAnomalyNet(teacher, args.stride, padding=PADDING), nets, device.Compute(where, precision))
    optimiser = Optimiser(nets, "muon", 0.01)
    images = distributed.share(measuring.random_images(args, args.batch_size))

    def step():
        optimiser.zero_grad()
        students.learn(images, len(images) / args.batch_size)
        optimiser.step(1.0)

    turns = measuring.interleaved({"step": step}, args.repeat, where)["step"].turns
    return {"turns": turns, "gradient_bytes": sum(4 * weights.numel() for weights in nets.parameters())}


def work() -> None:
    """Run as one of the processes that `main` starts."""
    found = measure_steps(parse_arguments())
    if distributed.is_first():
        Path(os.environ[WORKER]).write_text(json.dumps(found), encoding="utf-8")


def measured(processes: int, arguments: list[str]) -> dict:
    """The measurements of this number of processes."""
    cores = processors()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "steps.json"
        variables = {"OMP_NUM_THREADS": str(max(1, cores // processes)), WORKER: str(file)}
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [sys.executable, *launcher, __file__, *arguments]
        if status := subprocess.run(command, env=os.environ | variables).returncode:
            raise UserError(f"--processes {processes}: ended with status {status}, see above")
        return json.loads(file.read_text(encoding="utf-8"))


def ring_seconds(processes: int, size: int, bandwidth: float) -> float:
    """Seconds for a ring all-reduce of `size` bytes at `bandwidth` bytes per second."""
    return 2 * (processes - 1) / processes * size / bandwidth


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the tables, write JSON."""
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parse_arguments(arguments)
    machine = measuring.machine(args.device)
    if args.device.type == "cuda" and (most := max(args.processes)) > torch.cuda.device_count():
        raise UserError(f"--processes {most}: each needs its own GPU, but there are {torch.cuda.device_count()}")
    print(f"{measuring.machine_line(machine)}\n")
    rows = []
    for processes in args.processes:
        found = measured(processes, arguments)
        visits = args.batch_size / Timing(found["turns"]).median
        rows.append({"processes": processes, "visits_per_second": visits} | found)
    first = rows[0]["visits_per_second"]
    lines = [
        (
            row["processes"],
            Timing(row["turns"]).rounded,
            f"{row['visits_per_second']:.3g}",
            measuring.ratio(row["visits_per_second"] / first),
        )
        for row in rows
    ]
    print(measuring.table(("processes", "ms a step: median (spread)", "visits/s", "to the first"), lines))
    step, size = Timing(rows[0]["turns"]).median, rows[0]["gradient_bytes"]
    estimates = []
    for what, bandwidth in (("GPUs", args.gpu_bandwidth), ("machines", args.network_bandwidth)):
        ring = ring_seconds(ESTIMATED, size, bandwidth * 1e9)
        speed_up = ESTIMATED * step / (step + ring)
        estimates.append({"of": what, "ring_seconds": ring, "speed_up": speed_up})
        print(
            f"estimate, if each step takes as long as here: {ESTIMATED} {what} at {bandwidth:g} GB/s, "
            f"{size / 1e6:.1f} MB of gradients: "
            f"{1e3 * ring:.2f} ms beside a step of {measuring.milliseconds(step)} ms, "
            f"{speed_up:.2f} times the visits of one"
        )
    measuring.write_json(args.output, "scaling", args, machine, rows=rows, estimates=estimates)


if __name__ == "__main__":
    if WORKER in os.environ:
        distributed.run(work)
    run(main, resumes=False)
