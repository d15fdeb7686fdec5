"""Two processes of torchrun against one, on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_stages import CATEGORY, prepared_category

from AnomalyNet import AnomalyNet
from student_teacher.runtime import checkpoints
from student_teacher.runtime.paths import ROOT
from student_teacher.runtime.running_moments import RunningMoments

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("distributed_script.py")
# Batches of 3, 3 and 2 of the 8 training images: uneven shares. Below, --batch-size 1: one process gets none.
STUDENTS = ["--patch-size", "33", "--image-size", "32", "--epochs", "2", "--students", "2", "--batch-size", "3"]
STUDENTS += ["--learning-rate", "0.02"]


def start(processes, *arguments, script=SCRIPT, **variables):
    """Run a script in this number of processes; returns its status, output and errors."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), script, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)


def stage(processes, name, root, *options, **variables):
    """Run a stage on the data and the models of a folder."""
    folders = ["--data", root / "data", "--model", root / f"model {processes}"]
    options = ("--precision", "float32", "--device", "cpu", *options)
    return start(processes, name, CATEGORY, *folders, *options, **variables)


def model(root, processes, name):
    return root / f"model {processes}" / CATEGORY / name


def students(root, processes, patch_size=33):
    return checkpoints.load(model(root, processes, f"students_{patch_size}.pt"), "students")


def make_place(root):
    prepared_category(root / "data")
    for patch_size in (17, 33):
        torch.manual_seed(0)
        content = {"patch_size": patch_size, "net": AnomalyNet(patch_size).state_dict()}
        for processes in (1, 2):
            checkpoints.save(model(root, processes, f"teacher_{patch_size}.pt"), "teacher", CATEGORY, content)
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = make_place(tmp_path_factory.mktemp("distributed"))
    for processes in (1, 2):
        found = stage(processes, "students_training", root, *STUDENTS, "--optimiser", "adam")
        assert found.returncode == 0, found.stderr
        assert found.stdout.count("saved ") == 2  # students and detector, by one process
    return root


def largest_difference(found, expected):
    """Between two state dicts' tensors, relative to their norms."""
    return max(((found[key] - expected[key]).norm() / expected[key].norm()).item() for key in expected)


def weights_of(content):
    return {key: value for key, value in content["scale"]["state"].items() if key.startswith("students")}


def test_students_of_two_processes_are_those_of_one(trained):
    one, two = (students(trained, processes) for processes in (1, 2))
    assert largest_difference(weights_of(two), weights_of(one)) < 1e-4
    for content in (one, two):
        state = content["scale"]["state"]
        assert torch.allclose(state["mean"], one["scale"]["state"]["mean"], rtol=1e-12)
        for name in ("error_mean", "error_std", "place_mean", "place_std"):
            assert torch.allclose(state[name], one["scale"]["state"][name], rtol=1e-3), name
    assert two["validation_loss"] == pytest.approx(one["validation_loss"], rel=1e-4)
    assert one["validation_loss"] < 1.2


def test_a_batch_may_leave_a_process_without_an_image(trained):
    options = ("--patch-size", "17", "--image-size", "16", "--epochs", "1", "--students", "1", "--batch-size", "1")
    for processes in (1, 2):
        found = stage(processes, "students_training", trained, *options, "--optimiser", "adam", "--restart")
        assert found.returncode == 0, found.stderr
    one, two = (weights_of(students(trained, processes, 17)) for processes in (1, 2))
    assert largest_difference(two, one) < 1e-4


def test_detection_of_two_processes_writes_the_same_bytes(trained, tmp_path):
    detector = model(trained, 1, "detector.pt")
    model(trained, 2, "detector.pt").write_bytes(detector.read_bytes())
    for processes in (1, 2):
        found = stage(processes, "anomaly_detection", trained, "--results", tmp_path / str(processes))
        assert found.returncode == 0, found.stderr
        assert found.stdout.count("result page") == 1
    files = {path.relative_to(tmp_path / "1") for path in (tmp_path / "1").rglob("*") if path.is_file()}
    assert files == {path.relative_to(tmp_path / "2") for path in (tmp_path / "2").rglob("*") if path.is_file()}
    written = {path.suffix for path in files}
    assert {".json", ".csv", ".tiff", ".png", ".html"} <= written
    assert [
        str(path) for path in files if (tmp_path / "1" / path).read_bytes() != (tmp_path / "2" / path).read_bytes()
    ] == []


def test_two_processes_inspect_as_one(trained, tmp_path):
    model(trained, 2, "detector.pt").write_bytes(model(trained, 1, "detector.pt").read_bytes())
    images = sorted((trained / "data").rglob("test/*/*.png"))
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    for processes in (1, 2):
        output = tmp_path / str(processes)
        found = stage(processes, "anomaly_detection", trained, "--input", *images, broken, "--output", output)
        assert found.stdout.count("called anomalous, at") == 1
        assert found.stderr.count("not inspected") == 1
    folders = tmp_path / "1", tmp_path / "2"
    one, two = ({path.relative_to(root): path.read_bytes() for path in root.rglob("*.*")} for root in folders)
    assert one == two
    # Table, page, its cover and the ledger; for each image a map, an overlay and three pictures.
    assert len(one) == 5 + 5 * len(images)


def test_a_killed_process_ends_all_and_the_same_command_goes_on(tmp_path):
    root = make_place(tmp_path)
    options = ("--patch-size", "17", "--image-size", "16", "--epochs", "2", "--students", "1", "--optimiser", "adam")
    found = stage(2, "students_training", root, *options, KILLED_AT="2")
    assert found.returncode != 0
    assert found.stderr.count(f"{SCRIPT.name}: another process has ended") == 1
    checkpoint = checkpoints.load(model(root, 2, "students_17.checkpoint.pt"), "students training, 17 pixels")
    assert checkpoint["step"] == 2
    assert stage(2, "students_training", root, *options).returncode == 0
    assert stage(1, "students_training", root, *options).returncode == 0
    one, two = (weights_of(students(root, processes, 17)) for processes in (1, 2))
    assert largest_difference(two, one) < 1e-4


def test_what_is_wrong_is_said_once(tmp_path):
    (tmp_path / "data").mkdir()
    found = stage(2, "students_training", tmp_path)
    assert found.returncode != 0
    assert found.stderr.count(f"{SCRIPT.name}: ") == 1
    assert f"mvtec_dataset.sh {CATEGORY}" in found.stderr


@pytest.mark.parametrize("way", ("patches", "dense"))
def test_a_teacher_of_two_processes_is_that_of_one(tmp_path, way):
    root = make_place(tmp_path)
    options = ("--backbone-weights", "random", "--patch-size", "17", "--steps", "2", "--batch-size", "3")
    options += ("--distillation", way, "--metric-weight", "0.5", "--compactness-weight", "0.5", "--optimiser", "adam")
    for processes in (1, 2):
        found = stage(processes, "teacher_training", root, *options, "--restart")
        assert found.returncode == 0, found.stderr
    one, two = (checkpoints.load(model(root, processes, "teacher_17.pt"), "teacher") for processes in (1, 2))
    nets = [{key: value.float() for key, value in content["net"].items()} for content in (one, two)]
    assert largest_difference(*nets) < 1e-3  # saved in half precision
    assert two["unexplained_variance"] == pytest.approx(one["unexplained_variance"], rel=1e-4)


NORMALISATION = """
import sys
sys.path.insert(0, {src!r})
import torch
from torch import nn
from student_teacher.runtime import distributed
from student_teacher.runtime.SyncBatchNorm2d import SyncBatchNorm2d

def main():
    torch.manual_seed(0)
    for first in (2, 3, 4):
        x, gradient = torch.randn(4, 5, 6, 7) * 3 + 10, torch.randn(4, 5, 6, 7)
        one, two = nn.BatchNorm2d(5), nn.Sequential(nn.BatchNorm2d(5))
        nn.init.normal_(one.weight)
        nn.init.normal_(one.bias)
        two[0].load_state_dict(one.state_dict())
        SyncBatchNorm2d.convert(two)
        assert type(two[0]) is SyncBatchNorm2d
        part = slice(0, first) if distributed.is_first() else slice(first, 4)
        whole, own = x.clone().requires_grad_(), x[part].clone().requires_grad_()
        expected, found = one(whole), two(own)
        expected.backward(gradient)
        found.backward(gradient[part])
        distributed.sum_gradients(two.parameters())
        pairs = [(found, expected[part]), (own.grad, whole.grad[part])]
        pairs += [(b.grad, a.grad) for a, b in zip(one.parameters(), two.parameters())]
        pairs += zip(two.buffers(), one.buffers())
        for a, b in pairs:
            assert torch.allclose(a, b, atol=2e-5), (first, a, b)
        assert torch.allclose(one.eval()(x), two.eval()(x), atol=2e-5)
    print("equal")

distributed.run(main)
"""


def test_batch_normalisation_sees_the_batches_of_all_processes(tmp_path):
    script = tmp_path / "normalisation.py"
    script.write_text(NORMALISATION.format(src=str(ROOT / "src")))
    found = start(2, script=script)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("equal") == 1


def test_of_one_process_moments_stay_as_they_are():
    found = RunningMoments()
    found.update(torch.tensor([[1.0], [3.0]]))
    found.gather()
    assert (found.count, found.mean.item(), found.std.item()) == (2, 2.0, 1.0)
