"""Write a category's detector as one ONNX file, which runs without PyTorch and without Python.

From pixels to anomaly maps and image scores, in float32, several images at once. With patch students, images may have
any size, and the whole image is computed at once: unlike anomaly_detection.py, memory grows with its size.
examples/inspect_folder.py shows inputs and outputs, and how a score becomes a decision.

Needs one more package: pip install -r requirements-onnx.txt
"""

from dataclasses import dataclass
from pathlib import Path

from student_teacher.detection.Detector import load_detector
from student_teacher.runtime.errors import UserError, run
from student_teacher.runtime.files import write_atomically
from student_teacher.runtime.settings import Command, option, stride_option


@dataclass(frozen=True, kw_only=True)
class Settings(Command):
    """The options of the export."""

    stride: int | None = stride_option(None, "as the students were trained")
    output: Path | None = option(None, "(default model/CATEGORY/detector.onnx)", type=Path, metavar="FILE")


def main(arguments: list[str] | None = None) -> None:
    """Read the detector, write the model."""
    settings = Settings.parse(__doc__, arguments)
    try:
        from student_teacher.detection import onnx_graph
    except ModuleNotFoundError as error:
        if error.name != "onnx":
            raise
        raise UserError("ONNX needs one more package: pip install -r requirements-onnx.txt") from None
    detector = load_detector(settings.detector, stride=settings.stride, device_name="cpu")
    content = onnx_graph.model_of(detector).SerializeToString()
    output = settings.output or settings.detector.with_suffix(".onnx")
    write_atomically(output, content)
    print(f"{output}: {len(content) / 2**20:.0f} MiB")


if __name__ == "__main__":
    run(main)
