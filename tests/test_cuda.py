"""Tests for a CUDA device; they are skipped without one."""

import numpy as np
import pytest
import torch
from PIL import Image

from AnomalyNet import PATCH_SIZES, AnomalyNet
from ExtendedAnomalyNet import ExtendedAnomalyNet
from FDFEAnomalyNet import FDFEAnomalyNet
from student_teacher.detection.BackboneDetector import BackboneDetector
from student_teacher.detection.Detector import Detector
from student_teacher.images import preprocessing
from student_teacher.images.store import ImageStore
from student_teacher.runtime import device
from student_teacher.runtime.cuda_graph import Recorded
from student_teacher.teachers import backbone_weights
from student_teacher.training import backbone_students

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def relative_error(found, expected):
    return ((found.double() - expected.double()).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("stride", (1, 4))
@pytest.mark.parametrize(("precision", "tolerance"), (("float32", 1e-5), ("bfloat16", 3e-2)))
@pytest.mark.parametrize("patch_size", PATCH_SIZES)
def test_dense_equals_patch_by_patch(patch_size, precision, tolerance, stride):
    torch.manual_seed(0)
    where = torch.device("cuda")
    net = AnomalyNet(patch_size).to(where, memory_format=device.memory_format(where)).eval()
    x = torch.randn(1, 3, 19, 14, device=where)
    with torch.no_grad():
        with device.autocast(where, "float32"):
            expected = ExtendedAnomalyNet(net)(x)[:, :, ::stride, ::stride]
        with device.autocast(where, precision):
            assert relative_error(FDFEAnomalyNet(net, stride)(x), expected) < tolerance


def test_float32_is_not_rounded_to_tf32():
    where = torch.device("cuda")
    torch.manual_seed(0)
    layer, x = torch.nn.Conv2d(64, 64, 3), torch.randn(1, 64, 40, 40)
    with torch.no_grad():
        expected = layer.double()(x.double())
        with device.autocast(where, "float32"):
            assert relative_error(layer.float().to(where)(x.to(where)).cpu(), expected) < 2e-6
            product = (x[0, 0].to(where) @ x[0, 1].to(where)).cpu()
    assert relative_error(product, x[0, 0].double() @ x[0, 1].double()) < 2e-6


def test_the_frozen_backbone_describes_as_on_the_cpu():
    backbone = backbone_weights.backbone("efficientnet_lite0", "imagenet")
    pictures = torch.randn(2, 3, 128, 160, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = backbone.levels(pictures)
        with device.autocast(torch.device("cuda"), "float32"):
            found = backbone.cuda().levels(pictures.cuda())
    for level, wanted in zip(found, expected, strict=True):
        assert relative_error(level.cpu(), wanted) < 1e-4


def test_a_recorded_graph_gives_the_function_s_results():
    layer = torch.nn.Conv2d(3, 4, 3).cuda()
    recorded = Recorded(layer)
    for seed in range(3):
        x = torch.randn(1, 3, 20, 30, generator=torch.Generator().manual_seed(seed)).cuda()
        with torch.no_grad():
            torch.testing.assert_close(recorded(x), layer(x))


@pytest.mark.parametrize("precision", ("float32", "bfloat16"))
def test_the_default_detector_fits_and_detects_as_on_the_cpu(precision):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 20, 20, 3), dtype=np.uint8)
    pictures = [Image.fromarray(values).resize((128, 128), Image.Resampling.BICUBIC) for values in pixels]
    images = torch.stack([preprocessing.to_tensor(picture) for picture in pictures])
    store = ImageStore(images.__getitem__, len(images))
    backbone = backbone_weights.backbone("efficientnet_lite0", "imagenet")
    compute = device.Compute(torch.device("cuda"), "float32")
    fitted, _ = backbone_students.fit(backbone, (128, 128), store, compute)
    content = fitted.to_checkpoint("efficientnet_lite0")

    def found(where, precision):
        networks = BackboneDetector.of_checkpoint(content)
        detector = Detector(
            networks, (128, 128), None, calibrated_stride=8, where=torch.device(where), precision=precision
        )
        return [detector.predict(picture) for picture in pictures]  # a graph is recorded once and replayed

    tolerance = {"float32": 1e-3, "bfloat16": 0.1}[precision]
    for (anomaly_map, score), (expected, wanted) in zip(found("cuda", precision), found("cpu", "float32"), strict=True):
        assert relative_error(anomaly_map, expected) < tolerance
        assert abs(score - wanted) < tolerance * expected.abs().max()
