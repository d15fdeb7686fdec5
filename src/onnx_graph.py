"""A calibrated detector as one ONNX graph: what AnomalyDetector and Calibration compute, in float32.

Written node by node from the same layers and placements, not traced: sizes are computed in the graph, so that it holds
for images of every size. The graph's parts are named after the functions that they equal.
"""

import json

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from scales import PADDING, zoomed_stride
from torch import Tensor, nn

import preprocessing
import scoring
from AnomalyDetector import NORMALISATIONS, Scale
from Detector import Detector
from FDFE import pair
from FDFEAnomalyNet import FDFEAnomalyNet
from GlobalStudent import SURELY_GOOD

OPSET = 18  # the first whose Resize, Pad and reductions take axes
ROWS, COLUMNS = 2, 3  # axes of (N,C,H,W)


class _Graph:
    """Nodes in the order in which they are called for, and the constants among their inputs."""

    def __init__(self):
        self.nodes, self.constants = [], []

    def __call__(self, operator: str, *inputs, output: str | None = None, **attributes) -> str:
        """Add a node and return its output's name. Inputs are names, or numbers and arrays (integers are int64)."""
        names = [value if isinstance(value, str) else self._constant(value) for value in inputs]
        output = output or f"{operator}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, names, [output], name=output, **attributes))
        return output

    def bfloat16_constant(self, value: Tensor) -> str:
        """The name of a constant of bfloat16, which NumPy does not know."""
        name = f"constant_{len(self.constants)}"
        content = value.contiguous().view(torch.int16).numpy(force=True).tobytes()
        self.constants.append(helper.make_tensor(name, TensorProto.BFLOAT16, value.shape, content, raw=True))
        return name

    def _constant(self, value):
        array = np.asarray(value)
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(array, name))
        return name


def model_of(detector: Detector) -> onnx.ModelProto:
    """The detector from pixels to scores, with its weights.

    Input: "images", uint8 (batch,3,height,width), RGB at the size that the networks see. Outputs: "maps", float32
    (batch,height,width), and "scores", float32 (batch,), of the kind "top". All of these dimensions are free, from 1;
    the whole image is computed at once, without tiles. The metadata are JSON: `image_size` to resize to (height and
    width, null for none) and `held_back_scores`, of which p-values are made as in Calibration.p_value.
    Raises ValueError for a detector without calibration, or of another normalisation than the default.
    """
    networks, calibration = detector.networks, detector.calibration
    if calibration is None or networks.normalisation != NORMALISATIONS[0]:
        raise ValueError("only a detector as it was calibrated can be written as ONNX")
    graph = _Graph()
    pixels = _normalise(graph, "images")
    size = _size(graph, "images")
    found = [_scale_maps(graph, scale, networks.stride, pixels, size) for scale in networks.scales]
    maps, scored = zip(*found, strict=True)
    weighted = (graph("Mul", *pair) for pair in zip(maps, map(np.float32, networks.map_weights), strict=True))
    graph("Squeeze", graph("Sum", *weighted), [1], output="maps")
    _top(graph, graph("Mean", *scored))
    image_shape = ["batch", 3, "height", "width"]
    content = helper.make_graph(
        graph.nodes,
        "detector",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, image_shape)],
        [
            helper.make_tensor_value_info("maps", TensorProto.FLOAT, ["batch", "height", "width"]),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch"]),
        ],
        graph.constants,
    )
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(content, opset_imports=opsets, ir_version=helper.find_min_ir_version_for(opsets))
    metadata = {"image_size": detector.size, "held_back_scores": calibration.scores().tolist()}
    helper.set_model_props(model, {name: json.dumps(value) for name, value in metadata.items()})
    onnx.checker.check_model(model, full_check=True)
    return model


def _normalise(graph, images):
    """preprocessing.normalise."""
    pixels = graph("Cast", images, to=TensorProto.FLOAT)
    mean, deviation = (
        np.float32(values).reshape(3, 1, 1)
        for values in (preprocessing.IMAGENET_MEAN, preprocessing.IMAGENET_DEVIATION)
    )
    return graph("Div", graph("Sub", graph("Div", pixels, np.float32(255)), mean), deviation)


def _scale_maps(graph, scale: Scale, stride, pixels, size):
    """One scale's part of AnomalyDetector.find: what is mapped (N,1,H,W), and what is scored."""
    zoom = scale.zoom
    seen = _zoomed(graph, pixels, zoom)
    teacher, students = scale.dense(stride)
    padded = _pad(graph, seen, teacher)
    target = _describe_padded(graph, teacher, padded)
    distances = [
        graph("ReduceSumSquare", graph("Sub", _describe_padded(graph, student, padded), target), [1])
        for student in students
    ]
    distance = graph("Mean", *distances)  # error plus variance
    score = _by_place(graph, distance, scale.place_mean, scale.place_deviation)
    score = _at_every_pixel(graph, score, zoomed_stride(stride, zoom), _size(graph, seen))
    score = _enlarged(graph, score, zoom, size)
    if scale.global_student is None:
        return score, score
    share = scale.global_student.explained.numpy(force=True)
    of_patches = graph("Mul", score, 1 - share)
    whole, level = _global_scores(graph, scale, pixels, size)
    whole = graph("Mul", whole, share)
    levelled = graph("Div", whole, graph("Sqrt", graph("Add", level, np.float32(1))))
    return graph("Add", of_patches, levelled), graph("Add", of_patches, whole)


def _global_scores(graph, scale: Scale, pixels, size):
    """GlobalStudent.forward: scores (N,1,H,W) and levels (N,1,1,1)."""
    student, zoom = scale.global_student, scale.zoom
    describing = scale.dense_global()
    seen = _zoomed(graph, _resized(graph, pixels, student.size), zoom)
    descriptors = _describe_padded(graph, describing, _pad(graph, seen, describing))
    maps = graph("Flatten", graph("Sub", descriptors, student.mean.numpy(force=True)))
    basis = graph("Cast", graph.bfloat16_constant(student.basis), to=TensorProto.FLOAT)
    weights = graph("Mul", graph("MatMul", maps, graph("Transpose", basis)), student.shrinkage.numpy(force=True))
    residual = graph("Reshape", graph("Sub", maps, graph("MatMul", weights, basis)), [-1, *student.mean.shape])
    error = graph("ReduceSumSquare", residual, [1])
    score = _by_place(graph, error, student.place_mean, student.place_deviation)
    level = _level(graph, score)
    inner = [-(-length // zoom) for length in student.size]
    score = _enlarged(graph, _at_every_pixel(graph, score, describing.stride, inner), zoom, student.size)
    return graph("Resize", score, "", "", size, mode="linear", axes=[ROWS, COLUMNS]), level


def _level(graph, scores):
    """GlobalStudent.level of (N,1,h,w): (N,1,1,1)."""
    scores = graph("Flatten", scores)
    number = _rounded_share(graph, scores, SURELY_GOOD)
    least = _top_values(graph, scores, number, largest=0)
    level = graph("Relu", graph("ReduceMax", least, [1]))
    return graph("Unsqueeze", level, [ROWS, COLUMNS])


def _resized(graph, pixels, size):
    """Bilinear without aliasing, to a fixed size, as PyTorch does it: ONNX Runtime's own weighs otherwise."""
    rows, columns = (
        _triangles(graph, graph("Cast", graph("Shape", pixels, start=axis, end=axis + 1), to=TensorProto.FLOAT), length)
        for axis, length in zip((ROWS, COLUMNS), size, strict=True)
    )
    return graph("MatMul", graph("MatMul", rows, pixels), graph("Transpose", columns))


def _triangles(graph, length, wanted):
    """Weights (wanted,length) that resize an axis of `length`."""
    ratio = graph("Div", length, np.float32(wanted))
    centres = graph("Mul", np.arange(0.5, wanted, dtype=np.float32)[:, None], ratio)
    places = graph("Add", graph("Range", np.float32(0), graph("Squeeze", length), np.float32(1)), np.float32(0.5))
    distance = graph("Div", graph("Abs", graph("Sub", places, centres)), graph("Max", ratio, np.float32(1)))
    weights = graph("Relu", graph("Sub", np.float32(1), distance))
    return graph("Div", weights, graph("ReduceSum", weights, [1]))


def _zoomed(graph, pixels, zoom):
    """scales.zoomed."""
    if zoom == 1:
        return pixels
    return graph("AveragePool", pixels, kernel_shape=[zoom, zoom], strides=[zoom, zoom], ceil_mode=1)


def _enlarged(graph, scores, zoom, size):
    """scoring.enlarged, of (N,1,h,w)."""
    if zoom == 1:
        return scores
    enlarged = graph("Resize", scores, "", np.float32([zoom, zoom]), mode="linear", axes=[ROWS, COLUMNS])
    return graph("Slice", enlarged, [0, 0], size, [ROWS, COLUMNS])


def _by_place(graph, scores, *usual):
    """usual.by_place, of (N,1,h,w)."""
    mean, deviation = (
        graph(
            "Resize",
            values[None, None].numpy(force=True),
            "",
            "",
            _size(graph, scores),
            mode="linear",
            axes=[ROWS, COLUMNS],
        )
        for values in usual
    )
    return graph("Div", graph("Sub", scores, mean), deviation)


def _size(graph, x):
    """Height and width of (N,C,H,W)."""
    return graph("Shape", x, start=ROWS, end=COLUMNS + 1)


def _pad(graph, x, net: FDFEAnomalyNet):
    """FDFEAnomalyNet.pad: mirrored as often as it takes."""
    if net.padding != PADDING:
        raise ValueError(f"padding {net.padding} is not written as ONNX")
    for axis, (before, after) in zip((ROWS, COLUMNS), net.margins(), strict=True):
        length = graph("Squeeze", graph("Shape", x, start=axis, end=axis + 1))
        period = graph("Max", graph("Mul", graph("Sub", length, 1), 2), 1)
        places = graph("Mod", graph("Range", -before, graph("Add", length, after), 1), period)
        x = graph("Gather", x, graph("Min", places, graph("Sub", period, places)), axis=axis)
    return x


def _describe_padded(graph, net: FDFEAnomalyNet, x):
    """FDFEAnomalyNet.describe_padded."""
    if net.pixel_step != (1, 1):
        x = graph("Slice", x, [0, 0], [np.iinfo(np.int64).max] * 2, [ROWS, COLUMNS], net.pixel_step)
    for layer, (dilation, stride) in net.placed_layers:
        if isinstance(layer, nn.Conv2d):
            weights = (values.numpy(force=True) for values in (layer.weight, layer.bias))
            x = graph("Conv", x, *weights, dilations=dilation, strides=stride)
        elif isinstance(layer, nn.MaxPool2d):
            x = graph("MaxPool", x, kernel_shape=pair(layer.kernel_size), dilations=dilation, strides=stride)
        elif isinstance(layer, nn.LeakyReLU):
            x = graph("LeakyRelu", x, alpha=layer.negative_slope)
        else:
            raise ValueError(f"{layer} is not written as ONNX")
    return x


def _at_every_pixel(graph, scores, stride, size):
    """scoring.at_every_pixel, of (N,1,h,w)."""
    if stride == 1:
        return scores
    reached = graph("Add", graph("Mul", graph("Sub", _size(graph, scores), [1, 1]), [stride] * 2), [1, 1])
    between = graph(
        "Resize",
        scores,
        "",
        "",
        reached,
        mode="linear",
        axes=[ROWS, COLUMNS],
        coordinate_transformation_mode="align_corners",
    )
    behind = graph("Concat", [0, 0], graph("Sub", size, reached), axis=0)
    return graph("Pad", between, behind, "", [ROWS, COLUMNS], mode="edge")


def _top(graph, maps):
    """scoring.image_scores of the kind "top"."""
    pixels = graph("Flatten", maps)
    number = _rounded_share(graph, pixels, scoring.TOP_SHARE)
    graph("ReduceMean", _top_values(graph, pixels, number, largest=1), [1], keepdims=0, output="scores")


def _rounded_share(graph, values, share):
    """How many are a `share` of each row of (N,n), one at least."""
    number = graph("Cast", graph("Shape", values, start=1), to=TensorProto.DOUBLE)
    return graph("Max", graph("Cast", graph("Round", graph("Mul", number, share)), to=TensorProto.INT64), 1)


def _top_values(graph, values, number, largest):
    """The `number` largest or smallest of each row of (N,n), in any order."""
    top = f"{values}_top"
    graph.nodes.append(
        helper.make_node("TopK", [values, number], [top, f"{top}_places"], name=top, sorted=0, largest=largest)
    )
    return top
