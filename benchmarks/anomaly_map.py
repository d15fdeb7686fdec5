"""Speed of whole anomaly maps, from uint8 image to map and image score, compared with the published way.

A teacher and its students score images of noise, with random weights: the time doesn't depend on either. The published
way describes every pixel by multi-pooling in float32, stacks the students' descriptors and takes mean and variance over
the stack. All take turns on the same images, which are on the device already; the first turn isn't counted. Before
timing, both ways must give the same map in float32.

How to read the table: "to published" is the speed-up over the published way. "of product" is the rate of the networks'
convolutions over the whole time, scoring included, as a fraction of the rate at which the same run multiplies two large
matrices in the same precision. With stride 2 or more the time includes interpolating the map to every pixel.

--memory measures the peak memory above the models while one map is computed, each in its own process on a CPU.

    python3 benchmarks/anomaly_map.py --patch-size 65 --memory 256 4096 --output anomaly_map.json
"""

import multiprocessing
import resource
import sys
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import measuring
import torch
from measuring import Timing
from published import PublishedDetector, require_same_maps

from AnomalyNet import DESCRIPTOR_SIZE, AnomalyNet
from student_teacher.detection import scoring
from student_teacher.detection.AnomalyDetector import AnomalyDetector, Scale
from student_teacher.runtime import command_line, device
from student_teacher.runtime.errors import run


def parse_arguments(arguments: list[str] | None = None) -> Namespace:
    """Read the command line."""
    options = measuring.parser(__doc__)
    measuring.add_rated(options)
    options.add_argument("--students", type=command_line.positive, default=3, help="the paper takes 3 (default 3)")
    options.add_argument(
        "--memory",
        type=command_line.positive,
        nargs="*",
        metavar="PIXELS",
        help="also measure peak memory on one image of this height and width, or of several sizes; the published way "
        "only up to --image-size (without a number: 4096)",
    )
    args = measuring.read(options, arguments)
    args.memory = [] if args.memory is None else args.memory or [4096]
    return args


def make_scale(args: Namespace, patch_size: int) -> Scale:
    """Teacher and students with random weights."""
    nets = [AnomalyNet(patch_size) for _ in range(args.students + 1)]
    scale = Scale(nets[0], nets[1:], torch.zeros(DESCRIPTOR_SIZE), torch.ones(DESCRIPTOR_SIZE))
    return scale.to(args.device, memory_format=device.memory_format(args.device)).eval()


@torch.inference_mode()
def detect(detector: Callable, images: torch.Tensor, precision: str = "float32") -> tuple[torch.Tensor, list[float]]:
    """Maps (N,H,W) on the device, and the images' scores."""
    with device.autocast(images.device, precision):
        maps = detector(images)
    return maps, scoring.image_scores(maps, scoring.TOP).tolist()


def measure(args: Namespace) -> tuple[list[dict], list[dict], dict[str, float]]:
    """A row for each setting of ours, a row for each patch size as published, and the rates of matrix products."""
    images = measuring.random_images(args, args.batch_size)
    works, rows = measuring.product_works(args), {}
    for patch_size in args.patch_size:
        scale = make_scale(args, patch_size)
        published = PublishedDetector(scale)
        require_same_maps(published, AnomalyDetector([scale]), measuring.corner(images))
        works["published", patch_size] = partial(detect, published, images)
        for stride in args.stride:
            detector = AnomalyDetector([scale], stride)
            tflop = measuring.count_tflop(partial(detector, images))
            for precision in args.precision:
                key = patch_size, stride, precision
                rows[key] = {"patch_size": patch_size, "stride": stride, "precision": precision, "tflop": tflop}
                works[key] = partial(detect, detector, images, precision)
    timings = measuring.interleaved(works, args.repeat, args.device)
    rates = measuring.product_rates(args, timings)
    baselines = {
        patch_size: {"way": "published", "patch_size": patch_size} | timings["published", patch_size].summary()
        for patch_size in args.patch_size
    }
    for key, row in rows.items():
        patch_size, _, precision = key
        taken = timings[key].median
        row |= measuring.rated(timings[key], row["tflop"], rates[precision]) | {
            "times_published": baselines[patch_size]["seconds"] / taken,
        }
    return list(rows.values()), list(baselines.values()), rates


def measure_memory(args: Namespace) -> list[dict]:
    """Peak memory above the models, in bytes, for each size, way and setting."""
    found = []
    ours = [(stride, precision) for stride in args.stride for precision in args.precision]
    for size in args.memory:
        for patch_size in args.patch_size:
            for stride, precision in ours + ([(None, "float32")] if size <= args.image_size else []):
                work = partial(peak_memory, args, patch_size, stride, precision=precision, size=size)
                if args.device.type == "cuda":
                    peak = work()
                else:
                    context = multiprocessing.get_context("spawn")
                    with ProcessPoolExecutor(1, context, torch.set_num_threads, (torch.get_num_threads(),)) as process:
                        peak = process.submit(work).result()
                way = "published" if stride is None else "ours"
                setting = {"patch_size": patch_size, "stride": stride or 1, "precision": precision}
                found.append({"way": way, "image_size": size} | setting | {"peak_bytes": peak})
    return found


def peak_memory(args: Namespace, patch_size: int, stride: int | None, *, precision: str, size: int) -> int:
    """Peak memory in bytes above the models and the image while its map is computed; `stride` None: as published."""
    scale = make_scale(args, patch_size)
    detector = PublishedDetector(scale) if stride is None else AnomalyDetector([scale], stride)
    image = torch.randint(256, (1, 3, size, size), dtype=torch.uint8, device=args.device)
    detect(detector, image[:, :, :1, :1], precision)  # warms up
    if args.device.type == "cuda":
        torch.cuda.synchronize(args.device)
        torch.cuda.reset_peak_memory_stats(args.device)
        before = torch.cuda.memory_allocated(args.device)
        detect(detector, image, precision)
        return torch.cuda.max_memory_allocated(args.device) - before
    before = resident_bytes("VmRSS")
    detect(detector, image, precision)
    return max(0, resident_bytes("VmHWM") - before)


def resident_bytes(field: str) -> int:
    """This process's memory: VmRSS now, VmHWM its peak. Without Linux's /proc it is the peak for both."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would include the peak of the process that started this one
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the tables, write JSON."""
    args = parse_arguments(arguments)
    rows, baselines, rates = measure(args)
    machine = measuring.machine(args.device)
    size = f"{args.batch_size} x {args.image_size} x {args.image_size}"
    print(f"Image to map and score, teacher, students: {args.students}, {size}, {args.repeat} turns each")
    print(f"{measuring.machine_line(machine)}\n{measuring.rates_line(args, rates)}\n")
    lines = [
        (row["patch_size"], "1, published", "float32", Timing(row["turns"]).rounded, *[""] * 4) for row in baselines
    ]
    lines += [
        (
            row["patch_size"],
            row["stride"],
            row["precision"],
            Timing(row["turns"]).rounded,
            f"{row['tflop']:.3g}",
            f"{row['tflop_per_second']:.3g}",
            f"{row['share_of_product']:.0%}",
            measuring.ratio(row["times_published"]),
        )
        for row in rows
    ]
    lines.sort(key=lambda line: line[0])  # stable: the baselines stay first
    columns = "TFLOP", "TFLOP/s", "of product", "to published"
    print(measuring.table(("patch", "stride", "precision", "ms: median (spread)", *columns), lines))
    memory = measure_memory(args)
    if memory:
        print("\nPeak memory above the models, one image\n")
        names = "image_size", "patch_size", "way", "stride", "precision"
        lines = [(*(row[name] for name in names), f"{row['peak_bytes'] / 2**20:,.0f}") for row in memory]
        print(measuring.table(("image", "patch", "way", "stride", "precision", "MiB"), lines))
    measuring.write_json(
        args.output,
        "anomaly_map",
        args,
        machine,
        warm_up_turns=measuring.WARM_UP,
        product_tflop_per_second=rates,
        rows=rows,
        baselines=baselines,
        memory=memory,
    )


if __name__ == "__main__":
    run(main, resumes=False)
