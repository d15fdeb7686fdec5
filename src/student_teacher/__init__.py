"""Student-teacher anomaly detection: what the commands in src/ are made of, and the way in from Python.

from student_teacher import load_detector

detector = load_detector("model/carpet/detector.pt")
print(detector("photograph.png").anomalous)
"""

__all__ = ["Detection", "Detector", "load_detector"]


def __getattr__(name: str) -> object:
    """The names of __all__, imported when asked for: commands that need no torch start without it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from student_teacher.detection import Detector as module

    return getattr(module, name)
