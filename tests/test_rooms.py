"""House rules that the sources' text shows: who may import whom, what Windows lacks, how large functions may be."""

import ast
from pathlib import Path, PurePosixPath, PureWindowsPath

import pytest

from student_teacher.runtime import archives, paths
from student_teacher.runtime.errors import UserError

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


def scripts():
    return [
        path
        for folder in (".", "benchmarks", "examples", "model/pretrained")
        for path in (SRC.parent / folder).glob("*.py")
    ]


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
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    used = {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}
    assert not {f"os.{name}" for name in ("fork", "geteuid", "getuid", "killpg", "mkfifo", "nice", "setsid")} & used
    assert not {f"signal.{name}" for name in ("SIGALRM", "SIGHUP", "SIGKILL", "SIGUSR1", "alarm", "setitimer")} & used


@pytest.mark.parametrize("name", ["..\\up", "a\\b", "C:up", "C:"])
def test_no_name_leads_out_of_its_folder_on_windows(monkeypatch, name):
    for module in (archives, paths):
        monkeypatch.setattr(module, "Path", PureWindowsPath)
    with pytest.raises(UserError, match="plain name"):
        paths.category_name(name)
    assert archives._place(PurePosixPath(f"carpet/train/good/{name}"), "carpet") == (None, None)
    assert archives._place(PurePosixPath("carpet/train/good/0.png"), "carpet")[0] == "carpet"


LARGEST, MOST_ARGUMENTS = 60, 4  # lines of a function, and its positional arguments without self or cls


def is_large(function):
    """Whether a function has too many lines or positional arguments; PyTorch says what a Function's forward takes."""
    arguments = [each.arg for each in (*function.args.posonlyargs, *function.args.args)]
    own = arguments[arguments[:1] in (["self"], ["cls"]) :]
    many = len(own) > MOST_ARGUMENTS and own[0] != "ctx"
    return many or function.end_lineno - function.lineno >= LARGEST


def test_functions_are_short_and_take_few_positional_arguments():
    found = {
        f"{path.relative_to(SRC.parent).as_posix()}: {node.name}"
        for path in (*files(), *scripts())
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and is_large(node)
    }
    assert not found


def opened_as_text(path):
    """Lines at which a file takes others' or a process's bytes for text in the system's encoding, which may be any."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        name, called_on = node.func.attr, ast.unparse(node.func.value)
        names = {keyword.arg for keyword in node.keywords}
        modes = [each.value for each in node.args if isinstance(each, ast.Constant)] or ["r"]
        text = (
            bool(names & {"text", "universal_newlines"})
            or name in ("read_text", "write_text")
            or (name == "open" and called_on not in ("Image", "tarfile", "lzma", "os") and "b" not in str(modes[0]))
        )
        if text and "encoding" not in names:
            yield node.lineno


def test_text_files_are_utf_8_whatever_the_system_s_encoding():
    found = {path.name: lines for path in (*files(), *scripts()) if (lines := list(opened_as_text(path)))}
    assert not found
