"""A calibrated detector as one ONNX graph, in float32: anomaly maps and image scores.

Written node by node from the same layers and placements, not traced: with patch students, sizes are computed in the
graph, so that it takes images of any size. Each function here names the one whose result it reproduces.
"""

import json

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from FDFE import pair
from FDFEAnomalyNet import FDFEAnomalyNet
from student_teacher.detection import scoring
from student_teacher.detection.AnomalyDetector import AnomalyDetector, Scale
from student_teacher.detection.BackboneDetector import (
    GLOBAL,
    LOCAL,
    MAP,
    SCORE,
    SCORE_WEIGHT,
    BackboneDetector,
    counts,
)
from student_teacher.detection.Detector import Detector
from student_teacher.images import preprocessing
from student_teacher.images.ignored import PAINT
from student_teacher.students.GlobalStudent import GlobalStudent
from student_teacher.students.LocalStudent import REACH, neighbourhoods
from student_teacher.teachers.backbones import Lite0
from student_teacher.teachers.BackboneTeacher import pooling_of

OPSET = 18  # the first whose Resize, Pad and reductions take axes
ROWS, COLUMNS = 2, 3  # axes of (N,C,H,W)


class _Graph:
    """Nodes in the order of the calls, and the constants among their inputs."""

    def __init__(self):
        self.nodes, self._constants = [], {}

    def __call__(self, operator: str, *inputs, output: str | None = None, **attributes) -> str:
        """Add a node and return its output's name. Inputs are names, or numbers and arrays (integers are int64)."""
        names = [value if isinstance(value, str) else self._constant(value) for value in inputs]
        output = output or f"{operator}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, names, [output], name=output, **attributes))
        return output

    @property
    def constants(self) -> list[onnx.TensorProto]:
        """The constants among the nodes' inputs."""
        return list(self._constants.values())

    def _constant(self, value):
        array = np.asarray(value)
        key = array.dtype, array.shape, array.tobytes()  # the backbone's weights are used twice, and kept once
        if key not in self._constants:
            self._constants[key] = numpy_helper.from_array(array, f"constant_{len(self._constants)}")
        return self._constants[key].name


def model_of(detector: Detector) -> onnx.ModelProto:
    """The detector from pixels to scores, with its weights.

    Input: "images", uint8 (batch,3,height,width), RGB, already at the networks' size. Outputs: "maps", float32
    (batch,rows,columns), over the whole image, and "scores", float32 (batch,): the detector's own image score. The
    batch size is free; with patch students so are height and width, and maps have a value for each pixel. The metadata
    are JSON: `image_size` to resize to (height and width, null for none), `value_range`, the values that become black
    and white in images of more than 8 bits (null: 0 to 65535), `calibration_scores`, for p-values as in
    Calibration.p_value, and `threshold`, the score that --save-threshold has kept (null: none). Raises
    ValueError for a detector without calibration, or a backbone other than EfficientNet-Lite0.
    """
    networks, calibration = detector.networks, detector.calibration
    if calibration is None:
        raise ValueError("the detector has no calibration: load it with the settings of its training to write ONNX")
    graph = _Graph()
    images = _painted(graph, detector.painted)
    if isinstance(networks, BackboneDetector):
        maps, scored = _backbone_maps(graph, networks, images)
        size, map_size = networks.teacher.size, ("rows", "columns")
    else:
        maps = scored = _patch_maps(graph, networks, images)
        size = map_size = ("height", "width")
    seen = None if detector.painted is None else _mask_at(graph, ~detector.painted, _size(graph, maps))
    graph("Squeeze", maps if seen is None else _lowered(graph, maps, seen), [1], output="maps")
    _image_scores(graph, scored, detector.image_score, seen)
    content = helper.make_graph(
        graph.nodes,
        "detector",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 3, *size])],
        [
            helper.make_tensor_value_info("maps", TensorProto.FLOAT, ["batch", *map_size]),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch"]),
        ],
        graph.constants,
    )
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(content, opset_imports=opsets, ir_version=helper.find_min_ir_version_for(opsets))
    metadata = {
        "image_size": detector.size,
        "calibration_scores": calibration.scores(detector.image_score).tolist(),
        "value_range": detector.value_range,
        "threshold": detector.saved_threshold and detector.saved_threshold.score,
    }
    helper.set_model_props(model, {name: json.dumps(value) for name, value in metadata.items()})
    onnx.checker.check_model(model, full_check=True)
    return model


def _mask_at(graph, mask, size):
    """ignored.at, as float32 (1,1,H,W)."""
    return graph(
        "Resize",
        mask[None, None].astype(np.float32),
        "",
        "",
        size,
        mode="nearest",
        nearest_mode="round_prefer_ceil",
        axes=[ROWS, COLUMNS],
    )


def _painted(graph, mask):
    """ignored.painter, of the input."""
    if mask is None:
        return "images"
    covered = _mask_at(graph, mask, _size(graph, "images"))
    covered = graph("Cast", graph("MaxPool", covered, kernel_shape=[3, 3], pads=[1] * 4), to=TensorProto.BOOL)
    return graph("Where", covered, np.array(PAINT, dtype=np.uint8)[:, None, None], "images")


def _lowered(graph, maps, seen):
    """Detector.predict's map: the lowest of what is seen wherever it is not."""
    seen = graph("Cast", seen, to=TensorProto.BOOL)
    least = graph("ReduceMin", graph("Where", seen, maps, np.float32(np.inf)), [1, ROWS, COLUMNS])
    return graph("Where", seen, maps, least)


def _backbone_maps(graph, networks: BackboneDetector, images):
    """BackboneDetector.maps: anomaly map and scored map, (N,1,rows,columns) each."""
    maps = _levels(graph, networks.teacher, images)
    errors = {GLOBAL: [_global_error(graph, *both) for both in zip(networks.global_students, maps, strict=True)]}
    errors[LOCAL] = []
    expected = {GLOBAL: {}, LOCAL: []}
    for around, students in zip(neighbourhoods(networks.strides[GLOBAL]), networks.local_students, strict=True):
        found, logs = _local_errors(graph, around, students, maps)
        errors[LOCAL] += found
        expected[GLOBAL] |= zip(around.global_levels, logs, strict=False)
        expected[LOCAL] += logs[len(around.global_levels) :]
    found = []
    for use in (MAP, SCORE):
        means = _means(graph, networks, use, _standardised_errors(graph, networks, use, (errors, expected)))
        difference = graph("Sub", means[GLOBAL], means[LOCAL])
        weighted = graph("Mul", difference, _weights(graph, networks, use, expected))
        found.append(graph("Add", means[LOCAL], weighted))
    return found


def _standardised_errors(graph, networks, use, both):
    """BackboneDetector.standardised, of errors and expected errors."""
    found, (errors, expected) = {}, both
    for kind, strides in networks.strides.items():
        found[kind] = []
        for level, (by, stride) in enumerate(zip(networks.standardisations[use][kind], strides, strict=True)):
            score = errors[kind][level]
            if use == SCORE:
                score = graph("Sub", score, _resized(graph, expected[kind][level], networks.grid(stride)))
            mean, std = (value.numpy(force=True) for value in (by.mean, by.std))
            found[kind].append(graph("Div", graph("Sub", score, mean), std))
    return found


def _means(graph, networks, use, values):
    """BackboneDetector._means."""
    found = {}
    for kind, strides in networks.strides.items():
        levels = [values[kind][level] for level, stride in enumerate(strides) if counts(use, stride)]
        found[kind] = graph("Mean", *(_resized(graph, level, networks.grid(networks.stride)) for level in levels))
    return found


def _weights(graph, networks, use, expected):
    """BackboneDetector.weights."""
    if use == SCORE:
        return np.float32(SCORE_WEIGHT)
    means = _means(graph, networks, MAP, expected)
    ratio = graph("Div", means[GLOBAL], means[LOCAL])
    odds = graph("Mul", graph("Mul", ratio, ratio), np.float32(1 / networks.map_weight - 1))
    return graph("Div", np.float32(1), graph("Add", odds, np.float32(1)))


def _resized(graph, x, size):
    """Interpolated to rows and columns of `size`."""
    return graph("Resize", x, "", "", size, mode="linear", axes=[ROWS, COLUMNS])


def _channels(graph, x, first, last):
    """Channels from `first` up to, but without, `last`."""
    return graph("Slice", x, [first], [last], [1])


def _levels(graph, teacher, images):
    """BackboneTeacher.forward."""
    backbone = teacher.backbone
    if not isinstance(backbone, Lite0):
        raise ValueError("ONNX export supports one frozen backbone: EfficientNet-Lite0")
    pictures = _normalise(graph, images)
    features = [*_features(graph, backbone, pictures), _features(graph, backbone, _pooled(graph, pictures, 2))[-1]]
    maps = []
    for normalisation, level, factor in zip(teacher.normalisations, features, pooling_of(backbone), strict=True):
        level = _pooled(graph, graph("AveragePool", level, kernel_shape=[3, 3], pads=[1] * 4), factor)
        mean, std = (value.numpy(force=True) for value in (normalisation.mean, normalisation.std))
        maps.append(graph("Div", graph("Sub", level, mean), std))
    return maps


def _features(graph, backbone: Lite0, pictures):
    """Lite0.levels."""
    factor, shift = (value.numpy(force=True) for value in (backbone.factor, backbone.shift))
    x = graph("Add", graph("Mul", pictures, factor), shift)
    x = _layers(graph, backbone.net.stem, x)
    found = []
    for stage in backbone.net.stages:
        for block in stage:
            inner = _layers(graph, block.layers, x)
            x = graph("Add", x, inner) if block.residual else inner
        found.append(x)
    return found[1:]


def _layers(graph, layers, x):
    """Convolutions and activations, one after another."""
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            before, more = layer.padding[0], getattr(layer, "missing", 0)
            weights = (values.numpy(force=True) for values in (layer.weight, layer.bias))
            pads = [before, before, before + more, before + more]
            x = graph("Conv", x, *weights, strides=layer.stride, pads=pads, group=layer.groups)
        elif isinstance(layer, nn.ReLU6):
            x = graph("Clip", x, np.float32(0), np.float32(6))
        elif isinstance(layer, nn.LeakyReLU):
            x = graph("LeakyRelu", x, alpha=layer.negative_slope)
        else:
            raise ValueError(f"{layer} is not written as ONNX")
    return x


def _pooled(graph, x, factor):
    """Averaged over squares of `factor` x `factor` places."""
    return x if factor == 1 else graph("AveragePool", x, kernel_shape=[factor] * 2, strides=[factor] * 2)


def _global_error(graph, student: GlobalStudent, maps):
    """The root of GlobalStudent.forward, (N,1,h,w)."""
    centred = graph("Flatten", graph("Sub", maps, student.mean.numpy(force=True)))
    codes, scales = student.codes.numpy(force=True), student.scales.numpy(force=True)
    basis = graph("Mul", graph("Cast", codes, to=TensorProto.FLOAT), scales[:, None])
    predicted = graph("MatMul", graph("MatMul", centred, graph("Transpose", basis)), basis)
    residual = graph("Reshape", graph("Sub", centred, predicted), [-1, *student.mean.shape])
    return graph("Sqrt", graph("ReduceSumSquare", residual, [1]))


def _local_errors(graph, around, students, maps):
    """The students' errors together at these levels, and expected ones at the global levels and at these: (N,1,h,w)."""
    stacked = graph("Concat", *(maps[level] for level in around.levels), axis=1)
    padded = graph("Pad", stacked, [REACH] * 4, "", [ROWS, COLUMNS], mode="reflect")
    channels, found, logs = students[0].channels, [], []
    for student in students:
        predicted, first = _layers(graph, student.layers, padded), sum(channels)
        difference = graph("Sub", _channels(graph, predicted, 0, first), stacked)
        ends = np.cumsum(channels).tolist()
        levels = (_channels(graph, difference, *part) for part in zip([0, *ends], ends, strict=False))
        found.append([graph("ReduceSumSquare", level, [1]) for level in levels])
        expects = graph("Exp", _channels(graph, predicted, first, student.layers[-1].out_channels))
        places = range(student.layers[-1].out_channels - first)
        logs.append([_channels(graph, expects, place, place + 1) for place in places])
    squared, expected = ([graph("Mean", *level) for level in zip(*parts, strict=True)] for parts in (found, logs))
    return [graph("Sqrt", level) for level in squared], expected


def _patch_maps(graph, networks: AnomalyDetector, images):
    """AnomalyDetector.maps, (N,1,H,W)."""
    pixels, size = _normalise(graph, images), _size(graph, images)
    maps = []
    for scale in networks.scales:
        scores = _scale_scores(graph, scale, networks, pixels)
        maps.append(_at_every_pixel(graph, scores, networks.stride, size))
    return graph("Mean", *maps)


def _scale_scores(graph, scale: Scale, networks: AnomalyDetector, pixels):
    """One scale's scoring.error_and_variance and Scale.combine, (N,1,h,w)."""
    teacher, students = scale.dense(networks.stride)
    padded = _pad(graph, pixels, teacher)
    target = _describe_padded(graph, teacher, padded)
    described = [_describe_padded(graph, student, padded) for student in students]
    if networks.normalisation == "place":
        both = graph("Mean", *(_squared_distance(graph, descriptors, target) for descriptors in described))
        return _standardised_by_place(graph, both, scale.place_mean, scale.place_std)
    mean = graph("Mean", *described)
    error = _squared_distance(graph, mean, target)
    variance = graph("Mean", *(_squared_distance(graph, descriptors, mean) for descriptors in described))
    return graph(
        "Add",
        _standardised(graph, error, scale.error_mean, scale.error_std),
        _standardised(graph, variance, scale.variance_mean, scale.variance_std),
    )


def _squared_distance(graph, a, b):
    """scoring.squared_norm of a difference, (N,1,h,w)."""
    return graph("ReduceSumSquare", graph("Sub", a, b), [1])


def _standardised(graph, values, mean, std):
    mean, std = (value.float().numpy(force=True) for value in (mean, std))
    return graph("Div", graph("Sub", values, mean), std)


def _normalise(graph, images):
    """preprocessing.normalise."""
    pixels = graph("Cast", images, to=TensorProto.FLOAT)
    mean, std = (
        np.float32(values).reshape(3, 1, 1) for values in (preprocessing.IMAGENET_MEAN, preprocessing.IMAGENET_STD)
    )
    return graph("Div", graph("Sub", graph("Div", pixels, np.float32(255)), mean), std)


def _standardised_by_place(graph, scores, mean, std):
    """score_statistics.standardise, of (N,1,h,w)."""
    mean, std = (
        graph(
            "Resize",
            values[None, None].numpy(force=True),
            "",
            "",
            _size(graph, scores),
            mode="linear",
            axes=[ROWS, COLUMNS],
        )
        for values in (mean, std)
    )
    return graph("Div", graph("Sub", scores, mean), std)


def _size(graph, x):
    """Height and width of (N,C,H,W)."""
    return graph("Shape", x, start=ROWS, end=COLUMNS + 1)


def _pad(graph, x, net: FDFEAnomalyNet):
    """FDFEAnomalyNet.pad: zeros, or the image mirrored as often as needed."""
    if net.padding == "zeros":
        (above, below), (left, right) = net.margins()
        return graph("Pad", x, [above, left, below, right], "", [ROWS, COLUMNS])
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


def _image_scores(graph, maps, image_score, seen):
    """scoring.image_scores; `seen` (1,1,H,W) is None where all of a map counts."""
    pixels = graph("Flatten", maps)
    if seen is not None:
        counted = graph("Cast", graph("Reshape", seen, [-1]), to=TensorProto.BOOL)
        pixels = graph("Compress", pixels, counted, axis=1)
    if image_score == scoring.SMOOTH:
        temperature = np.float32(scoring.TEMPERATURE)
        number = graph("Cast", graph("Shape", pixels, start=1), to=TensorProto.FLOAT)
        total = graph("ReduceLogSumExp", graph("Div", pixels, temperature), [1], keepdims=0)
        graph("Mul", graph("Sub", total, graph("Log", number)), temperature, output="scores")
        return
    if image_score == scoring.TOP:
        pixels = _top_values(graph, pixels, _rounded_fraction(graph, pixels, scoring.TOP_FRACTION))
    graph("ReduceMax" if image_score == scoring.MAXIMUM else "ReduceMean", pixels, [1], keepdims=0, output="scores")


def _rounded_fraction(graph, values, fraction):
    """The number of elements in a `fraction` of a row of (N,n), at least 1."""
    number = graph("Cast", graph("Shape", values, start=1), to=TensorProto.DOUBLE)
    return graph("Max", graph("Cast", graph("Round", graph("Mul", number, fraction)), to=TensorProto.INT64), 1)


def _top_values(graph, values, number):
    """The `number` largest of each row of (N,n), in any order."""
    top = f"{values}_top"
    graph.nodes.append(helper.make_node("TopK", [values, number], [top, f"{top}_places"], name=top, sorted=0))
    return top
