"""Write a category's detector as one ONNX file, which runs without PyTorch and without Python.

From pixels to anomaly maps and image scores, in float32, several images at once. With patch students, images may have
any size, and the whole image is computed at once: unlike anomaly_detection.py, memory grows with its size.
examples/inspect_folder.py shows inputs and outputs, and how a score becomes a decision.

Needs one more package: pip install -r requirements-onnx.txt
"""

from argparse import Namespace
from pathlib import Path

from student_teacher.detection.Detector import load_detector
from student_teacher.runtime import command_line
from student_teacher.runtime.errors import UserError, run
from student_teacher.runtime.files import write_atomically


def parse_arguments(arguments: list[str] | None = None) -> Namespace:
    """Read the command line."""
    options = command_line.parser(__doc__, folders=("model",), computes=False)
    command_line.add_stride(options, default=None)
    options.add_argument("--output", type=Path, metavar="FILE", help="default: model/CATEGORY/detector.onnx")
    return options.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Read the detector, write the model."""
    args = parse_arguments(arguments)
    try:
        from student_teacher.detection import onnx_graph
    except ModuleNotFoundError as error:
        if error.name != "onnx":
            raise
        raise UserError("ONNX needs one more package: pip install -r requirements-onnx.txt") from None
    folder = args.model / args.category
    detector = load_detector(folder / "detector.pt", stride=args.stride, device_name="cpu")
    content = onnx_graph.model_of(detector).SerializeToString()
    output = args.output or folder / "detector.onnx"
    write_atomically(output, content)
    print(f"{output}: {len(content) / 2**20:.0f} MiB")


if __name__ == "__main__":
    run(main)
