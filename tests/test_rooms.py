"""Who may import whom: the rooms of src/student_teacher, the networks beside them, the commands above."""

import ast
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parent.parent / "src"
COMMANDS = {
    *("resnet18_training", "teacher_training", "students_training", "anomaly_detection"),
    *("all_categories", "export_onnx"),
}
NETWORKS = {"AnomalyNet", "AnomalyResnet18", "ExtendedAnomalyNet", "FDFE", "FDFEAnomalyNet"}
# A room may import those before it in this order, and itself.
ROOMS = "runtime", "images", "teachers", "students", "detection", "evaluation", "reports", "training"
APART = {"evaluation"}  # knows NumPy alone


def imported(path):
    """All modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(path):
    return {name for name in imported(path) if (SRC / name.split(".")[0]).exists() or (SRC / f"{name}.py").exists()}


def files():
    return sorted(path for path in SRC.rglob("*.py"))


def test_every_file_has_its_place():
    at_top = {path.stem for path in SRC.glob("*.py")}
    assert at_top == COMMANDS | NETWORKS | {"AnomalyDataset"}
    rooms = {path.name for path in (SRC / "student_teacher").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms == set(ROOMS)


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(SRC)))
def test_imports_go_down_alone(path):
    found, place = ours(path), path.relative_to(SRC).parts
    assert not found & COMMANDS
    if place[0] == "student_teacher" and len(place) == 3:
        above = ROOMS[ROOMS.index(place[1]) + 1 :]
        allowed = set() if place[1] in APART else set(ROOMS) - set(above)
        rooms = {name.split(".")[1] for name in found if name.startswith("student_teacher.")}
        assert rooms <= allowed | {place[1]}
    elif path.stem in NETWORKS:
        assert found <= NETWORKS


def test_the_package_does_not_collide_with_names_of_users():
    assert not {"images", "metrics", "training", "files"} & {path.stem for path in SRC.iterdir()}


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(SRC)))
def test_nothing_is_for_unix_alone(path):
    assert not {"fcntl", "grp", "pty", "pwd", "resource", "termios", "tty"} & set(imported(path))


def opened_as_text(path):
    """Lines at which a file opens others as text without naming the encoding: the system's may be any."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        name, called_on = node.func.attr, ast.unparse(node.func.value)
        modes = [each.value for each in node.args if isinstance(each, ast.Constant)] or ["r"]
        text = name in ("read_text", "write_text") or (
            name == "open" and called_on not in ("Image", "tarfile", "lzma", "os") and "b" not in str(modes[0])
        )
        if text and "encoding" not in {keyword.arg for keyword in node.keywords}:
            yield node.lineno


def test_text_files_are_utf_8_whatever_the_system_s_encoding():
    scripts = [
        path for folder in (".", "benchmarks", "examples", "model") for path in (SRC.parent / folder).glob("*.py")
    ]
    found = {path.name: lines for path in (*files(), *scripts) if (lines := list(opened_as_text(path)))}
    assert not found
