"""Time for one image in our default detector, compared with EfficientAD and PatchCore, on the CPU.

From a decoded picture to anomaly map and image score, one image at a time. Ours runs in float32, in the precision of
"auto", and in ONNX Runtime: the detector of CATEGORY, or one fitted here to images of noise, which takes nearly as
long. The others are anomalib's, at --rival-size, with random weights, which take as long as trained ones:
EfficientAD-S, and PatchCore on a Wide-ResNet-50 with a memory bank of --bank of all patches of --images images. They
run in the same memory layout and precisions as ours, which is faster than their defaults. All take turns; the first
turn isn't counted. The number of threads is PyTorch's (OMP_NUM_THREADS).

What is not installed is left out, and a line says so. requirements-latency.txt has everything, best in its own
environment:

    python3 -m venv latency-venv && latency-venv/bin/pip install -r requirements-latency.txt
    latency-venv/bin/python benchmarks/latency.py bottle --output latency.json

How to read the tables: "to ours" is the time divided by ours in the precision of "auto". The second table splits that
time into steps; they are measured in separate runs, so their medians don't quite add up.
"""

import copy
import statistics
import sys
import time
import warnings
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial, wraps
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import detector_speed
import measuring
import numpy as np
import torch
from measuring import Timing
from PIL import Image
from torch import Tensor, nn

from student_teacher.detection import scoring
from student_teacher.detection.BackboneDetector import BackboneDetector
from student_teacher.detection.Detector import Detector, load_detector
from student_teacher.images import preprocessing
from student_teacher.runtime import command_line, device
from student_teacher.runtime.errors import UserError, run
from student_teacher.runtime.paths import add_folders
from student_teacher.students.GlobalStudent import GlobalStudent
from student_teacher.teachers.BackboneTeacher import BackboneTeacher, seen_size

CPU = torch.device("cpu")
PATCH_STRIDE = 8  # pixels between PatchCore's patches: those of layer2
WIDTH = 1536  # channels of a patch: those of layer2 and layer3
STEPS = (
    *("resize", "normalise", "backbone", "descriptors", "global students", "local students", "combination", "score"),
    *("the rest", "all"),
)


def parse_arguments(arguments: list[str] | None = None) -> Namespace:
    """Read the command line."""
    options = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    options.add_argument("category", nargs="?", help="the category of the detector (default: fit one to noise)")
    add_folders(options, "model")
    options.add_argument(
        "--image-size", type=command_line.positive, default=512, help="of the fitted one (default 512)"
    )
    options.add_argument(
        "--images", type=command_line.positive, default=209, help="number of good images (default 209)"
    )
    options.add_argument(
        "--rival-size",
        type=command_line.positive,
        default=256,
        help="image size of the others (default 256)",
    )
    options.add_argument(
        "--bank", type=command_line.fraction, default=0.1, help="fraction of patches that PatchCore keeps (default 0.1)"
    )
    options.add_argument(
        "--picture-size", type=command_line.positive, default=1024, help="of the picture (default 1024)"
    )
    options.add_argument(
        "--repeat", type=command_line.positive, default=20, help="turns that count, for each (default 20)"
    )
    options.add_argument("--seed", type=command_line.seed, default=0)
    options.add_argument("--output", type=Path, help="write machine, settings and every turn here, as JSON")
    return options.parse_args(arguments)


def our_detectors(args: Namespace) -> dict[str, Detector]:
    """The default detector in float32, and in the precision of "auto" if that is another."""
    if args.category:
        detector = load_detector(args.model / args.category / "detector.pt", device_name="cpu", precision="float32")
        if not isinstance(detector.networks, BackboneDetector):
            raise UserError(
                f"{args.category} has patch students: the default detector is timed here, a frozen backbone's"
            )
    else:
        settings = Namespace(**vars(args), device="cpu")
        size = seen_size((args.image_size, args.image_size))
        content, calibration = detector_speed.fitted(settings)
        networks = BackboneDetector.of_checkpoint(content)
        detector = Detector(
            networks, size, calibration, calibrated_stride=networks.stride, where=CPU, precision="float32"
        )
    found = {"float32": detector}
    auto = str(device.dtype_of(CPU, "auto")).removeprefix("torch.")
    if auto != "float32":
        found[auto] = Detector(
            copy.deepcopy(detector.networks),
            detector.size,
            None,
            calibrated_stride=detector.calibrated_stride,
            where=CPU,
            precision=auto,
        )
    return found


def in_onnx_runtime(detector: Detector, picture: Image.Image) -> Callable[[], tuple]:
    """The detector in ONNX Runtime, in float32. Raises ImportError if that is not installed."""
    from onnx_runtime import session_of

    session = session_of(detector)

    def work() -> tuple[Tensor, float]:
        seen = preprocessing.image_transform(detector.size)(picture)[None].numpy()
        maps, scores = session.run(["maps", "scores"], {"images": seen})
        return torch.from_numpy(maps)[0], scores.item()

    return work


def rivals(args: Namespace) -> dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]]:
    """EfficientAD-S and PatchCore with random weights, each with its preprocessing of a uint8 image (1,3,H,W).

    Raises ImportError if anomalib is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from anomalib.models.image.efficient_ad.torch_model import EfficientAdModel
        from anomalib.models.image.patchcore.torch_model import PatchcoreModel

        efficient_ad, patchcore = EfficientAdModel(), PatchcoreModel(["layer2", "layer3"], pre_trained=False)
    nn.init.ones_(efficient_ad.mean_std["std"])  # else it counts as untrained, and skips normalisation
    nn.init.ones_(efficient_ad.quantiles["qb_st"])
    nn.init.ones_(efficient_ad.quantiles["qb_ae"])
    patchcore.memory_bank = torch.randn(bank_size(args), WIDTH)
    found = {
        "EfficientAD-S": (efficient_ad, lambda image: image / 255),
        "PatchCore": (patchcore, preprocessing.normalise),
    }
    for model, _ in found.values():
        model.eval().to(memory_format=device.memory_format(CPU))
    return found


def bank_size(args: Namespace) -> int:
    """The number of patches in PatchCore's memory bank."""
    return max(1, round(args.bank * args.images * (args.rival_size // PATCH_STRIDE) ** 2))


@torch.inference_mode()
def by_rival(
    rival: tuple[nn.Module, Callable[[Tensor], Tensor]], picture: Image.Image, size: int, precision: str
) -> tuple[Tensor, float]:
    """Map and score from one of `rivals`."""
    model, given = rival
    seen = given(preprocessing.image_transform((size, size))(picture)[None])
    with device.autocast(CPU, precision):
        found = model(seen.contiguous(memory_format=device.memory_format(CPU)))
    return found.anomaly_map[0, 0], found.pred_score.item()


def works(args: Namespace, picture: Image.Image, ours: dict[str, Detector]) -> dict[tuple[str, str, int], Callable]:
    """The functions to time, by name, precision and image size. Prints what is left out."""
    side = max(ours["float32"].size)
    found = {("ours", precision, side): partial(d.predict, picture) for precision, d in ours.items()}
    try:
        found["ours, ONNX Runtime", "float32", side] = in_onnx_runtime(ours["float32"], picture)
    except ImportError as error:
        print(f"ONNX Runtime is left out, it is not installed (requirements-onnx.txt): {error}")
    expected = found["ours", "float32", side]()[0]
    for (name, precision, _), work in found.items():
        difference = (work()[0] - expected).abs().max() / (expected.max() - expected.min())
        if not difference < detector_speed.TOLERANCE[precision]:
            raise AssertionError(f"{name}, {precision}: maps differ by {difference:.2g} of their range")
    try:
        others = rivals(args)
    except ImportError as error:
        print(f"EfficientAD and PatchCore are left out, anomalib is not installed (requirements-latency.txt): {error}")
        others = {}
    for name, rival in others.items():
        for precision in ours:
            found[name, precision, args.rival_size] = partial(by_rival, rival, picture, args.rival_size, precision)
    return found


def steps(detector: Detector, picture: Image.Image, repeat: int) -> dict[str, list[float]]:
    """Seconds of each step of `predict`, and of the rest, in each of `repeat` turns."""
    clocked = {
        "resize": (detector, "_transform"),
        "normalise": (preprocessing, "normalise"),
        "backbone": (type(detector.networks.teacher.backbone), "levels"),
        "teacher": (BackboneTeacher, "forward"),
        "global students": (GlobalStudent, "forward"),
        "errors": (BackboneDetector, "errors"),
        "combination": (BackboneDetector, "maps_of"),
        "score": (scoring, "image_scores"),
    }
    turns: dict[str, list[float]] = defaultdict(list)
    for turn in range(-measuring.WARM_UP, repeat):
        took: dict[str, float] = defaultdict(float)
        with ExitStack() as patches:
            for name, (owner, attribute) in clocked.items():
                patches.enter_context(patch.object(owner, attribute, timed(getattr(owner, attribute), name, took)))
            took["all"] = measuring.seconds(partial(detector.predict, picture))
        # A step's time includes the steps that it calls.
        took["descriptors"] = took["teacher"] - took["normalise"] - took["backbone"]
        took["local students"] = took["errors"] - took["teacher"] - took["global students"]
        took["the rest"] = took["all"] - sum(took[name] for name in ("resize", "errors", "combination", "score"))
        if turn >= 0:
            for name in STEPS:
                turns[name].append(took[name])
    return dict(turns)


def timed(function: Callable, name: str, took: dict[str, float]) -> Callable:
    """Wrap a function so that it adds its seconds to took[name]."""

    @wraps(function)
    def work(*arguments, **options):
        start = time.perf_counter()
        found = function(*arguments, **options)
        took[name] += time.perf_counter() - start
        return found

    return work


def measure(args: Namespace) -> tuple[list[dict], list[dict]]:
    """A row for each contender, and one for each step of ours in the precision of "auto". Sets args.image_size."""
    random = np.random.default_rng(args.seed)
    coarse = random.integers(0, 256, (args.picture_size // 8, args.picture_size // 8, 3), np.uint8)
    picture = Image.fromarray(coarse).resize((args.picture_size, args.picture_size))
    ours = our_detectors(args)
    args.image_size = max(ours["float32"].size)
    timings = measuring.interleaved(works(args, picture, ours), args.repeat)
    auto = list(ours)[-1]
    reference = timings["ours", auto, args.image_size].median
    rows = [
        {"name": name, "precision": precision, "side": side}
        | timing.summary()
        | {"times_ours": timing.median / reference}
        for (name, precision, side), timing in timings.items()
    ]
    found = steps(ours[auto], picture, args.repeat)
    whole = statistics.median(found["all"])
    parts = [
        {"step": name} | (timing := Timing(turns)).summary() | {"share": timing.median / whole}
        for name, turns in found.items()
    ]
    return rows, parts


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the tables, write JSON."""
    args = parse_arguments(arguments)
    torch.manual_seed(args.seed)
    rows, parts = measure(args)
    machine = measuring.machine()
    shown = args.category or f"a detector fitted to {args.images} images of noise"
    print(f"{shown}: a picture of {args.picture_size} x {args.picture_size} to map and score, {args.repeat} turns each")
    print(f"PatchCore remembers {bank_size(args):,} patches of {args.images} images, {args.bank:.0%} of them")
    print(f"{measuring.machine_line(machine)}\n")
    lines = [
        (
            row["name"],
            row["precision"],
            f"{row['side']} x {row['side']}",
            Timing(row["turns"]).rounded,
            measuring.ratio(row["times_ours"]),
        )
        for row in rows
    ]
    print(measuring.table(("detector", "precision", "sees", "ms an image: median (spread)", "to ours"), lines))
    lines = [(part["step"], measuring.milliseconds(part["seconds"]), f"{part['share']:.0%}") for part in parts]
    print(f"\n{measuring.table(('step of ours', 'ms', 'of all'), lines)}")
    measuring.write_json(args.output, "latency", args, machine, warm_up_turns=measuring.WARM_UP, rows=rows, steps=parts)


if __name__ == "__main__":
    run(main, resumes=False)
