"""Peak memory and seconds of whole commands on images that are large, or many.

    OMP_NUM_THREADS=1 python3 benchmarks/memory.py scan        # --input of one line scan of 8192 x 25000 pixels
    OMP_NUM_THREADS=1 python3 benchmarks/memory.py category    # all stages on 76 images of 4096 x 4096 pixels
    OMP_NUM_THREADS=1 python3 benchmarks/memory.py many        # index and --input of 5,000 images of 256 x 256 pixels

The images are those of demo_dataset.py, enlarged, with noise. Every command is a process of its own; its peak is the
most memory that it held at once (VmHWM of Linux), libraries included, and beside it what of it is not mapped from
files: the system takes mapped pages away where others need the memory. Images and results go into a temporary
folder, or below --folder; a category of 76 large images needs 8 GB of disk, as every anomaly map has its image's size.
"""

import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

import measuring  # noqa: E402
import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

import demo_dataset  # noqa: E402
from student_teacher.runtime.command_line import positive, seed  # noqa: E402
from student_teacher.runtime.errors import UserError, run  # noqa: E402

CATEGORY = "carpet"
SCAN = 8192, 25_000  # width and height
SHARES = {"train/good": 12, "test/good": 24, **{f"test/{kind}": 8 for kind in demo_dataset.DEFECTS}}  # images of 76


class Cost(NamedTuple):
    """What a command took."""

    command: str
    seconds: float
    peak: int  # bytes
    own: int  # of it what is not mapped from files, which the system can take away

    def cells(self) -> tuple[str, str, str, str]:
        """A row of the table."""
        return self.command, f"{self.seconds:.0f}", f"{self.peak / 1e9:.2f}", f"{self.own / 1e9:.2f}"


def cost_of(name: str, script: str, *options: object) -> Cost:
    """Run a stage. Raises UserError if it fails."""
    begin, peak, own = time.monotonic(), 0, 0
    with tempfile.TemporaryFile() as log:
        command = [sys.executable, str(ROOT / script), *map(str, options)]
        child = subprocess.Popen(command, stdout=log, stderr=log)
        while child.poll() is None:
            peak, own = max(peak, held(child.pid, "VmHWM")), max(own, held(child.pid, "RssAnon"))
            time.sleep(0.02)
        log.seek(0)
        if child.returncode:
            raise UserError(f"{' '.join(command)}: {log.read().decode(errors='replace')[-1500:]}")
    return Cost(name, time.monotonic() - begin, peak, own)


def held(process: int, what: str) -> int:
    """Bytes that a process holds: VmHWM the most so far, RssAnon what is not from files now; 0 if it has ended."""
    # Not ru_maxrss, which includes the peak of the process that has started this one.
    lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{what}:")), 0)


def enlarged(picture: Image.Image, size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """The picture at a size, with noise, which makes its file as large as that of a photograph."""
    pixels = np.array(picture.resize(size, Image.Resampling.BILINEAR))
    for rows in np.array_split(pixels, max(1, len(pixels) // 256)):
        rows[:] = np.clip(rows + rng.integers(-8, 9, rows.shape, dtype=np.int16), 0, 255)
    return Image.fromarray(pixels)


def write_category(folder: Path, number: int, side: int, rng: np.random.Generator) -> None:
    """About `number` images of SHARES, as JPEGs of `side` pixels, with masks."""
    for place, share in SHARES.items():
        kind = place.split("/")[1]
        (folder / place).mkdir(parents=True)
        count = max(1, round(share * number / sum(SHARES.values())))
        made = [demo_dataset.make_image(kind, 1.0, [int(rng.integers(2**31)), n], 256) for n in range(min(count, 12))]
        for index in range(count):
            picture, mask = made[index % len(made)]  # again with other noise
            enlarged(picture, (side, side), rng).save(folder / place / f"{index:04d}.jpg", quality=90)
            if kind != "good":
                truth = folder / "ground_truth" / kind
                truth.mkdir(parents=True, exist_ok=True)
                mask.resize((side, side), Image.Resampling.NEAREST).save(truth / f"{index:04d}_mask.png")


def of_scan(folder: Path, args: Namespace, rng: np.random.Generator) -> list[Cost]:
    """Detection with --input on one line scan, with all outputs and with tables alone."""
    parameters = {"seed": args.seed, "image_size": 256, "train": 24, "test_good": 0, "test_per_kind": 1}
    demo_dataset.write_category(folder / "data" / CATEGORY, parameters)
    places = ["--data", folder / "data", "--model", folder / "model"]
    cost_of("", "mvtec_dataset.py", CATEGORY, "--data", folder / "data")
    cost_of("", "src/students_training.py", CATEGORY, *places, "--image-size", 128)
    scan = folder / "scan" / f"scan.{args.format}"
    scan.parent.mkdir()
    enlarged(demo_dataset.make_image("metal", 1.0, [args.seed, 1], 256)[0], SCAN, rng).save(scan)
    found = []
    for name, options in (("all outputs", ()), ("tables alone", ("--save",))):
        given = [CATEGORY, *places, "--input", scan, "--output", folder / name, *options]
        found.append(cost_of(f"--input, {name}", "src/anomaly_detection.py", *given))
    return found


def of_stages(folder: Path, args: Namespace, rng: np.random.Generator) -> list[Cost]:
    """Index, training and detection of a category."""
    write_category(folder / "data" / CATEGORY, args.images or 76, 4096, rng)
    data = ["--data", folder / "data"]
    model = [*data, "--model", folder / "model"]
    return [
        cost_of("mvtec_dataset.sh", "mvtec_dataset.py", CATEGORY, *data),
        cost_of("students_training.py", "src/students_training.py", CATEGORY, *model),
        cost_of("anomaly_detection.py", "src/anomaly_detection.py", CATEGORY, *model, "--results", folder / "results"),
    ]


def of_many(folder: Path, args: Namespace, rng: np.random.Generator) -> list[Cost]:
    """Index of a category of small images, and detection of its test images as --input."""
    write_category(folder / "data" / CATEGORY, args.images or 5000, 256, rng)
    data = ["--data", folder / "data"]
    model = [*data, "--model", folder / "model"]
    test, output = folder / "data" / CATEGORY / "test", folder / "inspection"
    index = cost_of("mvtec_dataset.sh", "mvtec_dataset.py", CATEGORY, *data)
    cost_of("", "src/students_training.py", CATEGORY, *model, "--image-size", 128)
    inspection = ["src/anomaly_detection.py", CATEGORY, *model, "--input", test, "--output", output]
    found = [index, cost_of("--input", *inspection)]
    print(f"index.html: {(output / 'index.html').stat().st_size / 1e6:.2f} MB")
    return found


def parse_arguments(arguments: Sequence[str] | None = None) -> Namespace:
    """Read the command line."""
    options = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    options.add_argument("what", choices=("scan", "category", "many"), help="which images")
    options.add_argument("--images", type=positive, help="of a category, about (default 76, of many 5000)")
    options.add_argument("--format", choices=("jpg", "png", "tif"), default="jpg", help="of the scan (default jpg)")
    options.add_argument("--folder", type=Path, help="make the temporary folder in this one")
    options.add_argument("--seed", type=seed, default=0, help="of the images (default 0)")
    options.add_argument("--output", type=Path, help="write machine, settings and the table here, as JSON")
    return options.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the images, run the commands, print what they took."""
    args = parse_arguments(arguments)
    Image.MAX_IMAGE_PIXELS = None
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        work = {"scan": of_scan, "category": of_stages, "many": of_many}[args.what]
        found = work(Path(folder), args, np.random.default_rng(args.seed))
    machine = measuring.machine()
    print(measuring.machine_line(machine))
    print(measuring.table(("command", "s", "peak, GB", "not from files, GB"), [cost.cells() for cost in found]))
    measuring.write_json(args.output, "memory", args, machine, costs=[cost._asdict() for cost in found])


if __name__ == "__main__":
    run(main, resumes=False)
