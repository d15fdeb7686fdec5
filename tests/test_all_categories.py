import csv
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import termios
import time

import numpy as np
import pytest
from PIL import Image

from student_teacher.reports import summary
from student_teacher.reports.summary import PAPER, Record
from student_teacher.runtime.errors import UserError
from student_teacher.runtime.paths import ROOT


def read_rows(results):
    with (results / "summary.csv").open(newline="") as file:
        return {row["category"]: row for row in csv.DictReader(file)}


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.01)


# The summary.


def measured(folder, seconds_ago=0.0, **measures):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "metrics.json"
    path.write_text(json.dumps({"missing": {}} | measures))
    then = time.time() - seconds_ago
    os.utime(path, (then, then))


@pytest.fixture
def results(tmp_path):
    """One category of each kind."""
    folder = tmp_path / "results"
    measured(folder / "zipper", 9, image_au_roc=0.5, pixel_au_roc=0.6, au_pro=0.7)
    Record("done", seconds=60).write(folder / "zipper")
    measured(folder / "carpet", image_au_roc=1.0, pixel_au_roc=0.8, au_pro=0.9)
    measured(folder / "b|own", image_au_roc=0.75, au_pro=0.2)
    Record("done", tested=False, seconds=30).write(folder / "a_good_only")
    measured(folder / "cable", 9, au_pro=0.1)
    Record("failed", error="teacher_training.py: no luck").write(folder / "cable")
    Record("unfinished").write(folder / "pill")
    (folder / "example").mkdir()
    (folder / "example.png").touch()
    return folder


def test_rows_stand_in_mvtecs_order_and_the_mean_is_over_what_is_there(results):
    rows = summary.collect(results)
    assert [row["category"] for row in rows] == ["carpet", "cable", "zipper", "a_good_only", "b|own", "mean"]
    by_name = {row["category"]: row for row in rows}
    assert by_name["carpet"] == {
        "category": "carpet",
        "status": "done",
        "error": "",
        "image_au_roc": 1.0,
        "pixel_au_roc": 0.8,
        "au_pro": 0.9,
        "paper_p65": 0.695,
        "paper_multiscale": 0.879,
        "seconds": None,
    }
    mean = by_name["mean"]
    assert mean["image_au_roc"] == pytest.approx((1 + 0.5 + 0.75) / 3)
    assert mean["pixel_au_roc"] == pytest.approx(0.7)
    assert mean["au_pro"] == pytest.approx(0.6)
    assert mean["seconds"] == pytest.approx(45)
    # Cable has no AU-PRO here, so the paper's doesn't count either.
    assert mean["paper_p65"] == pytest.approx((0.695 + 0.933) / 2)
    assert mean["paper_multiscale"] == pytest.approx((0.879 + 0.951) / 2)


def test_a_failure_shows_its_error_and_no_older_figures(results):
    row = {row["category"]: row for row in summary.collect(results)}["cable"]
    assert (row["status"], row["error"], row["au_pro"]) == ("failed", "teacher_training.py: no luck", None)
    assert row["paper_p65"] == 0.865


@pytest.mark.parametrize("status", ["failed", "unfinished"])
def test_a_result_by_hand_after_the_failure_counts(results, status):
    Record(status, error="x" if status == "failed" else "").write(results / "cable")
    measured(results / "cable", seconds_ago=-9, au_pro=0.25)
    row = {row["category"]: row for row in summary.collect(results)}["cable"]
    assert (row["status"], row["au_pro"], row["seconds"]) == ("done", 0.25, None)


@pytest.mark.parametrize("text", ["{", "[]", '{"au_pro": NaN}', '{"au_pro": "high"}', "\x00"])
def test_broken_measures_are_no_figures(tmp_path, text):
    measured(tmp_path / "grid")
    (tmp_path / "grid/metrics.json").write_text(text)
    row, mean = summary.collect(tmp_path)
    assert row["au_pro"] is None
    assert mean["au_pro"] is None
    assert row["status"] == ("done" if "au_pro" in text else "failed")
    assert "grid" in row["error"] or row["status"] == "done"


def test_files_of_the_summary(results):
    rows = summary.write(results)
    text = (results / "summary.csv").read_text()
    assert text.startswith(
        "category,status,image_au_roc,pixel_au_roc,au_pro,paper_p65,paper_multiscale,seconds,error\n"
    )
    assert "a_good_only,done,,,,,,30" in text
    assert list(read_rows(results)) == [row["category"] for row in rows]
    lines = (results / "summary.md").read_text().splitlines()
    assert "| carpet | 1.000 | 0.800 | 0.900 | 0.695 | 0.879 | – |" in lines
    assert "| cable (failed: teacher_training.py: no luck) | – | – | – | 0.865 | 0.818 | – |" in lines
    assert "| zipper | 0.500 | 0.600 | 0.700 | 0.933 | 0.951 | 0:01:00 |" in lines
    assert "| a_good_only | – | – | – | – | – | 0:00:30 |" in lines
    assert "| b\\|own | 0.750 | – | 0.200 | – | – | – |" in lines
    assert (
        "2 of its 15 categories (carpet, zipper): 0.814 at one scale and 0.915 at three, against 0.800 here."
        in lines[-1]
    )
    assert "no luck" in (results / "summary.html").read_text()
    assert not [path for path in results.iterdir() if path.name.startswith(".")]
    before = {path: path.read_bytes() for path in results.glob("summary.*")}
    summary.write(results)
    assert {path: path.read_bytes() for path in results.glob("summary.*")} == before


def test_a_summary_of_nothing(tmp_path):
    assert summary.write(tmp_path / "results") == []
    assert "None of its 15 categories" in (tmp_path / "results/summary.md").read_text()


def test_the_papers_means_are_those_that_it_states():
    single, several = np.mean(list(PAPER.values()), axis=0)
    assert single == pytest.approx(0.857, abs=5e-4)
    assert several == pytest.approx(0.914, abs=5e-4)


def test_a_record_comes_back_and_a_broken_one_is_none(tmp_path):
    record = Record("failed", "an error", False, 1.5, {"teacher_training": ["--steps", "1"]})
    record.write(tmp_path)
    assert Record.read(tmp_path) == record
    for text in ("{", "[]", '{"status": "great"}', '{"colour": 1}'):
        (tmp_path / summary.RECORD).write_text(text)
        assert Record.read(tmp_path) is None


def test_a_summary_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "results").touch()
    with pytest.raises(UserError, match=r"summary\.csv can't be written"):
        summary.write(tmp_path / "results")


# The order of work, with stages that only note that they ran.

STAGE = """
import argparse, json, os, signal, sys, time
from pathlib import Path

def parse_arguments(arguments=None):
    options = argparse.ArgumentParser()
    options.add_argument("category")
    for folder in ("data", "model", "results"):
        options.add_argument(f"--{folder}", type=Path)
    options.add_argument("--seed", type=int)
    options.add_argument("--steps", type=int)
    options.add_argument("--patch-size", type=int, nargs="+")
    options.add_argument("--restart", action="store_true")
    return options.parse_args(arguments)

def main():
    args = parse_arguments()
    stage = Path(__file__).stem
    words = sys.argv[2:]
    for everywhere in ("--data", "--model", "--seed"):
        if everywhere in words:
            place = words.index(everywhere)
            del words[place : place + 2]
    with (Path(__file__).parents[1] / "log").open("a") as log:
        log.write(" ".join([args.category, stage, *words]) + "\\n")
    model = args.model / args.category
    model.mkdir(parents=True, exist_ok=True)
    if stage == "students_training":
        if args.category == "slow" and not (model / "stopped").exists():
            asked = []
            signal.signal(signal.SIGINT, lambda *_: asked.append(1))
            signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
            (model / "ready").touch()
            while not asked:
                time.sleep(0.01)
            time.sleep(0.2)
            (model / "stopped").write_text(str(len(asked)))
            sys.exit(130)
        (model / "detector.pt").touch()
    if args.category == "crash":
        print("half a bar", end="\\r", file=sys.stderr)
        raise RuntimeError("no luck")
    if args.category == "refused":
        sys.exit(f"bar\\n{stage}.py: trained with seed 0, not 1:\\n  repeat the command as it was")
    if args.category == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if stage == "anomaly_detection":
        folder = args.results / args.category
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.json").write_text('{"au_pro": 0.5}')

if __name__ == "__main__":
    main()
"""
DATASET = """
import sys
from pathlib import Path
category = Path(sys.argv[3]) / sys.argv[1]
if not category.is_dir():
    sys.exit(f"mvtec_dataset.py: {category}: no such category")
index = category / f"{category.name}.csv"
if not index.exists():
    rows = ["image_name,gt_name,label,type", "a.png,,0,train"] + ["b.png,,0,test"] * (category / "test").is_dir()
    index.write_text("\\n".join(rows) + "\\n")
"""


class House:
    """A project with stages that take no time."""

    def __init__(self, root):
        self.root, self.data, self.results = root, root / "data", root / "results"
        (root / "src").mkdir()
        shutil.copy(ROOT / "src/all_categories.py", root / "src")
        shutil.copytree(ROOT / "src/student_teacher", root / "src/student_teacher")
        page = root / "src/student_teacher/reports/result_page.py"
        page.write_text("def write_summary_page(path, rows): path.touch()\n")
        for stage in ("resnet18_training", "teacher_training", "students_training", "anomaly_detection"):
            (root / f"src/{stage}.py").write_text(STAGE)
        (root / "mvtec_dataset.py").write_text(DATASET)

    def add(self, *categories, test=True):
        for category in categories:
            (self.data / category / "train/good").mkdir(parents=True)
            if test:
                (self.data / category / "test/good").mkdir(parents=True)

    def command(self, *arguments):
        return [sys.executable, self.root / "src/all_categories.py", *arguments]

    def run(self, *arguments):
        """Run it; return the exit status and what the stages noted."""
        self.done = subprocess.run(self.command(*arguments), capture_output=True, text=True, cwd="/", timeout=60)
        return self.done.returncode, self.log()

    def log(self):
        path = self.root / "log"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines


@pytest.fixture
def house(tmp_path):
    return House(tmp_path)


TRAINED = ["students_training"]
ALL = [*TRAINED, "anomaly_detection"]


def of(category, stages=ALL):
    return [f"{category} {stage}" for stage in stages]


def stages_of(log):
    return [" ".join(line.split()[:2]) for line in log]


def test_it_goes_on_where_categories_fail(house):
    house.add("carpet", "crash", "killed", "refused", "a_last")
    house.add("good_only", test=False)
    names = ["crash", "killed", "refused", "missing", "carpet", "good_only", "a_last", "carpet"]
    status, log = house.run(*names)
    assert status == 1
    failed = [f"{name} students_training" for name in ("crash", "killed", "refused")]
    assert stages_of(log) == [*failed, *of("carpet"), *of("good_only", TRAINED), *of("a_last")]
    rows = read_rows(house.results)
    assert list(rows) == ["carpet", "a_last", "crash", "good_only", "killed", "refused", "mean"]
    assert rows["crash"]["error"] == "students_training.py: RuntimeError: no luck"
    assert rows["killed"]["error"] == "students_training.py: ended by SIGKILL (was the memory full?)"
    assert rows["refused"]["error"] == (
        "students_training.py: trained with seed 0, not 1: repeat the command as it was"
    )
    assert rows["carpet"]["au_pro"] == "0.5"
    assert (rows["good_only"]["status"], rows["good_only"]["au_pro"]) == ("done", "")
    assert f"missing: mvtec_dataset.py: {house.data / 'missing'}: no such category\n" in house.done.stderr
    assert "[7/7] a_last: anomaly_detection.py\n" in house.done.stdout
    assert "3 of 7 done" in house.done.stdout
    assert not (house.results / "missing").exists()


def test_on_a_terminal_the_stages_see_its_width(house):
    house.add("carpet")
    stage = house.root / "src/students_training.py"
    show = "if __name__ == '__main__':\n    print(os.get_terminal_size(2).columns, 'wide', file=sys.stderr)\n    "
    stage.write_text(stage.read_text().replace('if __name__ == "__main__":\n    ', show))
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (30, 97))
    process = subprocess.run(house.command(), stdout=subprocess.DEVNULL, stderr=theirs, timeout=60)
    os.close(theirs)
    assert process.returncode == 0
    assert os.read(ours, 1000) == b"97 wide\r\n"
    os.close(ours)


@pytest.mark.parametrize(("send", "number"), [(os.killpg, signal.SIGINT), (os.kill, signal.SIGTERM)])
def test_a_stop_reaches_the_stage_once_and_the_same_command_goes_on(house, send, number):
    house.add("carpet", "slow", "zoo")
    process = subprocess.Popen(
        house.command("--seed", "3"), start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    ready = house.root / "model/slow/ready"
    wait_for(lambda: ready.exists() or process.poll() is not None)
    send(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (house.root / "model/slow/stopped").read_text() == "1"
    assert errors == "\nall_categories.py: stopped; the same command goes on where it stopped\n"
    assert stages_of(house.log()) == [*of("carpet"), *of("slow", TRAINED)]
    assert list(read_rows(house.results)) == ["carpet", "mean"]

    status, log = house.run("--seed", "3")
    assert status == 0
    assert stages_of(log) == [*of("slow"), *of("zoo")]
    assert list(read_rows(house.results)) == ["carpet", "slow", "zoo", "mean"]
    assert house.run("--seed", "3") == (0, [])


def test_a_stopped_restart_trains_the_others_anew_too(house):
    house.add("carpet", "slow", "zoo")
    (house.root / "model/slow").mkdir(parents=True)
    (house.root / "model/slow/stopped").touch()
    assert house.run()[0] == 0
    (house.root / "model/slow/stopped").unlink()
    process = subprocess.Popen(house.command("--restart"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    ready = house.root / "model/slow/ready"
    wait_for(lambda: ready.exists() or process.poll() is not None)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    house.log()

    status, log = house.run()
    assert status == 0
    assert [line.removesuffix(f" --results {house.results}") for line in log] == [
        "slow students_training",  # begun anew before the stop: goes on
        "slow anomaly_detection",
        "zoo students_training --restart",
        "zoo anomaly_detection",
    ]
    assert house.run() == (0, [])


def test_what_has_changed_is_done_again(house):
    house.add("carpet")
    house.add("good_only", test=False)
    everything = [*of("carpet"), *of("good_only", TRAINED)]
    assert stages_of(house.run()[1]) == everything
    assert house.run() == (0, [])
    assert stages_of(house.run("--seed", "1")[1]) == everything
    assert stages_of(house.run("--seed", "1", "--restart")[1]) == everything
    assert house.run("--seed", "1") == (0, [])
    time.sleep(0.02)
    (house.data / "carpet/test/good/new.png").touch()
    assert stages_of(house.run("--seed", "1")[1]) == of("carpet")
    (house.root / "model/good_only/detector.pt").touch()
    assert stages_of(house.run("--seed", "1")[1]) == of("good_only", TRAINED)
    (house.results / "carpet/metrics.json").unlink()
    assert stages_of(house.run("--seed", "1")[1]) == of("carpet")


def test_options_are_handed_to_those_stages_that_know_them(house):
    house.add("carpet")
    status, log = house.run(
        "--adapt-backbone",
        "--seed=-1",
        "--patch-size",
        "17",
        "33",
        "--restart",
        "--teacher-training",
        "--steps 7",
        "--resnet18-training=--steps 8",
    )
    assert status == 0, house.done.stderr
    assert log == [
        "carpet resnet18_training --restart --steps 8",
        "carpet teacher_training --patch-size 17 33 --restart --steps 7",
        "carpet students_training --patch-size 17 33 --restart",
        f"carpet anomaly_detection --results {house.results}",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--students-training=--epoks 3"], "students_training.py: error: unrecognized arguments: --epoks 3"),
        (["--seed", "high"], "students_training.py: error: argument --seed: invalid int value: 'high'"),
        (["--teach", "--teacher-training=--steps '3"], "--teacher-training --steps '3: No closing quotation"),
        (["--resnet18-training=--steps 3"], "--resnet18-training: runs only with --adapt-backbone"),
        (["--teacher-training=--steps 3"], "--teacher-training: runs only with --teach"),
        (["../carpet"], "'../carpet': give a category's plain name, such as carpet"),
        (["--data", "/nowhere"], "/nowhere: no folder in it has train/good; see data/README.md"),
    ],
)
def test_bad_input_is_refused_before_any_stage_runs(house, arguments, message):
    house.add("carpet", "grid")
    assert house.run(*arguments) == (2, [])
    assert house.done.stderr == f"all_categories.py: {message}\n"
    assert not house.results.exists()


# The stages as they are.


def noise(path, seed, mark=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(90, 120, (32, 32, 3), dtype=np.uint8)
    if mark:
        values[10:18, 12:20] = 255
    Image.fromarray(values).save(path)


@pytest.fixture(scope="session")
def interrupted(tmp_path_factory):
    """Three categories, stopped when two are through, then told to go on: what both runs printed and left."""
    root = tmp_path_factory.mktemp("categories")
    data = root / "data"
    for category in ("carpet", "broken", "good_only"):
        for number in range(3):
            noise(data / category / f"train/good/{number}.png", number)
    noise(data / "carpet/test/good/0.png", 10)
    noise(data / "carpet/test/spot/0.png", 11, mark=True)
    mask = np.zeros((32, 32), np.uint8)
    mask[10:18, 12:20] = 255
    (data / "carpet/ground_truth/spot").mkdir(parents=True)
    Image.fromarray(mask).save(data / "carpet/ground_truth/spot/0_mask.png")
    (data / "broken/train/good/1.png").write_bytes(b"no picture")
    command = [
        *(sys.executable, ROOT / "src/all_categories.py", "--data", "data", "--model", "model", "--results", "results"),
        *("--device", "cpu", "--precision", "float32"),
        *("--image-size", "32", "--patch-size", "17", "--students", "1", "--stride", "8"),
        "--teach",
        "--teacher-training=--distillation patches --backbone-weights random --backbone-size 16 --steps 1",
        "--students-training=--epochs 1",
    ]
    # So little work is done faster by one thread.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    first, second = root / "first", root / "second"
    with first.open("w") as file:
        settings = {"cwd": root, "env": environment, "stdout": file, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, start_new_session=True, **settings)
        wait_for(lambda: "good_only: teacher_training.py" in first.read_text() or process.poll() is not None)
        assert process.poll() is None, first.read_text()
        os.killpg(process.pid, signal.SIGTERM)
        statuses = [process.wait(timeout=60)]
    times = {path: path.stat().st_mtime_ns for path in root.glob("*/carpet/**/*")}
    rows = read_rows(root / "results")
    with second.open("w") as file:
        statuses.append(subprocess.run(command, **(settings | {"stdout": file})).returncode)
    return root, statuses, rows, times, [first.read_text(), second.read_text()]


def progress(text):
    return [line for line in text.splitlines() if line.startswith("[")]


def test_stages_as_they_are_go_on_after_a_stop(interrupted):
    root, statuses, rows, times, texts = interrupted
    assert statuses == [130, 1], "\n".join(texts)
    assert list(rows) == ["carpet", "broken", "mean"]
    stages = ["mvtec_dataset", "teacher_training", "students_training", "anomaly_detection"]
    broken = ["[2/3] broken: mvtec_dataset.py", "[2/3] broken: failed"]
    good = "[3/3] good_only: "
    assert progress(texts[0]) == [
        *(f"[1/3] carpet: {stage}.py" for stage in stages),
        *broken,
        *(f"{good}{stage}.py" for stage in stages[:2]),
    ]
    assert progress(texts[1]) == [
        "[1/3] carpet: done already",
        *broken,
        *(f"{good}{stage}.py" for stage in stages[:3]),
        f"{good}no images in test/, so there is nothing to measure",
    ]
    assert {path: path.stat().st_mtime_ns for path in root.glob("*/carpet/**/*")} == times
    assert (root / "model/good_only/detector.pt").exists()


def test_stages_as_they_are_end_with_a_right_summary(interrupted):
    root = interrupted[0]
    rows = read_rows(root / "results")
    assert list(rows) == ["carpet", "broken", "good_only", "mean"]
    measures = json.loads((root / "results/carpet/metrics.json").read_text())
    for row in (rows["carpet"], rows["mean"]):
        assert [float(row[name]) for name in summary.MEASURES] == [measures[name] for name in summary.MEASURES]
        assert (row["paper_p65"], row["paper_multiscale"]) == ("0.695", "0.879")
    assert rows["broken"]["status"] == "failed"
    assert "train/good/1.png" in rows["broken"]["error"]
    assert rows["good_only"]["status"] == "done"
    assert [rows["good_only"][name] for name in summary.MEASURES] == ["", "", ""]
    assert float(rows["carpet"]["seconds"]) > 0
    assert "good_only" in (root / "results/summary.html").read_text()
