"""Student-teacher anomaly detection: the package behind the commands in src/. To use it from Python:

from student_teacher import load_detector

detector = load_detector("model/carpet/detector.pt")
print(detector("photograph.png").anomalous)
"""

__all__ = ["Detection", "Detector", "load_detector"]


def __getattr__(name: str) -> object:
    """Import the names of __all__ on first use: commands that don't need torch then start without it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from student_teacher.detection import Detector as module

    return getattr(module, name)
