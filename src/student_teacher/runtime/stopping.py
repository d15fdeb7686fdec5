"""Ctrl-C and SIGTERM, kept until a moment that suits."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from student_teacher.runtime import distributed


@contextmanager
def stops_later() -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether to stop: True once Ctrl-C or SIGTERM has come.

    A KeyboardInterrupt may be raised where Python ignores exceptions, such as in a destructor, and is lost then; this
    can't be. A second Ctrl-C stops at once, by KeyboardInterrupt.
    """
    asked: list[int] = []

    def stop(number, _):
        if asked and not distributed.active():  # torchrun always sends two signals
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
