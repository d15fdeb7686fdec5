"""All stages for every category in data/, or for those named, one category after another.

Each category is prepared by mvtec_dataset.py and goes through students_training.py and anomaly_detection.py; --teach
puts teacher_training.py before them, --adapt-backbone resnet18_training.py before that. What is done is skipped, and
where one category fails the others go on. After a stop, the same command goes on where it stopped. Written under
results/, after every category:
  summary.csv     a row for each category and the mean, beside the paper's figures
  summary.md      the same to read
  summary.html    the same to look at, with the way to each category's pictures
"""

import errno
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import termios
import time
import tty
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

from student_teacher.images.index import read_index
from student_teacher.reports import summary
from student_teacher.reports.summary import Record
from student_teacher.runtime.errors import UserError, run
from student_teacher.runtime.paths import PRETRAINED, ROOT, add_folders, category_name

SRC = Path(__file__).resolve().parent

# Every stage, in order, and those of the options below that are handed on to it.
EVERYWHERE = ("data", "model", "device", "precision")
STAGES = {
    "resnet18_training": (*EVERYWHERE, "seed", "image_size", "restart"),
    "teacher_training": (*EVERYWHERE, "seed", "patch_size", "restart"),
    "students_training": (*EVERYWHERE, "seed", "image_size", "patch_size", "students", "stride", "restart"),
    "anomaly_detection": (*EVERYWHERE, "results"),
}

# A mistyped option of the last stage shall not come to light after the first has trained for hours.
CHECK = """
import importlib, json, sys
sys.path.insert(0, sys.argv[1])
for stage, arguments in json.loads(sys.argv[2]).items():
    sys.argv[0] = f"{stage}.py"
    importlib.import_module(stage).parse_arguments(["CATEGORY", *arguments])
"""

LAST_WORDS = 64 * 1024  # bytes of a stage's messages that are kept to find its error in
LONGEST_ERROR = 500  # characters

Commands = dict[str, list[str]]


def parse_arguments(arguments: list[str] | None = None) -> Namespace:
    """Read the command line."""
    options = ArgumentParser(
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="What is not given is left to each stage; --help of a stage says what its options do.\n\nexample:\n"
        '  all_categories.py carpet grid --patch-size 17 33 65 --students-training="--epochs 100"',
    )
    options.add_argument("category", nargs="*", help="a category; without any, every folder in data/ with train/good")
    options.add_argument(
        "--teach",
        action="store_true",
        help="teach a teacher on each category first (teacher_training.py), in place of those that ship",
    )
    options.add_argument(
        "--adapt-backbone", action="store_true", help="--teach, by a backbone adapted before (resnet18_training.py)"
    )
    add_folders(options, "data", "model", "results")
    # What these may be is for the stages to say: `check` asks them.
    for name in ("seed", "device", "precision"):
        options.add_argument(f"--{name}", metavar=name.upper(), help="for every stage")
    options.add_argument(
        "--image-size", nargs="+", metavar="PIXELS", help="for resnet18_training.py and students_training.py"
    )
    options.add_argument(
        "--patch-size", nargs="+", metavar="P", help="for teachers and students; several make several scales"
    )
    options.add_argument("--students", metavar="M", help="for students_training.py")
    options.add_argument("--stride", metavar="S", help="for students_training.py")
    for stage in STAGES:
        options.add_argument(
            f"--{stage.replace('_', '-')}",
            default="",
            metavar="OPTIONS",
            help=f"more options of {stage}.py, quoted together and after an equals sign",
        )
    options.add_argument("--restart", action="store_true", help="train anew what is trained, and what is half-way")
    args = options.parse_args(arguments)
    for folder in ("data", "model", "results"):
        setattr(args, folder, getattr(args, folder).absolute())
    return args


def chosen_categories(args: Namespace) -> list[str]:
    """The categories that are named, else all that lie in data/. Raises UserError where there are none."""
    if args.category:
        return list(dict.fromkeys(category_name(category) for category in args.category))
    found = [good.parent.parent.name for good in args.data.glob("*/train/good") if good.is_dir()]
    found = [category for category in found if not category.startswith((".", "-"))]
    if not found:
        raise UserError(f"{args.data}: no folder in it has train/good; see data/README.md")
    return summary.in_order(found)


def stage_commands(args: Namespace) -> Commands:
    """Every stage that shall run, with its options. Raises UserError where a quotation has no end, or no use."""
    left_out = {}
    if not args.adapt_backbone:
        left_out["resnet18_training"] = "--adapt-backbone"
        if not args.teach:
            left_out["teacher_training"] = "--teach"
    commands = {}
    for stage, names in STAGES.items():
        if stage in left_out:
            if getattr(args, stage):
                raise UserError(f"--{stage.replace('_', '-')}: runs only with {left_out[stage]}")
            continue
        options = []
        for name in names:
            value = getattr(args, name)
            if value is not None and value is not False:
                values = [] if value is True else value if isinstance(value, list) else [str(value)]
                options += [f"--{name.replace('_', '-')}", *values]
        try:
            commands[stage] = options + shlex.split(getattr(args, stage))
        except ValueError as error:
            raise UserError(f"--{stage.replace('_', '-')} {getattr(args, stage)}: {error}") from None
    return commands


def without_restart(commands: Commands) -> Commands:
    """The commands that go on with what is there: by these it is told whether a category is done."""
    return {stage: [option for option in options if option != "--restart"] for stage, options in commands.items()}


class Runner:
    """Runs commands one after another. Asked to stop, by Ctrl-C or a signal, it stops the one that runs, then itself.

    A command runs in a process group of its own: Ctrl-C in a terminal reaches all of a group, and a training that is
    asked twice stops without saving. It is asked once for each time that this process is.
    """

    def __init__(self):
        self._child: subprocess.Popen | None = None
        self._stopped = False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup shall go on
                signal.signal(number, self._stop)

    def _stop(self, *_):
        self._stopped = True
        if self._child:
            self._child.send_signal(signal.SIGINT)

    def run(self, name: str, command: list[str | Path], quiet: bool = False) -> str:
        """Run a command; return what it failed of in one line, or nothing.

        Its messages go where ours go, by way of this process, which keeps the last ones.

        Raises:
            KeyboardInterrupt: it was stopped.
        """
        if self._stopped:
            raise KeyboardInterrupt
        last_words = b""
        reader, writer = _channel()
        try:
            with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=writer, process_group=0) as child:
                os.close(writer)
                self._child = child
                if self._stopped:  # just now, before there was a child to tell
                    child.send_signal(signal.SIGINT)
                try:
                    while chunk := _read(reader):
                        last_words = (last_words + chunk)[-LAST_WORDS:]
                        if not quiet and not self._stopped:  # a stop is reported once, by `command_line.run`
                            sys.stderr.buffer.write(chunk)
                            sys.stderr.flush()
                except OSError:  # nobody reads our messages any more
                    child.send_signal(signal.SIGINT)
                    raise
        finally:
            os.close(reader)
        self._child = None
        stopped_itself = child.returncode in (128 + signal.SIGINT, -signal.SIGINT)
        error = _error(name, child.returncode, last_words) if child.returncode else ""
        if self._stopped and error and not stopped_itself:
            print(error, file=sys.stderr)
        if self._stopped or stopped_itself:
            raise KeyboardInterrupt
        return error


def _channel() -> tuple[int, int]:
    """Where to read and where to write a command's messages: like a terminal if ours go to one, for progress bars."""
    if not sys.stderr.isatty():
        return os.pipe()
    reader, writer = pty.openpty()
    tty.setraw(writer)
    return reader, writer


def _read(reader: int) -> bytes:
    """What comes next, nothing at the end."""
    if sys.stderr.isatty():
        termios.tcsetwinsize(reader, termios.tcgetwinsize(sys.stderr))  # the user may have changed it
    try:
        return os.read(reader, 65536)
    except OSError as error:
        if error.errno == errno.EIO:  # how a pseudo-terminal ends on Linux
            return b""
        raise


def _error(name: str, status: int, last_words: bytes) -> str:
    """What a command failed of: its message if it gave one, else the last line, as of a traceback."""
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", last_words.decode(errors="replace"))
    lines = [line.strip() for line in re.split(r"[\r\n]", text) if line.strip()]
    starts = [number for number, line in enumerate(lines) if line.startswith(f"{name}: ")]
    if status < 0:
        message = f"{name}: ended by {signal.Signals(-status).name}"
        message += " (was the memory full?)" if status == -signal.SIGKILL else ""
    elif starts:
        message = " ".join(lines[starts[-1] :])
    else:
        message = f"{name}: {lines[-1] if lines else f'exit status {status}'}"
    return message if len(message) <= LONGEST_ERROR else f"{message[: LONGEST_ERROR - 1]}…"


def check(commands: Commands, runner: Runner) -> None:
    """Let the stages read their options before any of them runs. Raises UserError where one refuses."""
    command = [sys.executable, "-c", CHECK, SRC, json.dumps(commands)]
    error = runner.run("options", command, quiet=True)
    if error:
        raise UserError(error.removeprefix("options: "))


def is_done(category: str, commands: Commands, args: Namespace) -> bool:
    """Whether these commands have gone through, and nothing that they made the result from has changed since."""
    record = Record.read(args.results / category)
    if record is None or record.status != "done" or record.commands != commands:
        return False
    result = args.results / category / (summary.METRICS if record.tested else summary.RECORD)
    # Images, and their folders, which are as new as the last image that was put into them or taken out.
    parts = [args.data / category / part for part in ("train", "test", "ground_truth")]
    images = [path for part in parts if part.exists() for path in (part, *part.rglob("*"))]
    folders = args.model / category, args.model / PRETRAINED, ROOT / "model" / PRETRAINED
    teachers = [teacher for folder in folders for teacher in folder.glob("teacher_??.pt")]
    index = index_of(category, args)
    settings = [path for path in [index.with_suffix(".json")] if path.exists()]
    sources = [index, *settings, args.model / category / "detector.pt", *images, *teachers]
    try:
        return all(source.stat().st_mtime_ns <= result.stat().st_mtime_ns for source in sources)
    except FileNotFoundError:
        return False


def index_of(category: str, args: Namespace) -> Path:
    """The category's index, as mvtec_dataset.py writes it."""
    return args.data / category / f"{category}.csv"


def has_test_images(index: Path) -> bool:
    """Whether there is anything to test; a category of training images alone is fine, too."""
    return any(row["type"] == "test" for row in read_index(index))


class Work:
    """What is to be done for each category, and how each ended."""

    def __init__(self, args: Namespace):
        self._args, self._commands = args, stage_commands(args)
        self._lasting = without_restart(self._commands)
        self._checked = False
        self._runner = Runner()

    def mark(self, categories: Sequence[str]) -> None:
        """With --restart, note that these are to be trained anew, for the run that goes on after a stop."""
        if self._commands == self._lasting:
            return
        self._check()
        for category in categories:
            folder = self._args.results / category
            if (self._args.data / category).is_dir() or folder.is_dir():
                Record(commands=self._commands).write(folder)

    def do(self, category: str, title: str) -> str:
        """Train and test a category unless that is done. Return what it failed of, or nothing."""
        folder = self._args.results / category
        before = Record.read(folder)
        commands = self._commands
        if before and without_restart(before.commands) == self._lasting:
            commands = before.commands  # with --restart where a run that was stopped had not come to it
        if is_done(category, self._lasting, self._args):
            print(f"{title}: done already", flush=True)
            return ""
        started = time.monotonic()
        print(f"{title}: mvtec_dataset.py", flush=True)
        error = self._run(ROOT / "mvtec_dataset.py", category, ["--data", str(self._args.data)])
        if error and not (self._args.data / category).is_dir():
            return error  # and no record: a mistyped name shall leave no trace
        if not error:
            self._check()

        record = Record(commands=self._lasting)
        if before and before.status != "done" and before.commands == self._lasting:
            record.seconds = before.seconds
        record.write(folder)
        try:
            if not error:
                record.tested = has_test_images(index_of(category, self._args))
                error = self._run_stages(commands, category, title, record.tested)
            record.status, record.error = ("failed", error) if error else ("done", "")
        finally:
            record.seconds += time.monotonic() - started
            record.write(folder)
        return error

    def _check(self) -> None:
        if not self._checked:
            check(self._commands, self._runner)
            self._checked = True

    def _run_stages(self, commands: Commands, category: str, title: str, tested: bool) -> str:
        for stage, options in commands.items():
            if stage == "anomaly_detection" and not tested:
                print(f"{title}: no images in test/, so there is nothing to measure", flush=True)
                continue
            print(f"{title}: {stage}.py", flush=True)
            if error := self._run(SRC / f"{stage}.py", category, options):
                return error
        return ""

    def _run(self, script: Path, category: str, options: list[str]) -> str:
        return self._runner.run(script.name, [sys.executable, script, category, *options])


def main(arguments: list[str] | None = None) -> int:
    """Train and test the categories. Return 1 if one failed."""
    args = parse_arguments(arguments)
    categories = chosen_categories(args)
    work, failures = Work(args), {}
    work.mark(categories)
    for number, category in enumerate(categories, 1):
        title = f"[{number}/{len(categories)}] {category}"
        if error := work.do(category, title):
            failures[category] = error
            print(f"{title}: failed", flush=True)
        summary.write(args.results)
    for category, error in failures.items():
        print(f"{category}: {error}", file=sys.stderr)
    print(f"{len(categories) - len(failures)} of {len(categories)} done: {args.results / 'summary.md'}")
    return 1 if failures else 0


if __name__ == "__main__":
    run(main)
