"""Whether a command that is killed at any moment, and run again, ends as if it had not been.

Kills training (both kinds of teacher), detection on the test images, with --input and with --watch at random moments,
always the same ones on a machine of the same speed: most by SIGKILL, some by SIGTERM and SIGINT (Ctrl-C). The same
command is then run again, perhaps killed again, and in the end to completion. What it leaves must be the same, file by
file, as after a run that was never disturbed; of detectors and checkpoints the tensors and settings, of all other files
the bytes. After every kill all files must be whole. Images arrive in the folder that is watched while --watch runs; it
ends by Ctrl-C once all are decided. Rows of its tables may be in any order, and its log does not count: it has the
times of the files.

    OMP_NUM_THREADS=1 python3 benchmarks/kills.py --kills 100
    OMP_NUM_THREADS=1 python3 benchmarks/kills.py --kills 30 --only watch

Prints for each command how many kills there were, by signal, how many came too late, and how many runs to the end were
the same. What does not hold is a line "WRONG", and the exit status is then 1. The category is one of small random
images. Each run is a fork of one process that has everything imported, so that starting takes no time. Students of a
frozen backbone get a tenth of the usual steps.
"""

import hashlib
import io
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

import measuring  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

import anomaly_detection  # noqa: E402
import students_training  # noqa: E402
from student_teacher.reports import inspection, watching  # noqa: E402
from student_teacher.runtime.command_line import positive, seed  # noqa: E402
from student_teacher.runtime.errors import UserError, run  # noqa: E402
from student_teacher.training import backbone_students  # noqa: E402
from tests.test_stages import CATEGORY, prepared_category  # noqa: E402

SIGNALS = (signal.SIGKILL,) * 4 + (signal.SIGTERM, signal.SIGINT)  # as often as they are drawn
PATIENCE = 300.0  # seconds, for a run to the end
WATCHES = ",".join(inspection.COLUMNS).encode()  # what --watch prints once it waits for images and for Ctrl-C


@dataclass
class Command:
    """A stage with its options, and the folder that it writes into."""

    name: str
    main: Callable[[list[str]], int | None]
    options: list[str]
    output: Path
    seconds: float = 0.0  # of a run that is not disturbed
    reference: dict[str, str] = field(default_factory=dict)
    kills: Counter = field(default_factory=Counter)
    same: int = 0
    wrong: list[str] = field(default_factory=list)
    arriving: list[Path] = field(default_factory=list)  # images that come into the folder `watched` while it runs
    watched: Path | None = None
    log: Path = Path("log.txt")  # what its runs print
    starts: int = 0  # how many have begun to watch

    def begin(self) -> None:
        """Remove all that earlier runs have left."""
        for folder in filter(None, (self.output, self.watched)):
            shutil.rmtree(folder, ignore_errors=True)
        if self.watched:
            self.watched.mkdir()
        self.log.write_bytes(b"")

    def feed(self) -> bool:
        """Let the next image arrive, perhaps; whether all that have arrived, and no others will, are decided."""
        missing = [path for path in self.arriving if not (self.watched / path.name).exists()]
        if missing and random.random() < 0.02:  # every tenth of a second, on average
            shutil.copyfile(missing[0], self.watched / missing[0].name)
        if missing or self.log.read_bytes().count(WATCHES) == self.starts:
            return False
        return (self.output / "decisions.csv").read_bytes().count(b"\n") > len(self.arriving)


def start(command: Command) -> int:
    """Fork a process that runs the command, and return its number."""
    sys.stdout.flush()
    command.starts = command.log.read_bytes().count(WATCHES)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # Python forgets what comes during a fork
    if child := os.fork():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return child
    for stream in (1, 2):
        os.dup2(os.open(command.log, os.O_WRONLY | os.O_APPEND), stream)
    torch.set_num_threads(1)
    sys.argv = [f"{command.name}.py"]
    status = 1

    def main():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return command.main(command.options)

    try:
        run(main)
    except SystemExit as ending:
        status = ending.code or 0
    finally:
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(status)


def ended(child: int, timeout: float, command: Command | None = None) -> int | None:
    """The exit status of a child, negative for a signal, once it has ended; None if it goes on after `timeout`.

    If it is a `command` that watches, images arrive, and it gets SIGINT when all are decided.
    """
    until = time.monotonic() + timeout
    while True:
        if command and command.watched and command.feed():
            os.kill(child, signal.SIGINT)
            command = None
        number, status = os.waitpid(child, os.WNOHANG)
        if number:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= until:
            return None
        time.sleep(0.002)


def completed(command: Command) -> int:
    """Run the command to its end; -9 if it takes too long."""
    child = start(command)
    status = ended(child, PATIENCE, command)
    if status is None:
        os.kill(child, signal.SIGKILL)
        return ended(child, PATIENCE)
    return status


def content_of(path: Path) -> str:
    """A digest of what a file says."""
    if path.suffix == ".pt":
        return _digest(repr(_plain(torch.load(path, map_location="cpu", weights_only=True))).encode())
    return _digest(path.read_bytes())


def _digest(content):
    return hashlib.sha256(content).hexdigest()[:16]


def _plain(value):
    """Nested dicts and lists with a digest in place of each tensor."""
    if isinstance(value, torch.Tensor):
        contiguous = value.contiguous()
        raw = contiguous.flatten().view(torch.uint8) if contiguous.numel() else contiguous
        return str(value.dtype), tuple(value.shape), _digest(raw.numpy().tobytes())
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def contents(folder: Path) -> dict[str, str]:
    """Of every file below a folder what it says, hidden files too."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != watching.LOG]
    return {path.relative_to(folder).as_posix(): content_of(path) for path in files}


def contents_after(command: Command) -> dict[str, str]:
    """`contents` of what a command has written; of tables of images that arrive, in any order, the sorted rows."""
    found = contents(command.output)
    for path in command.output.glob("*.csv") if command.watched else ():
        found[path.name] = _digest(b"\n".join(sorted(path.read_bytes().splitlines())))
    return found


def not_whole(folder: Path) -> list[str]:
    """The files below a folder that a kill has left half-written: hidden temporary ones do not count."""
    found = []
    for path in folder.rglob("*") if folder.exists() else ():
        try:
            if path.suffix == ".pt":
                torch.load(path, map_location="cpu", weights_only=True)
            elif path.suffix in (".png", ".jpg", ".tiff"):
                Image.open(io.BytesIO(path.read_bytes())).load()
        except Exception as error:  # whatever a half-written file makes of its reader
            found.append(f"{path}: {error}")
    return found


def trial(command: Command, chance: random.Random) -> None:
    """Run the command from the beginning, kill it once to three times, and run it to its end."""
    command.begin()
    for _ in range(chance.randint(1, 3)):
        sign, moment = chance.choice(SIGNALS), chance.uniform(0, command.seconds)
        child = start(command)
        if ended(child, moment, command) is None:
            os.kill(child, sign)
            status = ended(child, PATIENCE)
            command.kills[sign.name] += 1
            if status not in (-sign, 130) and not (command.watched and sign != signal.SIGKILL and status == 0):
                command.kills["ended by itself"] += 1
            command.wrong += not_whole(command.output)
        else:
            command.kills["too late"] += 1
    status = completed(command)
    text = command.log.read_text(encoding="utf-8", errors="replace")
    if status or "Traceback" in text:
        command.wrong.append(f"exit status {status} in the end: {text[-1500:]}")
    there = contents_after(command)
    different = sorted(
        name for name in there.keys() | command.reference.keys() if there.get(name) != command.reference.get(name)
    )
    if different:
        command.wrong.append(f"not the same: {', '.join(different)}")
    else:
        command.same += 1


def commands(scratch: Path) -> list[Command]:
    """What is killed; detection takes the detector that training has made before."""
    data, trained = prepared_category(scratch / "data"), scratch / "trained"
    folders = [CATEGORY, "--data", str(data)]
    models = {name: scratch / name for name in ("backbone", "patches")}
    small = {
        "backbone": ["--image-size", "64"],
        "patches": ["--patch-size", "17", "--students", "2", "--epochs", "4", "--image-size", "32"],
    }
    found = [
        Command(
            f"students_training, {name}",
            students_training.main,
            [*folders, "--teacher", name, *small[name], "--model", str(model)],
            model,
        )
        for name, model in models.items()
    ]
    results, inspection = scratch / "results", scratch / "inspection"
    detecting = [*folders, "--model", str(trained)]
    more = ["--input", str(data / CATEGORY / "test"), "--output", str(inspection)]
    watch, arrivals = scratch / "watch", scratch / "arrivals"
    watched = ["--input", str(arrivals), "--watch", "--save", "maps", "overlays", "--output", str(watch)]
    images = [scratch / f"{index}.png" for index in range(12)]
    for index, path in enumerate(images):
        Image.effect_noise((700 + index, 500), 40 + index).save(path)
    main = anomaly_detection.main
    return [
        *found,
        Command("anomaly_detection", main, [*detecting, "--results", str(results)], results),
        Command("anomaly_detection --input", main, [*detecting, *more], inspection),
        Command("anomaly_detection --watch", main, [*detecting, *watched], watch, arriving=images, watched=arrivals),
    ]


def parse_arguments(arguments: list[str] | None = None) -> Namespace:
    """Read the command line."""
    options = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    options.add_argument("--kills", type=positive, default=100, help="at least so many, all commands together (100)")
    options.add_argument("--only", default="", metavar="TEXT", help="the commands whose name has this in it (all)")
    options.add_argument("--seed", type=seed, default=0, help="of the moments and signals (default 0)")
    return options.parse_args(arguments)


def refer(command: Command) -> None:
    """Run the command undisturbed, twice, to know what it writes, and that it always writes the same."""
    for _ in range(2):
        command.begin()
        begin = time.monotonic()
        if status := completed(command):
            text = command.log.read_text(encoding="utf-8", errors="replace")
            command.wrong.append(f"exit status {status}, undisturbed: {text[-1500:]}")
        command.seconds = time.monotonic() - begin
        before, command.reference = command.reference, contents_after(command)
    if before != command.reference:
        differing = [name for name, content in command.reference.items() if before.get(name) != content]
        command.wrong.append(f"two undisturbed runs differ: {differing}")


def main(arguments: list[str] | None = None) -> int:
    """Kill the commands in turn, print what became of them. Returns 1 if anything is wrong."""
    args = parse_arguments(arguments)
    chance = random.Random(args.seed)
    backbone_students.LOCAL_STEPS, backbone_students.COARSE_STEPS = 40, 20  # a tenth: fast, not good
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        every = commands(scratch)
        chosen = [command for command in every if args.only in command.name]
        if not chosen:
            raise UserError(f"--only {args.only}: the commands are {'; '.join(command.name for command in every)}")
        for number, command in enumerate(every):
            if number and command not in chosen:
                continue
            command.log = scratch / "log.txt"
            refer(command)
            if number == 0:
                shutil.copytree(command.output, scratch / "trained")
        signs = sorted({sign.name for sign in SIGNALS})
        number = 0
        while sum(command.kills[sign] for command in every for sign in signs) < args.kills:
            print(
                f"trial {number}: {sum(sum(each.kills.values()) for each in every)} kills", file=sys.stderr, flush=True
            )
            trial(chosen[number % len(chosen)], chance)
            number += 1
    columns = [*signs, "ended by itself", "too late"]
    rows = [
        (each.name, f"{each.seconds:.1f} s", *map(str, (each.kills[column] for column in columns)), str(each.same))
        for each in every
        if each.kills
    ]
    print(measuring.table(("command", "undisturbed", *columns, "runs to the end that were the same"), rows))
    for command in every:
        for line in command.wrong:
            print(f"WRONG, {command.name}: {line}")
    return int(any(command.wrong for command in every))


if __name__ == "__main__":
    run(main, resumes=False)
