"""All stages for every category in data/, or for those named, one category after another.

Each category is prepared by mvtec_dataset.py and goes through students_training.py and anomaly_detection.py; --teach
puts teacher_training.py before them, --adapt-backbone resnet18_training.py before that. What is done is skipped, and
where one category fails the others go on. After a stop, the same command goes on where it stopped. Written under
results/, after every category: summary.csv, .json, .md and .html, a row for each category beside published figures.

example: all_categories.py carpet grid --patch-size 17 33 65 --students-training="--epochs 100"
"""

import dataclasses
import json
import shlex
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from student_teacher.images.folders import entries
from student_teacher.images.index import index_path, read_index
from student_teacher.images.indexing import is_current
from student_teacher.images.layouts import is_category
from student_teacher.reports import summary
from student_teacher.reports.summary import Record
from student_teacher.runtime import settings as options
from student_teacher.runtime.errors import UserError, run
from student_teacher.runtime.paths import PRETRAINED, ROOT, category_name
from student_teacher.runtime.settings import folder, option

SRC = Path(__file__).resolve().parent
# Every stage, in order, and the options that are handed on to it.
EVERYWHERE = ("--data", "--index", "--model", "--device", "--precision")
STAGES = {
    "resnet18_training": (*EVERYWHERE, "--seed", "--image-size"),
    "teacher_training": (*EVERYWHERE, "--seed", "--patch-size"),
    "students_training": (*EVERYWHERE, "--seed", "--image-size", "--patch-size", "--students", "--stride"),
    "anomaly_detection": (*EVERYWHERE, "--results"),
}
CHECK = """import importlib, json, sys
for stage, options in json.loads(sys.argv[1]).items():
    sys.argv[0] = f"{stage}.py"
    importlib.import_module(stage).parse_arguments(["CATEGORY", *options])
"""


def handed_on(name: str, number: int | str = 1) -> Any:
    """A field for an option, with this number of values, that stages read."""
    takers = ", ".join(f"{stage}.py" for stage, names in STAGES.items() if name in names)
    return option((), f"for {takers}; see --help there", nargs=number, metavar="VALUE")


def further(stage: str) -> Any:
    """A field for options of one stage alone."""
    help = f"more options of {stage}.py, quoted together and after an equals sign"
    return option((), help, type=shlex.split, metavar="OPTIONS")


@dataclass(frozen=True, kw_only=True)
class Settings(options.Settings):
    """The options. Those that are handed on to stages are words, as they were given."""

    category: tuple[str, ...] = option(
        dataclasses.MISSING,
        "a category; without any, every folder in data/ that is one",
        positional=True,
        nargs="*",
    )
    teach: bool = option(
        False, "teach a teacher on each category first (teacher_training.py), in place of those that ship"
    )
    adapt_backbone: bool = option(False, "--teach, by a backbone adapted before (resnet18_training.py)")
    restart: bool = option(False, "train again what is trained, and what is half-way")
    data: Path = folder("data")
    model: Path = folder("model")
    results: Path = folder("results")
    index: Path | None = option(
        None,
        "a folder for the indexes, instead of each category's; of one category a .csv, too",
        type=Path,
        metavar="DIR",
    )
    seed: tuple[str, ...] = handed_on("--seed")
    device: tuple[str, ...] = handed_on("--device")
    precision: tuple[str, ...] = handed_on("--precision")
    image_size: tuple[str, ...] = handed_on("--image-size", "+")
    patch_size: tuple[str, ...] = handed_on("--patch-size", "+")
    students: tuple[str, ...] = handed_on("--students")
    stride: tuple[str, ...] = handed_on("--stride")
    resnet18_training: tuple[str, ...] = further("resnet18_training")
    teacher_training: tuple[str, ...] = further("teacher_training")
    students_training: tuple[str, ...] = further("students_training")
    anomaly_detection: tuple[str, ...] = further("anomaly_detection")

    def __post_init__(self):
        for stage, needed in self.left_out.items():
            if getattr(self, stage):
                raise UserError(f"--{stage.replace('_', '-')}: runs only with {needed}")

    @classmethod
    def parser(cls, *args: Any) -> ArgumentParser:
        """As of all settings, but --teacher is not short for --teacher-training: it is an option of a stage."""
        parser = super().parser(*args)
        parser.allow_abbrev = False
        return parser

    @property
    def left_out(self) -> dict[str, str]:
        """The stages that don't run, and the option that each of them needs."""
        missing = {} if self.adapt_backbone else {"resnet18_training": "--adapt-backbone"}
        return missing | ({} if self.adapt_backbone or self.teach else {"teacher_training": "--teach"})

    @property
    def commands(self) -> dict[str, list[str]]:
        """Every stage to run, with its options."""
        given = {f"--{name.replace('_', '-')}": value for name, value in vars(self).items()}
        folders = {name: getattr(self, name) for name in ("data", "model", "results", "index")}
        given |= {f"--{name}": (str(path.absolute()),) for name, path in folders.items() if path}
        return {
            stage: [word for name in names if given[name] for word in (name, *given[name])] + [*getattr(self, stage)]
            for stage, names in STAGES.items()
            if stage not in self.left_out
        }


def parse_arguments(arguments: list[str] | None = None) -> Settings:
    """Read the command line."""
    return Settings.parse(__doc__, arguments)


def chosen_categories(settings: Settings) -> list[str]:
    """The categories that are named, else all in data/. Raises UserError where there are none."""
    if settings.category:
        return list(dict.fromkeys(map(category_name, settings.category)))
    found = [entry.name for entry in settings.data.glob("[!.-]*") if is_category(entry)]
    if not found:
        raise UserError(f"{settings.data}: no folder in it has train/good or another layout; see data/README.md")
    return summary.in_order(found)


def check(commands: dict[str, list[str]]) -> None:
    """Let all stages read their options before the first trains for hours. Raises UserError where one refuses."""
    command = [sys.executable, "-X", "utf8", "-c", CHECK, json.dumps(commands)]
    done = subprocess.run(command, cwd=SRC, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2]
        raise UserError(last.removeprefix("student_teacher.runtime.errors.UserError: "))


def is_done(category: str, settings: Settings) -> bool:
    """Whether these commands have gone through, and nothing that they made the result from has changed since."""
    record = Record.read(settings.results / category)
    if record is None or (record.status, record.commands) != ("done", settings.commands):
        return False
    result = settings.results / category / (summary.METRICS if record.tested else summary.RECORD)
    images, models = settings.data / category, settings.model / category
    index = index_path(images, settings.index)
    # The folder itself: a mask of regions to ignore may have gone. What lies deeper is_current knows.
    sources = [models / "detector.pt", index, index.with_suffix(".json"), images, *entries(images)]
    for place in (models, settings.model / PRETRAINED, ROOT / "model" / PRETRAINED):
        sources += place.glob("*.pt")
    newest = result.stat().st_mtime_ns if result.exists() else 0
    unchanged = all(path.exists() and path.stat().st_mtime_ns <= newest for path in sources)
    return unchanged and is_current(images, settings.index)


def call(script: Path, *arguments: str) -> str:
    """Run a script in our terminal. Returns what it failed of, or nothing. Raises KeyboardInterrupt after a stop."""
    with subprocess.Popen([sys.executable, script, *arguments]) as child:

        def terminate(*_):  # SIGTERM comes to this process alone; Ctrl-C reaches the child as well
            child.send_signal(signal.SIGINT)
            raise KeyboardInterrupt

        signal.signal(signal.SIGTERM, terminate)
        try:
            status = child.wait()
        except KeyboardInterrupt:
            child.wait()  # subprocess.run would kill it while it saves what it has
            raise
    if status in (130, -signal.SIGINT):
        raise KeyboardInterrupt
    hint = " (SIGKILL: was the memory full?)" if status == -9 else ""
    return f"{script.name}: exit status {status}{hint}" if status else ""


def run_stages(category: str, title: str, settings: Settings) -> str:
    """Prepare, train and test a category, and keep its record. Returns what it failed of, or nothing."""
    place, started = settings.results / category, time.monotonic()
    record = Record.read(place)
    if record is None or record.status == "done" or record.commands != settings.commands:
        record = Record(commands=settings.commands)
    again = ["--restart"] if settings.restart or record.restart else []
    print(f"{title}: mvtec_dataset.py", flush=True)
    where = ["--data", str(settings.data), *(["--index", str(settings.index)] if settings.index else [])]
    error = call(ROOT / "mvtec_dataset.py", category, *where)
    if not (settings.data / category).is_dir():
        return error  # and no record: a mistyped name leaves no trace
    record.status, record.error, record.restart = "unfinished", "", False
    record.write(place)
    try:
        rows = [] if error else read_index(settings.data / category, settings.index)
        record.tested = any(row["type"] == "test" for row in rows)
        for stage, words in settings.commands.items():
            if stage == "anomaly_detection" and not (record.tested or error):
                print(f"{title}: no test images, so there is nothing to measure", flush=True)
            elif not error:
                print(f"{title}: {stage}.py", flush=True)
                error = call(SRC / f"{stage}.py", category, *words, *(again if "training" in stage else []))
        record.status, record.error = ("failed", error) if error else ("done", "")
    finally:
        record.seconds += time.monotonic() - started
        record.write(place)
    return error


def main(arguments: list[str] | None = None) -> int:
    """Train and test the categories. Return 1 if one failed."""
    settings = parse_arguments(arguments)
    categories, failures, index = chosen_categories(settings), {}, settings.index
    if len(categories) > 1 and len({index_path(settings.data / category, index) for category in categories}) == 1:
        raise UserError(f"--index {index} is of one category: name that one, or give a folder")
    to_do = [category for category in categories if settings.restart or not is_done(category, settings)]
    if to_do:
        check(settings.commands)
    for category in to_do:
        # A run that goes on after a stop trains these again, too.
        if settings.restart and (settings.data / category).is_dir():
            Record(commands=settings.commands, restart=True).write(settings.results / category)
    for number, category in enumerate(categories, 1):
        title = f"[{number}/{len(categories)}] {category}"
        if category not in to_do:
            print(f"{title}: done already", flush=True)
        elif error := run_stages(category, title, settings):
            failures[category] = error
            print(f"{title}: failed", flush=True)
        summary.write(settings.results)
    for category, error in failures.items():
        print(f"{category}: {error}", file=sys.stderr)
    print(f"{len(categories) - len(failures)} of {len(categories)} done: {settings.results / 'summary.md'}")
    return 1 if failures else 0


if __name__ == "__main__":
    run(main)
