import csv
import importlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import all_categories
from student_teacher.images.indexing import index_category
from student_teacher.reports import summary
from student_teacher.reports.published import BESIDE, FIGURES, SOURCES
from student_teacher.reports.summary import Record
from student_teacher.runtime.errors import UserError


def read_rows(results):
    with (results / "summary.csv").open(newline="") as file:
        return {row["category"]: row for row in csv.DictReader(file)}


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
    measured(folder / "carpet", image_au_roc=1.0, pixel_au_roc=0.8, au_pro=0.9, aupimo=0.4)
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
        "image_f1": None,
        "pixel_au_roc": 0.8,
        "pixel_f1": None,
        "au_pro": 0.9,
        "au_spro_0.05": None,
        "aupimo": 0.4,
        "paper_p65": 0.695,
        "paper_multiscale": 0.879,
        "efficientad_s_au_pro": 0.918,
        "efficientad_m_au_pro": 0.930,
        "efficientad_s_image_au_roc": 0.994,
        "efficientad_m_image_au_roc": 0.994,
        "seconds": None,
    }
    mean = by_name["mean"]
    assert mean["image_au_roc"] == pytest.approx((1 + 0.5 + 0.75) / 3)
    assert mean["pixel_au_roc"] == pytest.approx(0.7)
    assert mean["au_pro"] == pytest.approx(0.6)
    assert mean["seconds"] == pytest.approx(45)
    # Cable has no AU-PRO here, so what others have of it doesn't count either.
    assert mean["paper_p65"] == pytest.approx((0.695 + 0.933) / 2)
    assert mean["paper_multiscale"] == pytest.approx((0.879 + 0.951) / 2)
    assert mean["efficientad_m_image_au_roc"] == pytest.approx((0.994 + 0.994) / 2)


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
        "category,status,image_au_roc,efficientad_s_image_au_roc,efficientad_m_image_au_roc,image_f1,pixel_au_roc,"
        "pixel_f1,au_pro,paper_p65,paper_multiscale,efficientad_s_au_pro,efficientad_m_au_pro,au_spro_0.05,aupimo,"
        "seconds,error\n"
    )
    assert "a_good_only,done,,,,,,,,,,,,,,30" in text
    assert list(read_rows(results)) == [row["category"] for row in rows]
    assert json.loads((results / "summary.json").read_text()) == {
        "categories": rows[:-1],
        "mean": rows[-1],
        "sources": SOURCES,
    }
    lines = (results / "summary.md").read_text().splitlines()
    dashes = "– | – | – | – | –"
    assert "| carpet | 1.000 | 0.994 | 0.994 | 0.800 | 0.900 | 0.695 | 0.879 | 0.918 | 0.930 | 0.400 | – |" in lines
    cable = "– | 0.935 | 0.942 | – | – | 0.865 | 0.818 | 0.882 | 0.904"
    assert f"| cable (failed: teacher_training.py: no luck) | {cable} | – | – |" in lines
    assert f"| a_good_only | {dashes} | – | – | – | – | – | 30 s |" in lines
    assert "| b\\|own | 0.750 | – | – | – | 0.200 | – | – | – | – | – | – |" in lines
    assert (
        "- AU-PRO, mean over 2 of 15 published categories (carpet, zipper): here 0.800; Paper p = 65 AU-PRO 0.814; "
        "Paper 3 scales AU-PRO 0.915; EfficientAD small AU-PRO 0.931; EfficientAD medium AU-PRO 0.935."
    ) in lines
    assert "no luck" in (results / "summary.html").read_text()
    assert not [path for path in results.iterdir() if path.name.startswith(".")]
    before = {path: path.read_bytes() for path in results.glob("summary.*")}
    summary.write(results)
    assert {path: path.read_bytes() for path in results.glob("summary.*")} == before


def test_a_summary_of_nothing(tmp_path):
    assert summary.write(tmp_path / "results") == []
    assert json.loads((tmp_path / "results/summary.json").read_text())["mean"] is None
    assert "none of the 15 published categories" in (tmp_path / "results/summary.md").read_text()


def test_published_means_are_those_that_their_authors_state():
    means = dict(zip(BESIDE, np.mean(list(FIGURES.values()), axis=0), strict=True))
    stated = {"paper_p65": 0.857, "paper_multiscale": 0.914, "efficientad_m_image_au_roc": 0.991}
    assert {name: round(means[name], 3) for name in stated} == stated


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
import argparse, os, signal, sys, time
from pathlib import Path

def parse_arguments(arguments=None):
    options = argparse.ArgumentParser()
    options.add_argument("category")
    for folder in ("data", "model", "results"):
        options.add_argument(f"--{folder}", type=Path)
    for number in ("seed", "steps"):
        options.add_argument(f"--{number}", type=int)
    options.add_argument("--patch-size", type=int, nargs="+")
    options.add_argument("--restart", action="store_true")
    return options.parse_args(arguments)

if __name__ == "__main__":
    args, stage = parse_arguments(), Path(__file__).stem
    given = {name: value for name, value in vars(args).items() if value and name in ("patch_size", "steps", "restart")}
    with Path("log").open("a") as log:
        print(args.category, stage, *given.items(), file=log)
    model = args.model / args.category
    model.mkdir(parents=True, exist_ok=True)
    if args.category == "slow" and not (model / "stopped").exists():
        asked = []
        signal.signal(signal.SIGINT, lambda *_: asked.append(1))
        (model / "ready").touch()
        while not asked:
            time.sleep(0.01)
        time.sleep(0.1)
        (model / "stopped").write_text(str(len(asked)))
        sys.exit(130)
    if args.category == "refused":
        sys.exit(2)
    if args.category == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if stage == "students_training":
        (model / "detector.pt").touch()
    if stage == "anomaly_detection":
        folder = args.results / args.category
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.json").write_text('{"au_pro": 0.5}')
"""
DATASET = """
import json, sys
from pathlib import Path
category = Path(sys.argv[3]) / sys.argv[1]
if not category.is_dir():
    sys.exit(2)
index = category / f"{category.name}.csv"
if not index.exists():
    rows = ["image_name,gt_name,label,type", "a.png,,0,train"] + ["b.png,,0,test"] * (category / "test").is_dir()
    index.write_text("\\n".join(rows) + "\\n")
files = {path: path.stat() for path in category.rglob("*") if path.is_file() and path.parent != category}
files = {path.relative_to(category).as_posix(): [stat.st_size, stat.st_mtime_ns] for path, stat in files.items()}
index.with_suffix(".json").write_text(json.dumps({"files": files}))
"""


class House:
    """A project with stages that take no time."""

    def __init__(self, root):
        self.root, self.data, self.results = root, root / "data", root / "results"
        for stage in all_categories.STAGES:
            (root / f"{stage}.py").write_text(STAGE)
        (root / "mvtec_dataset.py").write_text(DATASET)

    def add(self, *categories, test=True):
        for category in categories:
            for part in ("train", "test")[: 1 + test]:
                (self.data / category / part / "good").mkdir(parents=True)

    def folders(self):
        return [word for name in ("data", "model", "results") for word in (f"--{name}", str(self.root / name))]

    def run(self, *arguments):
        """Run it; return the exit status and which stages ran."""
        return all_categories.main([*self.folders(), *arguments]), self.log()

    def log(self):
        path = self.root / "log"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines


@pytest.fixture
def house(tmp_path, monkeypatch):
    monkeypatch.setattr(all_categories, "SRC", tmp_path)
    monkeypatch.setattr(all_categories, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    yield House(tmp_path)
    signal.signal(signal.SIGTERM, before)


def of(category):
    return [f"{category} students_training", f"{category} anomaly_detection"]


def test_it_goes_on_where_categories_fail(house, capfd):
    house.add("carpet", "killed", "refused", "a_last")
    house.add("good_only", test=False)
    status, log = house.run("killed", "refused", "missing", "carpet", "good_only", "a_last", "carpet")
    assert status == 1
    failed = [f"{name} students_training" for name in ("killed", "refused")]
    assert log == [*failed, *of("carpet"), "good_only students_training", *of("a_last")]
    rows = read_rows(house.results)
    assert list(rows) == ["carpet", "a_last", "good_only", "killed", "refused", "mean"]
    assert rows["killed"]["error"] == "students_training.py: exit status -9 (SIGKILL: was the memory full?)"
    assert rows["refused"]["error"] == "students_training.py: exit status 2"
    assert rows["carpet"]["au_pro"] == "0.5"
    assert (rows["good_only"]["status"], rows["good_only"]["au_pro"]) == ("done", "")
    shown = capfd.readouterr()
    assert "\nmissing: mvtec_dataset.py: exit status 2\n" in shown.err
    assert "[6/6] a_last: anomaly_detection.py\n" in shown.out
    assert "good_only: no test images" in shown.out
    assert "3 of 6 done" in shown.out
    assert not (house.results / "missing").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("send", "number"), [(os.killpg, signal.SIGINT), (os.kill, signal.SIGTERM)])
def test_a_stop_reaches_the_stage_once_and_the_same_command_goes_on(house, send, number):
    house.add("carpet", "slow", "zoo")
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); import all_categories as all; from pathlib import Path\n"
    code += "all.SRC = all.ROOT = Path.cwd(); all.run(all.main)"
    source = Path(all_categories.__file__).parent
    command = [sys.executable, "-c", code, source, *house.folders(), "--seed", "3"]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    while not (house.root / "model/slow/ready").exists():
        assert process.poll() is None
        time.sleep(0.01)
    send(process.pid, number)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert (house.root / "model/slow/stopped").read_text() == "1"
    assert errors == "\n-c: stopped; the same command goes on where it stopped\n"
    assert house.log() == [*of("carpet"), "slow students_training"]
    assert list(read_rows(house.results)) == ["carpet", "mean"]

    assert house.run("--seed", "3") == (0, [*of("slow"), *of("zoo")])
    assert list(read_rows(house.results)) == ["carpet", "slow", "zoo", "mean"]
    assert house.run("--seed", "3") == (0, [])


def test_a_stopped_restart_trains_the_others_again_too(house):
    house.add("carpet", "zoo")
    assert house.run()[0] == 0
    stage = house.root / "anomaly_detection.py"
    stage.write_text("import sys\nparse_arguments = print\nif __name__ == '__main__':\n    sys.exit(130)")
    with pytest.raises(KeyboardInterrupt):
        house.run("--restart")
    stage.write_text(STAGE)
    assert house.log() == ["carpet students_training ('restart', True)"]
    again = [*of("carpet"), "zoo students_training ('restart', True)", "zoo anomaly_detection"]
    assert house.run() == (0, again)
    assert house.run() == (0, [])


def test_what_has_changed_is_done_again(house):
    house.add("carpet")
    house.add("good_only", test=False)
    everything = [*of("carpet"), "good_only students_training"]
    assert house.run() == (0, everything)
    assert house.run("--seed", "1") == (0, everything)
    time.sleep(0.02)
    (house.data / "carpet/test/good/new.png").touch()
    assert house.run("--seed", "1") == (0, of("carpet"))
    time.sleep(0.02)
    (house.root / "model/good_only/detector.pt").touch()
    assert house.run("--seed", "1") == (0, ["good_only students_training"])
    (house.results / "carpet/metrics.json").unlink()
    assert house.run("--seed", "1") == (0, of("carpet"))
    (house.root / "model/carpet/detector.pt").unlink()
    assert house.run("--seed", "1") == (0, of("carpet"))
    assert house.run("--seed", "1") == (0, [])


@pytest.fixture
def finished(tmp_path):
    """A function that says whether a category, which has just been done with a split of the user's, is still done."""
    images, split = tmp_path / "data/part", tmp_path / "elsewhere/own.csv"
    split.parent.mkdir()
    (tmp_path / "linked").mkdir()
    (images / "test").mkdir(parents=True)
    (images / "test/cut").symlink_to(tmp_path / "linked")
    lines = ["object,split,label,image,mask", "part,test,anomaly,test/cut/0.png,"]
    for number in range(3):
        noise(images / f"train/good/{number}.png", number)
        lines.append(f"part,train,normal,train/good/{number}.png,")
    noise(images / "test/cut/0.png", 3)
    noise(images / "ignore.png", 4)
    split.write_text("\n".join(lines))
    index_category(images, split_csv=split)
    settings = all_categories.parse_arguments([f"--{name}={tmp_path / name}" for name in ("data", "model", "results")])
    (settings.model / "part").mkdir(parents=True)
    (settings.model / "part/detector.pt").touch()
    time.sleep(0.02)
    Record("done", commands=settings.commands).write(settings.results / "part")
    (settings.results / "part/metrics.json").write_text("{}")
    time.sleep(0.02)
    return lambda: all_categories.is_done("part", settings)


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "elsewhere/own.csv").write_text((root / "elsewhere/own.csv").read_text() + "\n"),
        lambda root: (root / "elsewhere/own.csv").unlink(),
        lambda root: index_category(root / "data/part", split_csv="auto"),
        lambda root: index_category(root / "data/part", value_range=(0, 1000)),
        lambda root: noise(root / "data/part/ignore.png", 5),
        lambda root: (root / "data/part/ignore.png").unlink(),
        lambda root: (root / "data/part/test/cut/0.png").unlink(),
        lambda root: noise(root / "linked/0.png", 5),
        lambda root: shutil.copy2(root / "data/part/train/good/0.png", root / "linked/1.png"),  # with its old time
        lambda root: (root / "data/part/part.json").write_text("{"),
    ],
)
def test_every_change_of_a_category_is_noticed(finished, tmp_path, change):
    assert finished()
    change(tmp_path)
    assert not finished()


def test_options_are_handed_to_those_stages_that_know_them(house):
    house.add("carpet")
    sizes = ["--patch-size", "17", "33"]
    more = ["--teacher-training", "--steps 7", "--resnet18-training=--steps 8"]
    status, log = house.run("--adapt-backbone", "--seed=-1", *sizes, "--restart", *more)
    assert status == 0
    assert log == [
        "carpet resnet18_training ('steps', 8) ('restart', True)",
        "carpet teacher_training ('steps', 7) ('patch_size', [17, 33]) ('restart', True)",
        "carpet students_training ('patch_size', [17, 33]) ('restart', True)",
        "carpet anomaly_detection",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--students-training=--epoks 3"], "students_training.py: error: unrecognized arguments: --epoks 3"),
        (["--seed", "high"], "students_training.py: error: argument --seed: invalid int value: 'high'"),
        (["--resnet18-training=--steps 3"], "--resnet18-training: runs only with --adapt-backbone"),
        (["--teacher-training=--steps 3"], "--teacher-training: runs only with --teach"),
        (["../carpet"], "'../carpet': give a category's plain name, such as carpet"),
        (["--data", "/nowhere"], "/nowhere: no folder in it has train/good or another layout; see data/README.md"),
    ],
)
def test_bad_input_is_refused_before_any_stage_runs(house, arguments, message):
    house.add("carpet", "grid")
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        house.run(*arguments)
    assert house.log() == []
    assert not house.results.exists()


def test_a_quotation_without_an_end_is_refused(house, capsys):
    with pytest.raises(SystemExit, match="2"):
        house.run("--teach", "--teacher-training=--steps '3")
    assert "argument --teacher-training" in capsys.readouterr().err


# The stages as they are.


def test_the_stages_know_the_options_that_are_handed_on_to_them():
    shared = ["--seed", "1", "--device", "cpu", "--precision", "float32", "--image-size", "32", "--patch-size", "17"]
    args = all_categories.parse_arguments(["--adapt-backbone", *shared, "--students", "1", "--stride", "8"])
    for stage, options in args.commands.items():
        importlib.import_module(stage).parse_arguments(["carpet", *options])


def noise(path, seed, mark=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(90, 120, (32, 32, 3), dtype=np.uint8)
    if mark:
        values[10:18, 12:20] = 255
    Image.fromarray(values).save(path)


@pytest.mark.slow
def test_stages_as_they_are(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # so little work is done faster by one thread
    monkeypatch.setattr(all_categories, "check", lambda _: None)  # the test above holds it, in a fraction of the time
    data = tmp_path / "data"
    for category, number in itertools.product(("carpet", "broken"), range(3)):
        noise(data / category / f"train/good/{number}.png", number)
    noise(data / "carpet/test/good/0.png", 10)
    noise(data / "carpet/test/spot/0.png", 11, mark=True)
    mask = np.zeros((32, 32), np.uint8)
    mask[10:18, 12:20] = 255
    (data / "carpet/ground_truth/spot").mkdir(parents=True)
    Image.fromarray(mask).save(data / "carpet/ground_truth/spot/0_mask.png")
    (data / "broken/train/good/1.png").write_bytes(b"no picture")
    folders = [word for name in ("data", "model", "results") for word in (f"--{name}", str(tmp_path / name))]
    small = ["--image-size", "32", "--patch-size", "17", "--students", "1", "--stride", "8"]
    command = [*folders, "--device", "cpu", "--precision", "float32", *small, "--students-training=--epochs 1"]

    assert all_categories.main(command) == 1
    shown = capfd.readouterr()
    assert [line for line in shown.out.splitlines() if line.startswith("[")] == [
        *(f"[1/2] carpet: {stage}.py" for stage in ("mvtec_dataset", "students_training", "anomaly_detection")),
        "[2/2] broken: mvtec_dataset.py",
        "[2/2] broken: failed",
    ]
    assert "train/good/1.png" in shown.err
    assert "\nbroken: mvtec_dataset.py: exit status 2\n" in shown.err
    rows = read_rows(tmp_path / "results")
    assert list(rows) == ["carpet", "broken", "mean"]
    measures = json.loads((tmp_path / "results/carpet/metrics.json").read_text())
    for row in (rows["carpet"], rows["mean"]):
        assert {name: float(row[name]) for name in summary.MEASURES if row[name]} == {
            name: measures[name] for name in summary.MEASURES if name in measures
        }
        assert (row["paper_p65"], row["efficientad_m_au_pro"]) == ("0.695", "0.93")
    assert rows["broken"]["status"] == "failed"
    assert float(rows["carpet"]["seconds"]) > 0
    assert all_categories.is_done("carpet", all_categories.parse_arguments(command))
