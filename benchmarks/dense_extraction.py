"""Speed of dense extraction with patch networks, compared with the published way and with computing every patch.

One network at every stride and precision; for comparison, in float32, multi-pooling into the batch (Bailer et al., BMVC
2017), and patch by patch. The latter is measured on a few rows and extrapolated. Both compute every pixel: they have no
stride. All take turns on the same images; the first turn isn't counted. Before timing, multi-pooling must give the same
descriptors, within 1e-5 on every pixel.

How to read the table: "TFLOP" are the multiplications and additions of the convolutions that are computed. "of product"
is their rate, TFLOP/s, as a fraction of the rate at which the same run multiplies two large matrices in the same
precision: 100 % is all that the hardware can do. "to published" and "to every patch" are the speed-ups over these, for
the whole image.

    python3 benchmarks/dense_extraction.py --patch-size 65 --output dense_extraction.json
"""

import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import measuring
import torch
from measuring import Timing
from published import MultiPoolingNet, require_same_descriptors

from AnomalyNet import AnomalyNet
from ExtendedAnomalyNet import ExtendedAnomalyNet
from FDFEAnomalyNet import FDFEAnomalyNet
from student_teacher.images import preprocessing
from student_teacher.runtime import command_line, device
from student_teacher.runtime.errors import run


def parse_arguments(arguments: list[str] | None = None) -> Namespace:
    """Read the command line."""
    options = measuring.parser(__doc__)
    measuring.add_rated(options)
    options.add_argument(
        "--sampled-rows",
        type=command_line.positive,
        default=1,
        help="rows of an image on which every patch is computed; more give a steadier figure (default 1)",
    )
    options.add_argument(
        "--compile", action="store_true", help="also measure bfloat16 with torch.compile, for GPUs: takes minutes"
    )
    return measuring.read(options, arguments)


@torch.no_grad()  # torch.compile doesn't accept inference tensors
def measure(args: Namespace) -> tuple[list[dict], list[dict], dict[str, float]]:
    """A row for each setting of ours, a row for each baseline, and the rates of matrix products."""
    images = preprocessing.normalise(measuring.random_images(args, args.batch_size))
    sampled_rows = min(args.sampled_rows, args.image_size)
    works, rows = measuring.product_works(args), {}
    for patch_size in args.patch_size:
        net = AnomalyNet(patch_size).to(args.device, memory_format=device.memory_format(args.device)).eval()
        require_same_descriptors(net, measuring.corner(images))
        published = MultiPoolingNet(net)
        works["published", patch_size] = partial(published, images.contiguous())
        works["every patch", patch_size] = partial(
            ExtendedAnomalyNet(published.net), images[:1, :, :sampled_rows].contiguous()
        )
        for stride in args.stride:
            dense = FDFEAnomalyNet(net, stride)
            tflop = measuring.count_tflop(partial(dense, images))
            for precision in args.precision:
                row = {"patch_size": patch_size, "stride": stride, "precision": precision, "tflop": tflop}
                for way in ("", "compiled") if args.compile and precision == "bfloat16" else ("",):
                    key = patch_size, stride, precision, way
                    rows[key] = row | {"way": way}
                    works[key] = partial(describe, compiled(dense) if way else dense, images, precision)
    timings = measuring.interleaved(works, args.repeat, args.device)
    rates = measuring.product_rates(args, timings)
    baselines = {}
    for patch_size in args.patch_size:
        sample = timings["every patch", patch_size]
        times = args.batch_size * args.image_size / sampled_rows
        for way, timing in (
            ("published", timings["published", patch_size]),
            ("every patch", Timing([times * turn for turn in sample.turns])),
        ):
            baselines[way, patch_size] = {"way": way, "patch_size": patch_size} | timing.summary()
        baselines["every patch", patch_size] |= {
            "measured_rows": sampled_rows,
            "extrapolated_from_seconds": sample.turns,
        }
    for key, row in rows.items():
        patch_size, _, precision, _ = key
        taken = timings[key].median
        row |= measuring.rated(timings[key], row["tflop"], rates[precision]) | {
            "times_published": baselines["published", patch_size]["seconds"] / taken,
            "times_every_patch": baselines["every patch", patch_size]["seconds"] / taken,
        }
    return list(rows.values()), list(baselines.values()), rates


def compiled(dense: FDFEAnomalyNet) -> Callable[[torch.Tensor], torch.Tensor]:
    """The same function compiled, with the operations between convolutions fused."""
    torch._dynamo.config.cache_size_limit = 64  # one graph per patch size, stride and precision
    inner = torch.compile(dense.describe_padded)
    return lambda images: inner(dense.pad(images))


def describe(dense: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, precision: str) -> torch.Tensor:
    """Descriptors of normalised images (N,3,H,W)."""
    with device.autocast(images.device, precision):
        return dense(images)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table, write JSON."""
    args = parse_arguments(arguments)
    rows, baselines, rates = measure(args)
    machine = measuring.machine(args.device)
    print(f"One network, {args.batch_size} x {args.image_size} x {args.image_size}, {args.repeat} turns each")
    print(f"{measuring.machine_line(machine)}\n{measuring.rates_line(args, rates)}\n")
    lines = [
        (
            row["patch_size"],
            "every patch*" if row["way"] == "every patch" else "1, published",
            "float32",
            Timing(row["turns"]).rounded,
            *[""] * 5,
        )
        for row in baselines
    ]
    lines += [
        (
            row["patch_size"],
            row["stride"],
            f"{row['precision']} {row['way']}".strip(),
            Timing(row["turns"]).rounded,
            f"{row['tflop']:.3g}",
            f"{row['tflop_per_second']:.3g}",
            f"{row['share_of_product']:.0%}",
            measuring.ratio(row["times_published"]),
            measuring.ratio(row["times_every_patch"]),
        )
        for row in rows
    ]
    lines.sort(key=lambda line: line[0])  # stable: the baselines stay first
    columns = "TFLOP", "TFLOP/s", "of product", "to published", "to every patch*"
    print(measuring.table(("patch", "stride", "precision", "ms: median (spread)", *columns), lines))
    print(f"\n* extrapolated from {min(args.sampled_rows, args.image_size)} of {args.image_size} rows of one image")
    measuring.write_json(
        args.output,
        "dense_extraction",
        args,
        machine,
        warm_up_turns=measuring.WARM_UP,
        product_tflop_per_second=rates,
        rows=rows,
        baselines=baselines,
    )


if __name__ == "__main__":
    run(main, resumes=False)
