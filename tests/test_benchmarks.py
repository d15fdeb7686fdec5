import json
import sys

import pytest
import torch

from AnomalyNet import PATCH_SIZES, AnomalyNet
from command_line import ROOT
from FDFEAnomalyNet import FDFEAnomalyNet

sys.path.append(str(ROOT / "benchmarks"))
import dense_extraction
from published import MultiPoolingNet


@pytest.mark.parametrize("size", ((9, 14), (21, 16)))
@pytest.mark.parametrize("patch_size", PATCH_SIZES)
def test_the_published_way_gives_the_same_descriptors(patch_size, size):
    net = AnomalyNet(patch_size)
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = FDFEAnomalyNet(net)(images)
        assert ((MultiPoolingNet(net)(images) - expected).norm() / expected.norm()).item() < 1e-5


def test_dense_extraction_counts_every_multiplication(tmp_path):
    output = tmp_path / "figures.json"
    options = ["--image-size", "6", "--patch-size", "17", "--stride", "1", "--repeat", "1", "--output", str(output)]
    dense_extraction.main([*options, "--device", "cpu"])
    (row,) = json.loads(output.read_text())["rows"]
    # Each layer's side, channels and kernel, for 6 + 16 pixels along each side.
    layers = ((17, 3, 128, 6), (13, 128, 256, 5), (9, 256, 256, 5), (6, 256, 128, 4), (6, 128, 512, 1))
    expected = sum(2 * side**2 * before * after * kernel**2 for side, before, after, kernel in layers)
    assert row["tflop"] == pytest.approx(expected / 1e12)
    assert row["times_every_patch"] > 0
