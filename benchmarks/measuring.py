"""Shared by all benchmarks: timing in turns, medians and spread, the machine, its matrix product rate, tables, JSON.

Contenders take turns, so that other load on the machine affects all of them. The first turns warm up and don't count:
they include one-time costs such as allocating memory, choosing algorithms and compiling.
"""

import json
import math
import platform
import statistics
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from AnomalyDataset import AnomalyDataset
from AnomalyNet import PATCH_SIZES
from student_teacher.runtime import command_line, device
from student_teacher.runtime.errors import UserError
from student_teacher.runtime.prefetch import processors

STRIDES = (1, 2, 4, 8)
WARM_UP = 1
CHECKED_SIZE = 40  # height and width of the crop on which results are compared, at most
GPU_PRODUCTS = 50  # in one turn: a single one would take no longer than its launch


class Timing(NamedTuple):
    """Seconds of each counted turn."""

    turns: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.turns)

    @property
    def rounded(self) -> str:
        """Median and spread in milliseconds, for a table."""
        return f"{milliseconds(self.median)} ({milliseconds(min(self.turns))} .. {milliseconds(max(self.turns))})"

    def summary(self) -> dict[str, Any]:
        """Median, spread and every turn, for JSON."""
        return {
            "seconds": self.median,
            "fastest": min(self.turns),
            "slowest": max(self.turns),
            "turns": self.turns,
        }


def milliseconds(seconds: float) -> str:
    """Milliseconds with at least three digits."""
    value = 1e3 * seconds
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f}" if value > 0 else "0"


def ratio(value: float) -> str:
    """A factor, with at least two digits."""
    return f"{value:.2g} x" if value < 1 else f"{value:,.{0 if value >= 100 else 1}f} x"


def seconds(work: Callable[[], object], where: torch.device | None = None) -> float:
    """Seconds that one call takes, including the GPU's work."""
    synchronise(where)
    start = time.perf_counter()
    work()
    synchronise(where)
    return time.perf_counter() - start


def synchronise(where: torch.device | None) -> None:
    """Wait until a GPU has done its work."""
    if where is not None and where.type == "cuda":
        torch.cuda.synchronize(where)


def interleaved(
    works: Mapping[Hashable, Callable[[], object]],
    repeat: int,
    where: torch.device | None = None,
    *,
    warm_up: int = WARM_UP,
    fewer: Mapping[Hashable, int] | None = None,
) -> dict[Hashable, Timing]:
    """Time each work `repeat` times, in turns, after `warm_up` turns that don't count.

    `fewer` maps works that should take fewer turns to their number of turns.
    """
    turns = {key: [] for key in works}
    for turn in range(-warm_up, repeat):
        for key, work in works.items():
            if turn < (fewer or {}).get(key, repeat):
                took = seconds(work, where)
                if turn >= 0:
                    turns[key].append(took)
    return {key: Timing(values) for key, values in turns.items()}


def parser(description: str, repeat: int = 5) -> ArgumentParser:
    """A parser with the options of the benchmarks that run networks; `read` parses the command line with it."""
    options = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    options.add_argument("--device", type=_device, default="auto", help="auto (a GPU if available), cpu, cuda ...")
    options.add_argument(
        "--patch-size",
        type=int,
        nargs="+",
        choices=PATCH_SIZES,
        default=list(PATCH_SIZES),
        help="sides of the patches in pixels (default: all)",
    )
    options.add_argument(
        "--precision",
        nargs="+",
        choices=device.PRECISIONS[1:],
        help="default: float32, and bfloat16 if the hardware computes it faster",
    )
    options.add_argument("--image-size", type=command_line.positive, default=256, help="height and width (default 256)")
    options.add_argument(
        "--repeat",
        type=command_line.positive,
        default=repeat,
        help=f"turns that count, after {WARM_UP} to warm up; raise it if the spread is wide, as on a busy machine "
        f"(default {repeat})",
    )
    options.add_argument("--seed", type=command_line.seed, default=0, help="of images and weights (default 0)")
    options.add_argument("--output", type=Path, help="write machine, settings, every turn and the table here, as JSON")
    return options


def add_rated(options: ArgumentParser) -> None:
    """Add --stride, --batch-size and --matrix-size, for benchmarks that compare rates with a matrix product."""
    add_strides(options, STRIDES)
    options.add_argument("--batch-size", type=command_line.positive, default=1, help="images at once (default 1)")
    options.add_argument(
        "--matrix-size",
        type=command_line.positive,
        default=4096,
        help="size of the square matrices whose product shows the peak rate of the hardware; 1024 is quicker on a slow "
        "CPU, but may not reach the peak (default 4096)",
    )


def add_strides(options: ArgumentParser, default: Sequence[int]) -> None:
    """Add --stride."""
    options.add_argument(
        "--stride",
        type=int,
        nargs="+",
        choices=STRIDES,
        default=list(default),
        help=f"describe every STRIDE-th pixel along each side (default {' '.join(map(str, default))})",
    )


def read(options: ArgumentParser, arguments: Sequence[str] | None) -> Namespace:
    """Parse the command line, fill in the precisions, seed the weights."""
    args = options.parse_args(arguments)
    if args.precision is None:
        args.precision = ["float32", "bfloat16"] if device.computes_bfloat16_faster(args.device) else ["float32"]
    torch.manual_seed(args.seed)
    return args


def require_measurable(dataset: AnomalyDataset) -> None:
    """Raise UserError unless there are good and defective test images, the latter with masks."""
    defective = [row for row in dataset.rows if row["label"]]
    if not 0 < len(defective) < len(dataset.rows) or not all(row["gt_name"] for row in defective):
        raise UserError(f"{dataset.root_dir} needs good and defective test images, the latter with masks")


def _device(name):
    try:
        return device.choose(name)
    except UserError as error:
        raise ArgumentTypeError(str(error)) from None


def compute(args: Namespace) -> device.Compute:
    """Where and how to compute, from options for device, precision and seed."""
    return device.Compute(device.choose(args.device), args.precision, args.seed)


def random_images(args: Namespace, number: int) -> torch.Tensor:
    """Images of noise, uint8 (number,3,H,W), on the device."""
    shape = number, 3, args.image_size, args.image_size
    return torch.randint(256, shape, dtype=torch.uint8, generator=device.generator(args.seed)).to(args.device)


def product_works(args: Namespace) -> dict[Hashable, Callable[[], object]]:
    """The product of two large matrices in each precision, to be timed in the same turns as the rest.

    In float32 a GPU rounds their entries as for convolutions (TF32, by PyTorch's default).
    """
    works = {}
    for precision in args.precision:
        pair = torch.randn(2, args.matrix_size, args.matrix_size, device=args.device, dtype=getattr(torch, precision))

        def work(first=pair[0], second=pair[1]):
            before = torch.backends.cuda.matmul.fp32_precision
            torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision
            for _ in range(_products(args)):
                first @ second
            torch.backends.cuda.matmul.fp32_precision = before

        works["product", precision] = work
    return works


def product_rates(args: Namespace, timings: Mapping[Hashable, Timing]) -> dict[str, float]:
    """TFLOP/s of the matrix products in each precision."""
    tflop = 2 * args.matrix_size**3 * _products(args) / 1e12
    return {precision: tflop / timings["product", precision].median for precision in args.precision}


def rated(timing: Timing, tflop: float, rate: float) -> dict[str, Any]:
    """A timing's summary, its TFLOP/s, and that as a fraction of `rate`, the matrix product's."""
    found = tflop / timing.median
    return timing.summary() | {"tflop_per_second": found, "share_of_product": found / rate}


def corner(images: torch.Tensor, side: int = CHECKED_SIZE) -> torch.Tensor:
    """A crop of one image, not square, on which results are compared before they are timed."""
    return images[:1, :, :side, : side - 3]


def _products(args):
    return GPU_PRODUCTS if args.device.type == "cuda" else 1


def count_tflop(work: Callable[[], object]) -> float:
    """Multiplications and additions of the convolutions in a call, in 10^12; a multiply-add counts as two.

    Counted from the shapes of the calls: what is computed twice, as where tiles overlap, counts twice.
    """
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 1e12


@contextmanager
def exact_float32() -> Iterator[None]:
    """Let a GPU convolve in full float32, without rounding to TF32, to compare results."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    try:
        yield
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


def machine(where: torch.device | None = None) -> dict[str, Any]:
    """The hardware and the PyTorch version of a measurement."""
    found = {
        "cpu": cpu_model(),
        "cores": processors(),
        "threads": torch.get_num_threads(),
        "architecture": platform.machine(),
        "matrix_units": [name for name in ("amx_bf16", "avx512_bf16") if torch.cpu.get_capabilities().get(name)],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if where is not None and where.type == "cuda":
        precision = torch.backends.cudnn.conv.fp32_precision
        found |= {"gpu": torch.cuda.get_device_name(where), "cuda": torch.version.cuda, "float32_on_gpu": precision}
    return found


def cpu_model() -> str:
    """The processor's name."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine_line(found: Mapping[str, Any]) -> str:
    """`machine` in one line."""
    units = f" with {', '.join(found['matrix_units'])}" if found["matrix_units"] else ""
    gpu = f"{found['gpu']} (CUDA {found['cuda']}, float32 as {found['float32_on_gpu']}); " if "gpu" in found else ""
    return f"{gpu}{found['cpu']}{units}, {found['cores']} cores, {found['threads']} threads, torch {found['torch']}"


def rates_line(args: Namespace, rates: Mapping[str, float]) -> str:
    """`product_rates` in one line."""
    measured = ", ".join(f"{rate:.3g} TFLOP/s in {precision}" for precision, rate in rates.items())
    return f"product of two {args.matrix_size} x {args.matrix_size} matrices: {measured}"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table with aligned columns, numbers on the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    left = [not any(row[column][:1].isdigit() for row in cells[1:]) for column in range(len(header))]
    lines = [
        "| "
        + " | ".join(c.ljust(w) if lean else c.rjust(w) for c, w, lean in zip(row, widths, left, strict=True))
        + " |"
        for row in cells
    ]
    rule = "|" + "|".join("-" * (w + 2) if lean else "-" * (w + 1) + ":" for w, lean in zip(widths, left, strict=True))
    return "\n".join([lines[0], rule + "|", *lines[1:]])


def write_json(
    path: Path | None, benchmark: str, settings: Namespace, found: Mapping[str, Any], **content: Any
) -> None:
    """Write the measurements as JSON, if a path is given."""
    if path is None:
        return
    options = {name: value for name, value in vars(settings).items() if name != "output"}
    report = {"benchmark": benchmark, "machine": found, "settings": options} | content
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2, default=str) + "\n", encoding="utf-8")
