"""The demo and the environment's lower bound, with interpreters that only note what they are asked to do."""

import os
import re
import shutil
import subprocess
import tomllib

import pytest

from student_teacher.runtime.paths import ROOT


def stand_in(folder, name, text):
    path = folder / name
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)
    return path


def demo(folder, condition):
    """Run a copy of the demo with an interpreter that notes its scripts and fails unless `condition` holds."""
    for name in ("demo.sh", "mvtec_dataset.sh", "environment.sh"):
        shutil.copy(ROOT / name, folder)
    (folder / "data/demo_carpet/train").mkdir(parents=True)  # as demo_dataset.py would leave it
    log = folder / "log"
    python = stand_in(folder, "python", f'echo "$*" >> "{log}"; {condition}')
    done = subprocess.run(
        [folder / "demo.sh"], env=os.environ | {"PYTHON": str(python)}, capture_output=True, text=True
    )
    return done, [line.split()[0].rsplit("/", 1)[-1] for line in log.read_text().splitlines()]


def test_the_demo_runs_the_stages_in_order(tmp_path):
    done, scripts = demo(tmp_path, "true")
    assert done.returncode == 0, done.stderr
    assert scripts == ["demo_dataset.py", "mvtec_dataset.py", "students_training.py", "anomaly_detection.py"]


def test_the_demo_stops_at_the_first_stage_that_fails(tmp_path):
    done, scripts = demo(tmp_path, "[[ $* != *students* ]]")
    assert done.returncode != 0
    assert scripts == ["demo_dataset.py", "mvtec_dataset.py", "students_training.py"]


@pytest.mark.parametrize(("version", "status"), [((3, 10), 2), ((3, 11), 0), ((3, 14), 0)])
def test_the_environment_needs_python_3_11(tmp_path, version, status):
    answer = f'[[ $2 == *version_info* ]] && {{ real=$(echo "$2" | sed "s/sys.version_info/{version}/"); '
    answer += 'exec "$REAL" -c "$real"; }; [[ $1 == --version ]] && echo "Python of old"; exit 0'
    stand_in(tmp_path, "python3", answer)
    real = subprocess.run(["bash", "-c", "command -v python3"], capture_output=True, text=True).stdout.strip()
    code = f'source environment.sh; make_environment "{tmp_path}/venv"'
    variables = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "REAL": real}
    done = subprocess.run(["bash", "-c", code], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == status
    assert ("Python 3.11 or later is needed" in done.stderr) == bool(status)


def test_one_lower_bound_of_python_everywhere():
    bounds = re.findall(r"\(3, (\d+)\)|Python 3\.(\d+) or later", (ROOT / "environment.sh").read_text())
    bounds += re.findall(r"(x^)?Python 3\.(\d+) or later", (ROOT / "README.md").read_text())
    target = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["target-version"]
    assert {one or other for one, other in bounds} | {target.removeprefix("py3")} == {"11"}
