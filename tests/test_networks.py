import pytest
import torch
from torch import nn

import FDFE
from AnomalyNet import PATCH_SIZES, AnomalyNet
from ExtendedAnomalyNet import ExtendedAnomalyNet
from FDFE import PADDINGS, pad
from FDFEAnomalyNet import FDFEAnomalyNet

# Odd, prime, smaller than every patch, not square.
SIZES = {17: [(19, 23), (7, 12), (1, 3)], 33: [(13, 17), (5, 8)], 65: [(11, 7), (4, 9)]}


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def images(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("patch_size", PATCH_SIZES)
def test_one_patch_gives_one_descriptor(patch_size):
    net = AnomalyNet(patch_size)
    assert net(images(3, 3, patch_size, patch_size)).shape == (3, 512)
    with pytest.raises(ValueError, match="expected"):
        net(images(3, 3, patch_size + 1, patch_size))


def test_unknown_patch_size_is_refused():
    with pytest.raises(ValueError, match="17, 33, 65"):
        AnomalyNet(20)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("patch_size", PATCH_SIZES)
def test_dense_equals_patch_by_patch_at_every_pixel_and_stride(patch_size, padding):
    torch.manual_seed(patch_size)
    net = AnomalyNet(patch_size).eval()
    with torch.no_grad():
        for size in SIZES[patch_size]:
            x = images(2, 3, *size)
            expected = ExtendedAnomalyNet(net, batch_size=64, padding=padding)(x)
            assert expected.shape == (2, 512, *size)
            for stride in (1, 2, 4, 8):
                found = FDFEAnomalyNet(net, stride, padding=padding)(x)
                assert found.shape == expected[:, :, ::stride, ::stride].shape
                # Each pixel separately, so that an error at the border is not hidden by the others.
                difference = (found - expected[:, :, ::stride, ::stride]).norm(dim=1)
                assert (difference / expected[:, :, ::stride, ::stride].norm(dim=1)).max() < 1e-5


def test_images_are_mirrored_at_their_border_pixels():
    row = torch.tensor([1.0, 2.0, 3.0]).view(1, 1, 1, 3)
    assert pad(row, (0, 0), (5, 3), "reflect").flatten().tolist() == [2, 1, 2, 3, 2, 1, 2, 3, 2, 1, 2]
    assert pad(row[..., :1], (1, 0), (2, 1), "reflect").tolist() == [[[[1.0] * 4] * 2]]
    assert pad(row, (0, 0), (-1, 1), "reflect").flatten().tolist() == [2, 3, 2]


@pytest.mark.parametrize("stride", (1, 2, 4, 8))
@pytest.mark.parametrize("patch_size", PATCH_SIZES)
def test_stride_and_offset_choose_pixels_of_the_whole(patch_size, stride):
    torch.manual_seed(0)
    net = AnomalyNet(patch_size)
    x = images(1, 3, 37, 30)
    with torch.no_grad():
        whole = FDFEAnomalyNet(net)(x)
        for offset in ((0, 0), (stride - 1, stride // 2)):
            found = FDFEAnomalyNet(net, stride)(x, offset)
            expected = whole[:, :, offset[0] :: stride, offset[1] :: stride]
            assert found.shape == expected.shape
            assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("stride", (1, 4))
@pytest.mark.parametrize("patch_size", PATCH_SIZES)
def test_gradients_equal_those_through_every_patch(patch_size, stride):
    torch.manual_seed(1)
    net = AnomalyNet(patch_size)
    x = images(1, 3, 6, 5).requires_grad_()
    expected_output = ExtendedAnomalyNet(net)(x)[:, :, ::stride, ::stride]
    target = images(*expected_output.shape, seed=2)
    parameters = [x, *net.parameters()]
    expected = torch.autograd.grad((expected_output - target).square().sum(), parameters)
    found = torch.autograd.grad((FDFEAnomalyNet(net, stride)(x) - target).square().sum(), parameters)
    for f, e in zip(found, expected, strict=True):
        assert relative_error(f, e) < 1e-4


@pytest.mark.parametrize("dilation", (1, 3))
@pytest.mark.parametrize("stride", (1, 2))
def test_pooling_by_shifted_views_equals_pooling_by_the_library(dilation, stride):
    x = images(2, 4, 13, 12)
    placement = ((3, 2), (dilation, dilation), (stride, stride))
    assert torch.equal(FDFE.max_pool(x, *placement), FDFE.max_pool(x.clone().requires_grad_(), *placement))


SHARED, SHARED_PART = nn.ReLU(), nn.Sequential(nn.Conv2d(4, 4, 3), nn.LeakyReLU(0.1), nn.MaxPool2d(2))
OTHER_NETS = {
    "strided convolutions": (nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 5, 3, stride=3)), 9),
    "pooling by three, and its mean": (
        nn.Sequential(nn.Conv2d(3, 4, 2), nn.MaxPool2d(3), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(4, 6, 2)), 15,
    ),
    "dilation, groups, oblong kernels": (
        nn.Sequential(
            nn.Conv2d(3, 6, (3, 1), dilation=2, groups=3), nn.MaxPool2d((1, 5), stride=(1, 2)),
            nn.BatchNorm2d(6), nn.Conv2d(6, 4, (7, 4)), nn.Flatten(),
        ), 11,
    ),
    "overlapping pooling": (nn.Sequential(nn.MaxPool2d(3, stride=2), nn.Conv2d(3, 4, 2), nn.AvgPool2d(3, stride=2)), 9),
    "layers that are used twice": (
        nn.Sequential(nn.Conv2d(3, 4, 2), SHARED, SHARED_PART, nn.Conv2d(4, 4, 1), SHARED, SHARED_PART), 11,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_NETS)
@pytest.mark.parametrize("stride", (1, 2, 3, 4, 6))
def test_any_net_of_convolutions_pooling_and_pointwise_layers(name, stride):
    net, patch_size = OTHER_NETS[name]
    net.eval()
    x = images(2, 3, 14, 11)
    with torch.no_grad():
        expected = ExtendedAnomalyNet(nn.Sequential(net, nn.Flatten()), patch_size)(x)[:, :, ::stride, ::stride]
        found = FDFEAnomalyNet(net, stride, patch_size)(x)
    assert relative_error(found, expected) < 1e-5


class Skip(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


@pytest.mark.parametrize(
    "net",
    (
        Skip(nn.Conv2d(3, 3, 1)),
        nn.Conv2d(3, 4, 3, padding=1),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.AdaptiveAvgPool2d(1),
        nn.InstanceNorm2d(3),
    ),
)
def test_a_net_that_can_not_be_made_dense_is_refused(net):
    with pytest.raises(ValueError, match="can't be made dense"):
        FDFEAnomalyNet(nn.Sequential(net), patch_size=3)


def test_a_patch_size_that_does_not_fit_the_net_is_refused():
    with pytest.raises(ValueError, match="leaves 2 x 2"):
        FDFEAnomalyNet(nn.Sequential(nn.Conv2d(3, 4, 3)), patch_size=4)


def test_normalised_descriptors_have_mean_and_std_removed():
    net = AnomalyNet(17)
    patches = images(4, 3, 17, 17)
    mean, std = torch.randn(512), torch.rand(512) + 0.1
    with torch.no_grad():
        expected = (net(patches) - mean) / std
        assert relative_error(net.with_normalised_descriptors(mean, std)(patches), expected) < 1e-5
