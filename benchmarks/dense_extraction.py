"""How fast patch networks describe images, against the published way and against visiting every patch.

One network, all strides, in the precisions that are asked for; beside it multi-pooling into the batch (Bailer et al.,
BMVC 2017) in float32, and each patch by itself, which is measured on a few rows and multiplied up. Repetitions take
turns, so that a machine that slows down slows all alike; the first turn warms up and is not counted. TFLOP counts the
multiplications and additions of the convolutions that are computed; "of product" is their rate as a share of the rate
at which the same run multiplies two large matrices.
"""

import json
import platform
import statistics
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import torch
from published import MultiPoolingNet

import device
import FDFE
from AnomalyNet import PATCH_SIZES, AnomalyNet
from ExtendedAnomalyNet import ExtendedAnomalyNet
from FDFEAnomalyNet import FDFEAnomalyNet

STRIDES = (1, 2, 4, 8)


def parse_arguments(arguments=None):
    """Read the command line."""
    options = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    options.add_argument("--patch-size", type=int, nargs="+", choices=PATCH_SIZES, default=list(PATCH_SIZES))
    options.add_argument("--stride", type=int, nargs="+", choices=STRIDES, default=list(STRIDES))
    options.add_argument("--precision", nargs="+", choices=device.PRECISIONS[1:], default=["float32"])
    options.add_argument("--image-size", type=int, default=256)
    options.add_argument("--batch-size", type=int, default=1)
    options.add_argument("--repeat", type=int, default=5, help="counted turns (default 5)")
    options.add_argument("--sampled-rows", type=int, default=1, help="rows on which every patch is visited (default 1)")
    options.add_argument("--device", default="auto")
    options.add_argument("--output", type=Path, help="write all figures here, as JSON")
    return options.parse_args(arguments)


def seconds(work, where: torch.device) -> float:
    """How long a call takes, the device's work included."""
    started = time.perf_counter()
    work()
    if where.type == "cuda":
        torch.cuda.synchronize(where)
    return time.perf_counter() - started


def count_tflop(net: FDFEAnomalyNet, images: torch.Tensor) -> float:
    """Multiplications and additions of the convolutions on these images, in 10^12."""
    total, plain = 0, torch.nn.functional.conv2d

    def counting(x, weight, *rest):
        nonlocal total
        result = plain(x, weight, *rest)
        total += 2 * result[:, 0].numel() * weight.numel()
        return result

    FDFE.F.conv2d = counting
    try:
        net(images)
    finally:
        FDFE.F.conv2d = plain
    return total / 1e12


def measure(args) -> list[dict]:
    """All figures of a run, a dict for each way and setting."""
    where = device.choose(args.device)
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=where)
    images = images.contiguous(memory_format=device.memory_format(where))
    works, rows = {}, {}
    size = 4096 if where.type == "cuda" else 2048
    for precision in args.precision:
        matrices = torch.randn(2, size, size, device=where, dtype=getattr(torch, precision))
        works["product", precision] = partial(torch.matmul, *matrices)
    for patch_size in args.patch_size:
        net = AnomalyNet(patch_size).to(where).eval()
        strip = torch.randn(1, 3, args.sampled_rows, args.image_size, device=where)
        works["published", patch_size] = partial(MultiPoolingNet(net), images.contiguous())
        works["patches", patch_size] = partial(ExtendedAnomalyNet(net), strip)
        ours = AnomalyNet(patch_size).to(where, memory_format=device.memory_format(where)).eval()
        for stride in args.stride:
            dense = FDFEAnomalyNet(ours, stride)
            tflop = count_tflop(dense, images)
            for precision in args.precision:
                key = patch_size, stride, precision
                rows[key] = dict(zip(("patch_size", "stride", "precision"), key, strict=True)) | {"tflop": tflop}

                def work(dense=dense, precision=precision):
                    with device.autocast(where, precision):
                        dense(images)

                works[key] = work
    times = {key: [] for key in works}
    with torch.inference_mode():
        for turn in range(args.repeat + 1):
            for key, work in works.items():
                took = seconds(work, where)
                if turn:
                    times[key].append(took)
    medians = {key: statistics.median(values) for key, values in times.items()}
    for key, row in rows.items():
        patch_size, _, precision = key
        rate = row["tflop"] / medians[key]
        product = 2 * size**3 / 1e12 / medians["product", precision]
        all_patches = medians["patches", patch_size] * args.batch_size * args.image_size / args.sampled_rows
        row |= {
            "seconds": medians[key],
            "fastest": min(times[key]),
            "slowest": max(times[key]),
            "tflop_per_second": rate,
            "share_of_product": rate / product,
            "times_published": medians["published", patch_size] / medians[key],
            "times_every_patch": all_patches / medians[key],
        }
    return list(rows.values())


def main(arguments=None) -> None:
    """Measure, print a table, write JSON."""
    args = parse_arguments(arguments)
    rows = measure(args)
    where = device.choose(args.device)
    machine = torch.cuda.get_device_name(where) if where.type == "cuda" else f"{platform.machine()} CPU"
    threads = torch.get_num_threads()
    size = f"{args.batch_size} x {args.image_size} x {args.image_size}"
    print(f"{size}, {machine}, {threads} threads, torch {torch.__version__}")
    print("| p | stride | precision | seconds (fastest to slowest) | TFLOP | of product | published | every patch* |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        times = f"{row['seconds']:.3f} ({row['fastest']:.3f} to {row['slowest']:.3f})"
        ratios = f"{row['share_of_product']:.0%} | {row['times_published']:.1f} x | {row['times_every_patch']:.0f} x"
        print(
            f"| {row['patch_size']} | {row['stride']} | {row['precision']} | {times} | {row['tflop']:.3f} | {ratios} |"
        )
    print(f"* measured on {args.sampled_rows} of {args.image_size} rows")
    if args.output:
        args.output.write_text(json.dumps({"machine": machine, "threads": threads, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
