"""The teachers that ship."""

import pytest
import torch

from AnomalyNet import PATCH_SIZES, AnomalyNet
from student_teacher.runtime import checkpoints
from student_teacher.runtime.paths import ROOT

PATHS = sorted((ROOT / "model" / "pretrained").glob("teacher_*.pt"))


def test_every_patch_size_has_a_teacher():
    assert [path.name for path in PATHS] == [f"teacher_{patch_size}.pt" for patch_size in PATCH_SIZES]


@pytest.mark.parametrize("path", PATHS, ids=[path.stem for path in PATHS])
def test_a_teacher_is_small_whole_and_has_learned_something(path):
    assert path.stat().st_size < 8_000_000
    content = checkpoints.load(path, "teacher", category="pretrained", patch_size=int(path.stem.split("_")[1]))
    assert {value.dtype for value in content["net"].values()} == {torch.float16}
    assert content["unexplained_variance"] < 0.9
    net = AnomalyNet(content["patch_size"])
    net.load_state_dict(content["net"])
    with torch.inference_mode():
        descriptors = net(torch.randn(4, 3, net.patch_size, net.patch_size, generator=torch.Generator().manual_seed(0)))
    assert descriptors.isfinite().all()
    assert (descriptors[0] - descriptors[1]).abs().max() > 0.01


def test_the_note_says_how_each_was_taught():
    note = (ROOT / "model" / "pretrained" / "README.md").read_text()
    for path in PATHS:
        assert path.name in note
    assert "--backbone efficientnet_lite0" in note
