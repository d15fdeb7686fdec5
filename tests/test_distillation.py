"""Distillation: views, backbones, and the positions of descriptors and features."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from AnomalyNet import PATCH_SIZES, AnomalyNet
from AnomalyResnet18 import AnomalyResnet18
from ExtendedAnomalyNet import ExtendedAnomalyNet
from student_teacher.images import preprocessing
from student_teacher.teachers import backbone_weights, backbones
from student_teacher.training import distillation, views
from student_teacher.training.distillation import DenseDistillation, PatchDistillation
from student_teacher.training.views import ViewSampler


def noise(height=150, width=180, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


# AnomalyNet with batch normalisation


@pytest.mark.parametrize("patch_size", PATCH_SIZES)
def test_folding_batch_normalisation_changes_nothing(patch_size):
    torch.manual_seed(patch_size)
    net = AnomalyNet(patch_size, batch_normalisation=True)
    for layer in net.layers:
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 2)
            nn.init.normal_(layer.bias)
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    patches = torch.randn(3, 3, patch_size, patch_size)
    with torch.inference_mode():
        folded = net.folded()
        assert [type(layer) for layer in folded.layers] == [type(layer) for layer in AnomalyNet(patch_size).layers]
        torch.testing.assert_close(folded(patches), net.eval()(patches), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("patch_size", PATCH_SIZES)
def test_a_net_with_batch_normalisation_goes_on_from_one_without(patch_size):
    torch.manual_seed(patch_size)
    trained = AnomalyNet(patch_size).eval()
    net = AnomalyNet(patch_size, batch_normalisation=True)
    images = torch.randn(6, 3, patch_size, patch_size)
    net.start_from(trained, images)
    with torch.no_grad():
        torch.testing.assert_close(net.train()(images), trained(images), rtol=1e-3, atol=1e-3)


# views


def test_views_depend_on_seed_and_step_only():
    pictures = [noise(seed=seed) for seed in range(3)]
    drawn = list(ViewSampler(pictures, 32, 0, torch.device("cpu")).batches(range(3), 4))
    (later,) = ViewSampler(pictures, 32, 0, torch.device("cpu")).batches(range(2, 3), 4)
    assert (drawn[0].shape, drawn[0].dtype) == ((4, 3, 64, 64), torch.uint8)
    assert torch.equal(drawn[2], later)
    assert len(torch.cat(drawn).flatten(1).unique(dim=0)) == 12


def plain(monkeypatch, **others):
    """Views that are crops and nothing more, but for `others`."""
    settings = {
        "GREY_PROBABILITY": 0,
        "BRIGHTNESS": 0,
        "CONTRAST": (1, 1),
        "FLIP_PROBABILITY": 0,
        "NOISE_PROBABILITY": 0,
    }
    for name, value in (settings | others).items():
        monkeypatch.setattr(views, name, value)


def test_views_are_stretched_both_ways(monkeypatch):
    plain(monkeypatch)
    row, column = np.mgrid[:400, :400] * (255 / 400)
    ramps = Image.fromarray(np.stack([row, column, row], 2).astype(np.uint8))
    (drawn,) = ViewSampler([ramps], 128, 0, torch.device("cpu")).batches(range(1), 200)
    high = (drawn[:, 0, -1] - drawn[:, 0, 0].float()).mean(1)
    wide = (drawn[:, 1, :, -1] - drawn[:, 1, :, 0].float()).mean(1)
    ratios = wide / high
    assert ratios.min() < 0.75
    assert ratios.max() > 1.35
    assert ratios.log().mean().abs() < 0.05


def test_half_of_the_views_have_noise_as_fine_as_the_teacher_sees(monkeypatch):
    plain(monkeypatch, NOISE_PROBABILITY=0.5)
    (drawn,) = ViewSampler([Image.new("RGB", (300, 300), (120, 130, 140))], 64, 0, torch.device("cpu")).batches(
        range(1), 200
    )
    seen = torch.nn.functional.avg_pool2d(drawn.float(), 2)
    stds = seen[:, 0].std((1, 2))
    assert 0.35 < (stds > 0).float().mean() < 0.65
    assert 4 < stds.max() < views.NOISE
    assert torch.allclose(seen[:, 0] + 10, seen[:, 1], atol=1)  # grey


def test_a_view_spans_the_stated_part_of_the_shorter_side(monkeypatch):
    plain(monkeypatch, STRETCH=1)
    ramp = np.broadcast_to(np.linspace(0, 255, 300)[:, None, None], (300, 400, 3)).astype(np.uint8)
    (drawn,) = ViewSampler([Image.fromarray(ramp)], 128, 0, torch.device("cpu")).batches(range(1), 200)
    spans = (drawn[:, 0, -1] - drawn[:, 0, 0].float()).mean(1) / 255
    assert 128 / 384 - 0.01 < spans.min() < 128 / 384 + 0.02
    assert 128 / 256 - 0.02 < spans.max() < 128 / 256 + 0.01


def test_the_exposure_keeps_to_the_range_and_varies():
    (drawn,) = ViewSampler([noise()], 32, 0, torch.device("cpu")).batches(range(1), 100)
    means = drawn.float().mean((1, 2, 3))
    assert means.std() > 10
    grey = (drawn.float().std(1).amax((1, 2)) == 0).float().mean().item()
    assert 0.12 < grey < 0.4


# backbones


class Positions(backbones.Backbone):
    """A backbone whose features are their own position: the row of their pixel, for both strides."""

    strides = 8, 16
    first_fine, first_coarse = 7, 15

    def levels(self, pictures):
        def rows(first, stride):
            count, columns = (length // stride for length in pictures.shape[2:])
            return (first + stride * torch.arange(count)).float().view(1, 1, -1, 1).expand(1, 1, count, columns)

        return [rows(self.first_fine, 8), rows(self.first_coarse, 16)]


@pytest.mark.parametrize(("fine", "coarse"), [(7, 15), (0, 0)])
def test_coarse_features_come_to_the_places_of_the_fine_ones(fine, coarse, monkeypatch):
    monkeypatch.setattr(Positions, "first_fine", fine)
    monkeypatch.setattr(Positions, "first_coarse", coarse)
    features = Positions().dense(torch.zeros(1, 3, 160, 96))
    assert features.shape == (1, 2, 20, 12)
    inner = features[0, :, 3:-4]  # averages and interpolation differ at the border
    torch.testing.assert_close(inner[0], inner[1])
    assert inner[0, 0, 0] == fine + 8 * 3


@pytest.mark.parametrize("name", backbones.BACKBONES)
def test_features_stand_on_the_pixels_that_the_backbone_names(name):
    torch.manual_seed(0)
    if name == "efficientnet_lite0":
        net = backbone_weights.backbone("efficientnet_lite0", "imagenet")
    else:
        net = backbones.Resnet18(AnomalyResnet18().eval())
    # In double precision, where a single pixel's influence isn't lost in rounding.
    net = net.double()
    pictures = torch.randn(1, 3, 1024, 32, dtype=torch.float64, requires_grad=True)  # higher than any field
    last = dict(zip(net.strides, net.levels(pictures), strict=True))
    for stride, first in ((8, net.first_fine), (16, net.first_coarse)):
        features = last[stride]
        place = features.shape[2] // 2
        # Weights of many signs in the sum: no part of the influence cancels systematically.
        weights = torch.randn(features.shape[1], dtype=torch.float64)
        (influence,) = torch.autograd.grad((features[0, :, place, 1] * weights).sum(), pictures, retain_graph=True)
        rows = influence.abs().sum((0, 1, 3)).nonzero().flatten()
        assert (rows[0] + rows[-1]).item() / 2 == pytest.approx(first + stride * place, abs=1)


# distillation


@pytest.mark.slow
@pytest.mark.parametrize("patch_size", [17, 33])
@pytest.mark.parametrize("first", [0, 7])
def test_dense_descriptors_stand_where_the_features_stand(patch_size, first, monkeypatch):
    monkeypatch.setitem(distillation.VIEW, patch_size, 64)
    monkeypatch.setattr(Positions, "first_fine", first)
    monkeypatch.setattr(Positions, "first_coarse", 2 * first + 1 if first else 0)
    torch.manual_seed(0)
    net = AnomalyNet(patch_size)
    dense = DenseDistillation(Positions(), patch_size, torch.device("cpu"))
    (batch,) = dense.batches([noise()], 0, range(1), 2)
    rows = (dense.features(batch)[:, 0].view(1, -1).unique() + 0.5) / 2 - 0.5  # in pixels of the net's view
    with torch.inference_mode():
        answer = dense.ask(net, batch, triplets=True)
        views = nn.functional.avg_pool2d(preprocessing.normalise(batch[1]), 2)
        expected = ExtendedAnomalyNet(net)(views)
    rows = rows.round().long()
    window = expected[:, :, rows[0] : rows[-1] + 1 : 4, rows[0] : rows[-1] + 1 : 4]
    torch.testing.assert_close(answer.descriptors, window.permute(0, 2, 3, 1).flatten(0, 2), rtol=1e-4, atol=1e-4)


def test_positives_are_the_places_beside():
    random = torch.Generator().manual_seed(0)
    chosen, beside = (torch.stack(places).T for places in distillation.places_beside((2, 9, 8), random))
    assert set(map(tuple, (beside - chosen).tolist())) == {(0, 1, 0), (0, 0, 1)}
    assert beside.amax(0).tolist() <= [1, 8, 7]
    assert len(chosen) == 2 * 4 * 4
    assert len(torch.cat([chosen, beside]).unique(dim=0)) == 2 * len(chosen)


def test_patch_distillation_is_as_in_the_paper():
    torch.manual_seed(0)
    net = AnomalyNet(17)

    class Means(backbones.Backbone):
        def pooled(self, pictures):
            return pictures.mean((2, 3))

    patchwise = PatchDistillation(Means(), 17, 17, torch.device("cpu"))
    (batch,) = patchwise.batches([noise()], 0, range(1), 4)
    answer = patchwise.ask(net, batch, triplets=True)
    torch.testing.assert_close(patchwise.features(batch), batch[0].mean((2, 3)))
    torch.testing.assert_close(answer.descriptors, net(batch[0]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(answer.positives, net(batch[1]), rtol=1e-4, atol=1e-4)
    assert patchwise.ask(net, batch, triplets=False).positives is None
