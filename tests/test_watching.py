"""Images that arrive: in a folder that is watched, or as paths on standard input."""

import csv
import io
import shutil
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from student_teacher.detection.Detector import Detector, load_detector
from student_teacher.reports import watching
from student_teacher.runtime.errors import UserError
from tests.test_detector import CATEGORY, folder, run  # noqa: F401  (a fixture)


class Line:
    """A folder that is watched. `steps` are what happens between looks, one after another; then comes Ctrl-C."""

    def __init__(self, root, monkeypatch, detector):
        self.images, self.output, self._detector = root / "line", root / "out", detector
        self._root, self._monkeypatch = root, monkeypatch
        self.images.mkdir()
        self.predicted = []
        predict = Detector.predict
        monkeypatch.setattr(Detector, "predict", lambda *given: self.predicted.append(1) or predict(*given))

    def picture(self, name, seed=0):
        path = self._root / f"{seed}.png"
        pixels = np.random.default_rng(seed).integers(0, 256, (30, 22, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        return self.images / name, path.read_bytes()

    def watch(self, *steps, options=()):
        """Each step is followed by looks until nothing new happens."""
        waiting = list(steps)
        quiet = [0]

        def pause(_):
            quiet[0] += 1
            if quiet[0] >= 3:
                quiet[0] = 0
                if not waiting:
                    signal.raise_signal(signal.SIGINT)
                    return
                waiting.pop(0)()

        # Not time.sleep itself, which others call, too.
        self._monkeypatch.setattr(watching, "time", SimpleNamespace(sleep=pause, monotonic=time.monotonic))
        return run(self._detector, self._root, "--watch", "--input", self.images, "--output", self.output, *options)

    def rows(self):
        with (self.output / "decisions.csv").open() as file:
            return list(csv.DictReader(file))


@pytest.fixture
def line(tmp_path, monkeypatch, folder):  # noqa: F811
    return Line(tmp_path, monkeypatch, folder)


def test_each_image_that_arrives_is_decided_once(line, capsys, folder):  # noqa: F811
    (first, content), (second, other) = line.picture("a.png"), line.picture("deep/b.png", 1)
    (line.images / "deep").mkdir()
    (line.images / "notes.txt").write_text("no image")
    (line.images / ".hidden.png").write_bytes(content)
    status = line.watch(lambda: first.write_bytes(content), lambda: second.write_bytes(other))
    assert status == 0
    shown = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["path"] for row in shown] == [str(first), str(second)]
    assert shown == line.rows()
    detector = load_detector(folder / CATEGORY / "detector.pt")
    assert [float(row["image_score"]) for row in shown] == pytest.approx(
        [detector(path).score for path in (first, second)], rel=1e-4
    )


def test_a_file_is_awaited_until_it_is_whole(line, capsys):
    path, content = line.picture("a.png")
    line.watch(
        lambda: path.write_bytes(b""),
        lambda: path.write_bytes(content[: len(content) // 2]),
        lambda: path.write_bytes(content),
    )
    captured = capsys.readouterr()
    assert len(line.rows()) == 1
    assert "not inspected" not in captured.err


def test_a_file_that_stays_broken_is_named_once_and_tried_again_when_it_changes(line, capsys, monkeypatch):
    monkeypatch.setattr(watching, "PATIENCE", -1.0)
    path, content = line.picture("a.png")
    line.watch(lambda: path.write_bytes(content[:100]), lambda: None)
    captured = capsys.readouterr()
    assert captured.err.count(f"not inspected: {path}") == 1
    assert line.rows() == []
    line.watch(lambda: path.write_bytes(content))
    assert len(line.rows()) == 1


def test_after_a_restart_nothing_is_decided_again_but_what_has_changed(line):
    (first, content), (second, other) = line.picture("a.png"), line.picture("b.png", 1)
    first.write_bytes(content)
    second.write_bytes(content)
    line.watch()
    assert len(line.predicted) == 2
    before = line.rows()
    line.watch()
    assert (len(line.predicted), line.rows()) == (2, before)
    line.watch(lambda: second.write_bytes(other))
    assert len(line.predicted) == 3
    assert [row["path"] for row in line.rows()] == [str(first), str(second), str(second)]
    with pytest.raises(UserError, match=r"holds the results of .* add --overwrite"):
        line.watch(options=("--threshold", "3"))
    line.watch(options=("--threshold", "3", "--overwrite"))
    assert len(line.predicted) == 5


def test_maps_and_overlays_are_written_when_asked_for_and_those_of_others_stay(line):
    path, content = line.picture("a.png")
    path.write_bytes(content)
    options = ("--save", "maps", "overlays")
    for _ in range(2):
        line.watch(options=options)
        written = {str(file.relative_to(line.output)) for file in line.output.rglob("*.*") if file.is_file()}
        pictures = {"anomaly_maps/line/a.png.tiff", "overlays/line/a.png.jpg"}
        assert written == pictures | {"decisions.csv", "regions.csv", "watch.log", ".student_teacher.json"}
    shutil.copy(path, line.output / "overlays" / "line" / "mine.jpg")
    with pytest.raises(UserError, match=r"mine\.jpg: not written by this command"):
        line.watch(options=options)


def test_paths_on_standard_input_are_answered_until_it_ends(line, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(watching, "PATIENCE", -1.0)
    path, content = line.picture("a.png")
    path.write_bytes(content)
    missing = tmp_path / "missing.png"
    for _ in range(2):
        monkeypatch.setattr("sys.stdin", io.StringIO(f"{path}\n\n{missing}\n"))
        assert run(line._detector, tmp_path, "--input", "-", "--output", line.output) == 3
        captured = capsys.readouterr()
        assert [row["path"] for row in csv.DictReader(io.StringIO(captured.out))] == [str(path)]
        assert f"{missing}: no such file" in captured.err
    assert len(line.predicted) == 1  # the second answer is the first one's


def test_what_does_not_go_with_watching_is_refused(line, tmp_path, monkeypatch):
    for options, told in (
        (("--watch",), "--watch needs --input"),
        (("--watch", "--input", tmp_path / "nothing"), "not a folder"),
        (("--watch", "--input", line.images, "--save", "page"), "--save page"),
        (("--watch", "--input", line.images, "--output", line.images / "out"), "is watched"),
    ):
        with pytest.raises(UserError, match=told):
            run(line._detector, tmp_path, *options)


def test_what_a_kill_leaves_of_an_image_does_not_stop_the_next_start(line, monkeypatch):
    path, content = line.picture("a.png")
    path.write_bytes(content)
    options = ("--save", "maps", "overlays")

    def killed(*_):
        raise KeyboardInterrupt  # once map and overlay are written, before the decision is

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(watching.Watch, "_decide", killed)
        line.watch(options=options)
    maps = line.output / "anomaly_maps" / "line"
    assert [file.name for file in maps.iterdir()] == ["a.png.tiff"] and line.rows() == []
    (maps / ".a.png.tiff.0123abcd").write_bytes(b"half")
    line.watch(options=options)
    assert [file.name for file in maps.iterdir()] == ["a.png.tiff"]
    assert [row["path"] for row in line.rows()] == [str(path)]


def test_ctrl_c_ends_watching_even_where_python_ignores_exceptions(line, monkeypatch):
    for seed, name in enumerate(("a.png", "b.png")):
        path, content = line.picture(name, seed)
        path.write_bytes(content)
    decide = watching.Watch._decide

    class Fleeting:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    def decided(*args):
        Fleeting()
        return decide(*args)

    monkeypatch.setattr(watching.Watch, "_decide", decided)
    line.watch(lambda: pytest.fail("it goes on"))
    assert len(line.rows()) == 1
