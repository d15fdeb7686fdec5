"""Speed of a category's detector in ONNX Runtime on the CPU, compared with PyTorch.

From uint8 images of noise to anomaly maps and image scores, with PyTorch's number of threads (OMP_NUM_THREADS). All
take turns on the same images; the first turn isn't counted. Before timing, ONNX Runtime must give PyTorch's maps in
float32.

How to read the table: "to float32" is the speed-up over PyTorch in float32. It depends on the processor: compare on the
one that you will use. Needs requirements-onnx.txt.

    python3 benchmarks/onnx_runtime.py magnetic_tile --output onnx_runtime.json
"""

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import measuring
import numpy as np
import onnxruntime
import torch
from measuring import Timing

from student_teacher.detection import onnx_graph, scoring
from student_teacher.detection.Detector import Detector, load_detector
from student_teacher.runtime import command_line, device
from student_teacher.runtime.errors import UserError, run
from student_teacher.runtime.paths import add_folders

FLOAT32 = "PyTorch", "float32"  # what the others are compared with
TOLERANCE = 1e-4  # of the map's range


def parse_arguments(arguments: list[str] | None = None) -> Namespace:
    """Read the command line."""
    options = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    options.add_argument("category", help="a category whose students have been trained")
    add_folders(options, "model")
    options.add_argument("--stride", type=int, choices=measuring.STRIDES, help="of patch students (default as trained)")
    options.add_argument(
        "--image-size", type=command_line.positive, nargs="+", help="height and width (default as trained)"
    )
    options.add_argument("--batch-size", type=command_line.positive, default=1, help="images at once (default 1)")
    options.add_argument(
        "--repeat", type=command_line.positive, default=5, help="turns that count, for each (default 5)"
    )
    options.add_argument("--output", type=Path, help="write machine, settings and every turn here, as JSON")
    return options.parse_args(arguments)


def session_of(detector: Detector) -> onnxruntime.InferenceSession:
    """The detector in ONNX Runtime, with PyTorch's number of threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    content = onnx_graph.model_of(detector).SerializeToString()
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


@torch.inference_mode()
def detect(detector: Detector, images: torch.Tensor, precision: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps and scores by PyTorch."""
    with device.autocast(images.device, precision):
        found = detector.networks.maps(images)
    return found.anomaly_maps, scoring.image_scores(found.scored_maps, scoring.SMOOTH)


def measure(args: Namespace) -> list[dict]:
    """A row for each runtime and precision; `seconds` and `turns` are for one image."""
    path = args.model / args.category / "detector.pt"
    detector = load_detector(path, stride=args.stride, device_name="cpu", precision="float32")
    size = (args.image_size[0], args.image_size[-1]) if args.image_size else detector.size
    if size is None:
        raise UserError("images of native size differ: give one size with --image-size")
    random = np.random.default_rng(0)
    images = torch.from_numpy(random.integers(0, 256, (args.batch_size, 3, *size), np.uint8))
    session = session_of(detector)
    found, _ = session.run(["maps", "scores"], {"images": images.numpy()})
    expected, _ = detect(detector, images, "float32")
    if np.abs(found - expected.numpy()).max() > TOLERANCE * np.ptp(expected.numpy()):
        raise AssertionError("the maps of ONNX Runtime and of PyTorch differ")
    works = {
        FLOAT32: partial(detect, detector, images, "float32"),
        ("PyTorch", "bfloat16"): partial(detect, detector, images, "bfloat16"),
        ("ONNX Runtime", "float32"): partial(session.run, ["maps", "scores"], {"images": images.numpy()}),
    }
    timings = measuring.interleaved(works, args.repeat)
    return [
        {
            "size": list(size),
            "runtime": runtime,
            "precision": precision,
            **Timing([turn / args.batch_size for turn in timing.turns]).summary(),
            "times_float32": timings[FLOAT32].median / timing.median,
        }
        for (runtime, precision), timing in timings.items()
    ]


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table, write JSON."""
    args = parse_arguments(arguments)
    rows = measure(args)
    machine = measuring.machine() | {"onnxruntime": onnxruntime.__version__}
    size = " x ".join(map(str, (args.batch_size, *rows[0]["size"])))
    print(f"{args.category}: image to map and score, {size}, {args.repeat} turns each")
    print(f"{measuring.machine_line(machine)}, ONNX Runtime {machine['onnxruntime']}\n")
    lines = [
        (row["runtime"], row["precision"], Timing(row["turns"]).rounded, measuring.ratio(row["times_float32"]))
        for row in rows
    ]
    print(measuring.table(("runtime", "precision", "ms an image: median (spread)", "to float32"), lines))
    measuring.write_json(args.output, "onnx_runtime", args, machine, warm_up_turns=measuring.WARM_UP, rows=rows)


if __name__ == "__main__":
    run(main, resumes=False)
