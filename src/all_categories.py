"""All stages for every category in data/, or for those named, one category after another.

Each category is prepared by mvtec_dataset.py and goes through students_training.py and anomaly_detection.py; --teach
puts teacher_training.py before them, --adapt-backbone resnet18_training.py before that. What is done is skipped, and
where one category fails the others go on. After a stop, the same command goes on where it stopped. Written under
results/, after every category: summary.csv, .json, .md and .html, a row for each category beside published figures.

example: all_categories.py carpet grid --patch-size 17 33 65 --students-training="--epochs 100"
"""

import json
import shlex
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

from student_teacher.images.index import index_path, read_index
from student_teacher.images.layouts import is_category, split_file
from student_teacher.reports import summary
from student_teacher.reports.summary import Record
from student_teacher.runtime.errors import UserError, run
from student_teacher.runtime.paths import PRETRAINED, ROOT, add_folders, category_name

SRC = Path(__file__).resolve().parent
# Every stage, in order, and the options that are handed on to it.
EVERYWHERE = ("--data", "--index", "--model", "--device", "--precision")
STAGES = {
    "resnet18_training": (*EVERYWHERE, "--seed", "--image-size"),
    "teacher_training": (*EVERYWHERE, "--seed", "--patch-size"),
    "students_training": (*EVERYWHERE, "--seed", "--image-size", "--patch-size", "--students", "--stride"),
    "anomaly_detection": (*EVERYWHERE, "--results"),
}
NUMBERS = {"--seed": 1, "--device": 1, "--precision": 1, "--image-size": "+", "--patch-size": "+"}  # of values
NUMBERS |= {"--students": 1, "--stride": 1}
CHECK = """import importlib, json, sys
for stage, options in json.loads(sys.argv[1]).items():
    sys.argv[0] = f"{stage}.py"
    importlib.import_module(stage).parse_arguments(["CATEGORY", *options])
"""


def parse_arguments(arguments: list[str] | None = None) -> Namespace:
    """Read the command line; `commands` holds every stage to run, with its options."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("category", nargs="*", help="a category; without any, every folder in data/ that is one")
    for name, meaning in (
        ("--teach", "teach a teacher on each category first (teacher_training.py), in place of those that ship"),
        ("--adapt-backbone", "--teach, by a backbone adapted before (resnet18_training.py)"),
        ("--restart", "train again what is trained, and what is half-way"),
    ):
        parser.add_argument(name, action="store_true", help=meaning)
    add_folders(parser, "data", "model", "results")
    parser.add_argument(
        "--index",
        type=lambda text: Path(text).absolute(),
        metavar="DIR",
        help="a folder for the indexes, instead of each category's; of one category a .csv, too",
    )
    for name, number in NUMBERS.items():
        takers = ", ".join(f"{stage}.py" for stage, names in STAGES.items() if name in names)
        parser.add_argument(name, dest=name, nargs=number, metavar="VALUE", help=f"for {takers}; see --help there")
    for stage in STAGES:
        more = f"more options of {stage}.py, quoted together and after an equals sign"
        parser.add_argument(f"--{stage.replace('_', '-')}", type=shlex.split, default=[], metavar="OPTIONS", help=more)
    args = parser.parse_args(arguments)
    args.data, args.model, args.results = (path.absolute() for path in (args.data, args.model, args.results))
    folders = {"--data": [str(args.data)], "--model": [str(args.model)], "--results": [str(args.results)]}
    given = vars(args) | folders | {"--index": args.index and [str(args.index)]}
    missing = {} if args.adapt_backbone else {"resnet18_training": "--adapt-backbone"}
    missing |= {} if args.adapt_backbone or args.teach else {"teacher_training": "--teach"}
    for stage, needed in missing.items():
        if given[stage]:
            raise UserError(f"--{stage.replace('_', '-')}: runs only with {needed}")
    args.commands = {
        stage: [word for name in names if given[name] for word in (name, *given[name])] + given[stage]
        for stage, names in STAGES.items()
        if stage not in missing
    }
    return args


def chosen_categories(args: Namespace) -> list[str]:
    """The categories that are named, else all in data/. Raises UserError where there are none."""
    if args.category:
        return list(dict.fromkeys(map(category_name, args.category)))
    found = [folder.name for folder in args.data.glob("[!.-]*") if is_category(folder)]
    if not found:
        raise UserError(f"{args.data}: no folder in it has train/good or another layout; see data/README.md")
    return summary.in_order(found)


def check(commands: dict[str, list[str]]) -> None:
    """Let all stages read their options before the first trains for hours. Raises UserError where one refuses."""
    command = [sys.executable, "-c", CHECK, json.dumps(commands)]
    done = subprocess.run(command, cwd=SRC, capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2]
        raise UserError(last.removeprefix("student_teacher.runtime.errors.UserError: "))


def is_done(category: str, args: Namespace) -> bool:
    """Whether these commands have gone through, and nothing that they made the result from has changed since."""
    record = Record.read(args.results / category)
    if record is None or (record.status, record.commands) != ("done", args.commands):
        return False
    result = args.results / category / (summary.METRICS if record.tested else summary.RECORD)
    sources = [args.model / category / "detector.pt", *(args.data / category).rglob("*")]
    for folder in (args.model / category, args.model / PRETRAINED, ROOT / "model" / PRETRAINED):
        sources += folder.glob("*.pt")
    sources += filter(None, [split_file(args.data / category, None)])
    index = index_path(args.data / category, args.index)
    sources += filter(Path.exists, (index, index.with_suffix(".json")))
    newest = result.stat().st_mtime_ns if result.exists() else 0
    return all(path.exists() and path.stat().st_mtime_ns <= newest for path in sources)


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


def run_stages(category: str, title: str, args: Namespace) -> str:
    """Prepare, train and test a category, and keep its record. Returns what it failed of, or nothing."""
    folder, started = args.results / category, time.monotonic()
    record = Record.read(folder)
    if record is None or record.status == "done" or record.commands != args.commands:
        record = Record(commands=args.commands)
    again = ["--restart"] if args.restart or record.restart else []
    print(f"{title}: mvtec_dataset.py", flush=True)
    where = ["--data", str(args.data), *(["--index", str(args.index)] if args.index else [])]
    error = call(ROOT / "mvtec_dataset.py", category, *where)
    if not (args.data / category).is_dir():
        return error  # and no record: a mistyped name leaves no trace
    record.status, record.error, record.restart = "unfinished", "", False
    record.write(folder)
    try:
        rows = [] if error else read_index(args.data / category, args.index)
        record.tested = any(row["type"] == "test" for row in rows)
        for stage, options in args.commands.items():
            if stage == "anomaly_detection" and not (record.tested or error):
                print(f"{title}: no test images, so there is nothing to measure", flush=True)
            elif not error:
                print(f"{title}: {stage}.py", flush=True)
                error = call(SRC / f"{stage}.py", category, *options, *(again if "training" in stage else []))
        record.status, record.error = ("failed", error) if error else ("done", "")
    finally:
        record.seconds += time.monotonic() - started
        record.write(folder)
    return error


def main(arguments: list[str] | None = None) -> int:
    """Train and test the categories. Return 1 if one failed."""
    args = parse_arguments(arguments)
    categories, failures = chosen_categories(args), {}
    if len(categories) > 1 and len({index_path(args.data / category, args.index) for category in categories}) == 1:
        raise UserError(f"--index {args.index} is of one category: name that one, or give a folder")
    to_do = [category for category in categories if args.restart or not is_done(category, args)]
    if to_do:
        check(args.commands)
    for category in to_do:
        if args.restart and (args.data / category).is_dir():  # a run that goes on after a stop trains these again, too
            Record(commands=args.commands, restart=True).write(args.results / category)
    for number, category in enumerate(categories, 1):
        title = f"[{number}/{len(categories)}] {category}"
        if category not in to_do:
            print(f"{title}: done already", flush=True)
        elif error := run_stages(category, title, args):
            failures[category] = error
            print(f"{title}: failed", flush=True)
        summary.write(args.results)
    for category, error in failures.items():
        print(f"{category}: {error}", file=sys.stderr)
    print(f"{len(categories) - len(failures)} of {len(categories)} done: {args.results / 'summary.md'}")
    return 1 if failures else 0


if __name__ == "__main__":
    run(main)
