"""Fast dense feature extraction: the operations that make a patch network dense.

Bailer, Habtegebrial, Varanasi, Stricker, "Fast Dense Feature Extraction with CNNs that have Pooling or Striding
Layers" (BMVC 2017, arXiv 1805.03096) visit every pixel once where a sliding window would visit it for each patch.
They gather the shifted outputs of each pooling layer in the batch ("multi-pooling") and unwarp them at the end.
Here the same outputs stay where they belong in the image, and the layers behind reach over them with dilation
("a trous"): the same numbers, no size to be a multiple of anything, nothing to unwarp.

A layer whose outputs are wanted at every `stride`-th pixel alone asks less of the layers before it. `grids` works
out, from the last layer to the first, at which pixels each layer must be computed.
"""

from functools import lru_cache
from math import gcd
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

POINTWISE = (
    nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.ReLU6, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish,
    nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Identity, nn.Dropout, nn.BatchNorm2d,
)  # fmt: skip
PADDINGS = ("zeros", "reflect")
PADDING = "reflect"  # a mirrored border looks as the image does; the paper's zeros would be strange to every net
Pair = tuple[int, int]


class Window(NamedTuple):
    """How a layer looks at its input along height and width, in the steps of its own input."""

    kernel: Pair
    stride: Pair
    dilation: Pair


class Placement(NamedTuple):
    """How a layer of a patch network is applied to a whole image: its dilation and stride along (height, width)."""

    dilation: Pair
    stride: Pair


def pair(value: int | tuple[int, ...]) -> Pair:
    """(v, v) for a number v; a pair as it is."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def flat_layers(net: nn.Module) -> list[nn.Module]:
    """The layers of nested nn.Sequential in order, without a last nn.Flatten.

    Raises ValueError where a layer's result on a patch depends on more than the window it looks at: padding,
    rounding up, adaptive pooling, normalisation over the patch.
    """
    layers = [layer for layer in net.modules() if not isinstance(layer, nn.Sequential)]
    if layers and isinstance(layers[-1], nn.Flatten):
        layers.pop()
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            good = layer.padding == "valid" or pair(layer.padding) == (0, 0)
        elif isinstance(layer, nn.MaxPool2d):
            good = pair(layer.padding) == (0, 0) and not layer.ceil_mode and not layer.return_indices
        elif isinstance(layer, nn.AvgPool2d):
            good = pair(layer.padding) == (0, 0) and not layer.ceil_mode
        else:
            good = isinstance(layer, POINTWISE)
        if not good:
            raise ValueError(f"{layer} can't be made dense: use unpadded convolution and pooling, and pointwise layers")
    return layers


def activations_after_pooling(layers: list[nn.Module]) -> list[nn.Module]:
    """The layers with each leaky ReLU moved behind the max pooling that follows it.

    It rises, so that the maximum is the same one: the same numbers, on a fourth of them where pooling strides by 2.
    """
    ordered = list(layers)
    for place in range(len(ordered) - 1):
        first, second = ordered[place : place + 2]
        if isinstance(first, nn.LeakyReLU) and first.negative_slope > 0 and isinstance(second, nn.MaxPool2d):
            ordered[place : place + 2] = second, first
    return ordered


def window(layer: nn.Module) -> Window:
    """The window of a convolution or pooling layer; a pointwise layer's is one pixel."""
    if isinstance(layer, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d):
        dilation = pair(getattr(layer, "dilation", 1))
        return Window(pair(layer.kernel_size), pair(layer.stride), dilation)
    return Window((1, 1), (1, 1), (1, 1))


def output_size(windows: list[Window], size: int, axis: int) -> int:
    """Length of the last layer's output along `axis` for an input of length `size` (0 where it is too short)."""
    for w in windows:
        size = max(0, (size - w.dilation[axis] * (w.kernel[axis] - 1) - 1) // w.stride[axis] + 1)
    return size


def receptive_field(windows: list[Window], axis: int) -> int:
    """Length in pixels along `axis` of what one output sees.

    It can be shorter than the patch: pooling drops the last row and column of an odd size.
    """
    field, jump = 1, 1
    for w in windows:
        field += jump * w.dilation[axis] * (w.kernel[axis] - 1)
        jump *= w.stride[axis]
    return field


def grids(windows: list[Window], stride: int, axis: int) -> tuple[int, list[tuple[int, int]]]:
    """Where to compute each layer so that the last one stands at every `stride`-th pixel along `axis`.

    Within a patch, neighbouring inputs of a layer lie `jump` pixels apart: the product of the strides before it.
    Outputs that are wanted every g pixels thus need inputs every gcd(g, jump) pixels, and no others.
    Returns the step at which to take the image's pixels, and (dilation, stride) for each layer.
    """
    jumps = [1]
    for w in windows:
        jumps.append(jumps[-1] * w.stride[axis])
    placements, grid = [], stride
    for w, jump in zip(reversed(windows), reversed(jumps[:-1]), strict=True):
        reach = jump * w.dilation[axis]
        before = grid if w.kernel[axis] == 1 else gcd(grid, reach)
        placements.append((reach // before if w.kernel[axis] > 1 else 1, grid // before))
        grid = before
    return grid, placements[::-1]


def max_pool(x: Tensor, kernel: Pair, dilation: Pair, stride: Pair) -> Tensor:
    """Max pooling with dilation, unpadded: (N,C,H,W) -> (N,C,H',W')."""
    if x.requires_grad:  # the gradient of torch.maximum costs ten times as much, and splits at equal values
        return F.max_pool2d(x, kernel, stride, 0, dilation)
    for axis in (1, 0):
        views = shifted(x, kernel[axis], dilation[axis], stride[axis], axis + 2)
        x = views[0]
        for view in views[1:]:
            x = torch.maximum(x, view)
    return x


def mean_pool(x: Tensor, kernel: Pair, dilation: Pair, stride: Pair) -> Tensor:
    """Mean pooling with dilation, unpadded: (N,C,H,W) -> (N,C,H',W')."""
    for axis in (1, 0):
        views = shifted(x, kernel[axis], dilation[axis], stride[axis], axis + 2)
        x = sum(views[1:], views[0]) / len(views)
    return x


def shifted(x: Tensor, kernel: int, dilation: int, stride: int, dim: int) -> list[Tensor]:
    """Views of `x`, one for each of the `kernel` places of a window moved along `dim`."""
    length = (x.shape[dim] - dilation * (kernel - 1) - 1) // stride + 1
    index = [slice(None)] * x.ndim
    views = []
    for k in range(kernel):
        start = k * dilation
        index[dim] = slice(start, start + (length - 1) * stride + 1, stride)
        views.append(x[tuple(index)])
    return views


def apply_layer(layer: nn.Module, x: Tensor, placement: Placement, overwrite: bool = False) -> Tensor:
    """One layer of a patch network on a whole image, with the dilation and stride that `grids` gave.

    `overwrite` allows to write the result over `x`, where nobody needs it again.
    """
    dilation, stride = placement
    if isinstance(layer, nn.Conv2d):
        if exact_on_gpu(x) and dilation != (1, 1) and stride == (1, 1):
            return convolve_phases(x, layer, dilation)
        return F.conv2d(x, layer.weight, layer.bias, stride, 0, dilation, layer.groups)
    if isinstance(layer, nn.MaxPool2d):
        return max_pool(x, pair(layer.kernel_size), dilation, stride)
    if isinstance(layer, nn.AvgPool2d):
        pooled = mean_pool(x, pair(layer.kernel_size), dilation, stride)
        if layer.divisor_override:
            height, width = pair(layer.kernel_size)
            pooled = pooled * (height * width / layer.divisor_override)
        return pooled
    if isinstance(layer, nn.LeakyReLU) and overwrite:
        return F.leaky_relu_(x, layer.negative_slope)
    return layer(x)


def exact_on_gpu(x: Tensor) -> bool:
    """Whether a GPU is to convolve float32 as it is: cuDNN does so quickly without dilation alone."""
    return x.is_cuda and not torch.is_autocast_enabled("cuda") and torch.backends.cudnn.conv.fp32_precision == "ieee"


def convolve_phases(x: Tensor, layer: nn.Conv2d, dilation: Pair) -> Tensor:
    """The layer with dilation (d,e) on (N,C,H,W), as d e convolutions without: one of every d-th row, e-th column.

    All of them go through the batch at once.
    """
    (rows, columns), (height, width) = dilation, x.shape[2:]
    x = F.pad(x, (0, -width % columns, 0, -height % rows))
    phases = x.unflatten(3, (-1, columns)).unflatten(2, (-1, rows)).permute(0, 3, 5, 1, 2, 4).flatten(0, 2)
    found = F.conv2d(phases, layer.weight, layer.bias, groups=layer.groups)
    found = found.unflatten(0, (-1, rows, columns)).permute(0, 3, 4, 1, 5, 2).flatten(4, 5).flatten(2, 3)
    kernel = pair(layer.kernel_size)
    return found[:, :, : height - rows * (kernel[0] - 1), : width - columns * (kernel[1] - 1)]


def pad(images: Tensor, rows: tuple[int, int], columns: tuple[int, int], padding: str) -> Tensor:
    """Surround images (N,C,H,W) by numbers of rows (above, below) and columns (left, right); negative ones are cut off.

    "zeros" are ImageNet's mean colour after normalisation. "reflect" mirrors the image at its border pixels, as often
    as it takes where it is smaller than what is to be added. The layout in memory stays. Raises ValueError for another.
    """
    if padding not in PADDINGS:
        raise ValueError(f"padding {padding}: choose one of {', '.join(PADDINGS)}")
    if padding == "zeros":
        return F.pad(images, (*columns, *rows))
    rows, columns = (
        _mirrored(length, *added, images.device)
        for length, added in zip(images.shape[2:], (rows, columns), strict=True)
    )
    layout = torch.contiguous_format if images.is_contiguous() else torch.channels_last
    return images.index_select(2, rows).index_select(3, columns).contiguous(memory_format=layout)


@lru_cache
def _mirrored(length, before, after, where):
    """Indices into `length` pixels, from -before up to length + after; kept, as images mostly are of one size."""
    with torch.inference_mode(False):
        period = max(1, 2 * (length - 1))
        places = torch.arange(-before, length + after, device=where) % period
        return torch.minimum(places, period - places) if length > 1 else places
