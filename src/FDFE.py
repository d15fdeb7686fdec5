"""Fast dense feature extraction: the operations that make a patch network dense.

Bailer, Habtegebrial, Varanasi, Stricker, "Fast Dense Feature Extraction with CNNs that have Pooling or Striding
Layers" (BMVC 2017, arXiv 1805.03096) compute every pixel once where a sliding window would compute it for each patch.
They stack the shifted outputs of each pooling layer in the batch ("multi-pooling") and unwarp them at the end. Here the
same outputs stay in place in the image, and later layers skip over them with dilation ("a trous"). The result is the
same, but image sizes need not be multiples of anything, and there is nothing to unwarp.

If the last layer's outputs are needed only at every `stride`-th pixel, the layers before it have less to compute.
`grids` determines, from the last layer to the first, at which pixels each layer is needed.
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
PADDING = "reflect"  # a mirrored border looks like the image; the paper's zeros look anomalous to every net
Pair = tuple[int, int]


class Window(NamedTuple):
    """A layer's window along (height, width), in steps of its own input."""

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
    """The layers of nested nn.Sequential in order, without a final nn.Flatten; one that is used twice is there twice.

    Raises ValueError if a layer's output depends on more than its window: with padding, rounding up, adaptive pooling
    or normalisation over the patch.
    """
    layers = list(_in_order(net))  # not net.modules(), which gives each module once
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


def _in_order(net):
    if type(net).forward is nn.Sequential.forward:  # not of a subclass that does something else
        for part in net:
            yield from _in_order(part)
    else:
        yield net


def activations_after_pooling(layers: list[nn.Module]) -> list[nn.Module]:
    """The layers with each leaky ReLU moved behind the max pooling that follows it.

    It is monotonic, so the result is the same; with pooling of stride 2 it is computed for a quarter of the values.
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
    """Length of the last layer's output along `axis` for an input of length `size`; 0 if the input is too short."""
    for w in windows:
        size = max(0, (size - w.dilation[axis] * (w.kernel[axis] - 1) - 1) // w.stride[axis] + 1)
    return size


def receptive_field(windows: list[Window], axis: int) -> int:
    """The receptive field of one output along `axis`, in pixels.

    It can be smaller than the patch: pooling drops the last row and column of an odd size.
    """
    field, jump = 1, 1
    for w in windows:
        field += jump * w.dilation[axis] * (w.kernel[axis] - 1)
        jump *= w.stride[axis]
    return field


def grids(windows: list[Window], stride: int, axis: int) -> tuple[int, list[tuple[int, int]]]:
    """Where to compute each layer so that the last one is at every `stride`-th pixel along `axis`.

    Within a patch, neighbouring inputs of a layer are `jump` pixels apart: the product of the strides before it.
    Outputs at every g-th pixel need inputs at every gcd(g, jump)-th pixel, and no others.
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
    if x.requires_grad:  # the gradient of torch.maximum is ten times slower, and is split between equal values
        return F.max_pool2d(x, kernel, stride, 0, dilation)
    for axis in (1, 0):
        views = shifted(x, kernel[axis], dilation[axis], stride[axis], dim=axis + 2)
        x = views[0]
        for view in views[1:]:
            x = torch.maximum(x, view)
    return x


def mean_pool(x: Tensor, kernel: Pair, dilation: Pair, stride: Pair) -> Tensor:
    """Mean pooling with dilation, unpadded: (N,C,H,W) -> (N,C,H',W')."""
    for axis in (1, 0):
        views = shifted(x, kernel[axis], dilation[axis], stride[axis], dim=axis + 2)
        x = sum(views[1:], views[0]) / len(views)
    return x


def shifted(x: Tensor, kernel: int, dilation: int, stride: int, *, dim: int) -> list[Tensor]:
    """Views of `x`, one for each of the `kernel` positions in a window that moves along `dim`."""
    length = (x.shape[dim] - dilation * (kernel - 1) - 1) // stride + 1
    index = [slice(None)] * x.ndim
    views = []
    for k in range(kernel):
        start = k * dilation
        index[dim] = slice(start, start + (length - 1) * stride + 1, stride)
        views.append(x[tuple(index)])
    return views


def apply_layer(layer: nn.Module, x: Tensor, placement: Placement, overwrite: bool = False) -> Tensor:
    """One layer of a patch network on a whole image, with the dilation and stride from `grids`.

    `overwrite` allows the result to overwrite `x`.
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
    """Whether a GPU has to convolve in full float32: with dilation cuDNN is slow at that."""
    return x.is_cuda and not torch.is_autocast_enabled("cuda") and torch.backends.cudnn.conv.fp32_precision == "ieee"


def convolve_phases(x: Tensor, layer: nn.Conv2d, dilation: Pair) -> Tensor:
    """The layer with dilation (d,e) on (N,C,H,W), as d e convolutions without dilation, stacked in the batch.

    Each takes every d-th row and every e-th column.
    """
    (rows, columns), (height, width) = dilation, x.shape[2:]
    x = F.pad(x, (0, -width % columns, 0, -height % rows))
    phases = x.unflatten(3, (-1, columns)).unflatten(2, (-1, rows)).permute(0, 3, 5, 1, 2, 4).flatten(0, 2)
    found = F.conv2d(phases, layer.weight, layer.bias, groups=layer.groups)
    found = found.unflatten(0, (-1, rows, columns)).permute(0, 3, 4, 1, 5, 2).flatten(4, 5).flatten(2, 3)
    kernel = pair(layer.kernel_size)
    return found[:, :, : height - rows * (kernel[0] - 1), : width - columns * (kernel[1] - 1)]


def pad(images: Tensor, rows: tuple[int, int], columns: tuple[int, int], padding: str) -> Tensor:
    """Pad images (N,C,H,W) by numbers of rows (above, below) and columns (left, right); negative numbers crop.

    "zeros" are ImageNet's mean colour after normalisation. "reflect" mirrors the image at its border pixels, repeatedly
    if the image is smaller than the padding. The memory layout is kept. Raises ValueError for another `padding`.
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
    """Indices into `length` pixels, from -before up to length + after. Cached, as most images have the same size."""
    with torch.inference_mode(False):
        period = max(1, 2 * (length - 1))
        places = torch.arange(-before, length + after, device=where) % period
        return torch.minimum(places, period - places) if length > 1 else places
