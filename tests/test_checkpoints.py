import pickle

import pytest
import torch

from student_teacher.runtime import checkpoints
from student_teacher.runtime.errors import UserError


def test_what_was_saved_is_loaded(tmp_path):
    path = tmp_path / "model" / "teacher.pt"
    checkpoints.save(path, "teacher", "carpet", {"patch_size": 17, "net": {"weight": torch.arange(3)}})
    content = checkpoints.load(path, "teacher", category="carpet", patch_size=17)
    assert content["net"]["weight"].tolist() == [0, 1, 2]
    assert [entry.name for entry in path.parent.iterdir()] == ["teacher.pt"]


@pytest.mark.parametrize(
    ("expected", "said"),
    [
        ({"kind": "students"}, "kind teacher, not students"),
        ({"kind": "teacher", "patch_size": 33}, "patch size 17, not 33"),
        ({"kind": "teacher", "category": "wood"}, "category carpet, not wood"),
    ],
)
def test_a_wrong_checkpoint_is_refused_by_name(tmp_path, expected, said):
    path = tmp_path / "teacher.pt"
    checkpoints.save(path, "teacher", "carpet", {"patch_size": 17})
    with pytest.raises(UserError, match=said) as error:
        checkpoints.load(path, expected.pop("kind"), **expected)
    assert str(path) in str(error.value)


def test_files_that_are_not_checkpoints_are_refused_by_name(tmp_path):
    broken, foreign, empty, code = (tmp_path / name for name in ("broken.pt", "foreign.pt", "empty.pt", "code.pt"))
    torch.save(torch.nn.Linear(2, 2).state_dict(), foreign)
    broken.write_bytes(foreign.read_bytes()[:300])
    empty.touch()
    code.write_bytes(pickle.dumps(print))
    for path in (broken, foreign, empty, code, tmp_path, tmp_path / "missing.pt"):
        with pytest.raises(UserError, match=path.name):
            checkpoints.load(path, "teacher")


def test_another_version_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "teacher.pt"
    monkeypatch.setattr(checkpoints, "VERSION", checkpoints.VERSION + 1)
    checkpoints.save(path, "teacher", "carpet", {})
    monkeypatch.undo()
    with pytest.raises(UserError, match=f"version {checkpoints.VERSION + 1}"):
        checkpoints.load(path, "teacher")


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "teacher.pt"
    checkpoints.save(path, "teacher", "carpet", {"net": 1})
    before = path.read_bytes()
    with pytest.raises((AttributeError, pickle.PicklingError)):
        checkpoints.save(path, "teacher", "carpet", {"net": lambda: None})
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="can't be written"):
        checkpoints.save(tmp_path / "file" / "teacher.pt", "teacher", "carpet", {})
