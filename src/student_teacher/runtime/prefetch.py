"""Work done ahead of time by threads, so that the device doesn't wait for loading."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from threading import RLock
from typing import Any, TypeVar

from PIL import Image

LARGE = 50_000_000  # pixels
BUDGET = 2**30  # bytes in flight: with many processors, large images would fill the memory
Item, Result = TypeVar("Item"), TypeVar("Result")


_large = RLock()


def alone(pixels: int) -> AbstractContextManager:
    """Keeps other threads' large images waiting while one of more than LARGE pixels is decoded or its map written."""
    return _large if pixels > LARGE else nullcontext()


def processors() -> int:
    """How many processors this process may run on: where it is bound to some, fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def prefetched(function: Callable[[Item], Result], items: Iterable[Item], finish: bool = False) -> Iterator[Result]:
    """function(item) for each item, in order, a few computed ahead. An exception is raised at its item's turn.

    Twice as many as there are processors, or fewer: as many as fit into BUDGET if all are as large as the largest one
    so far, item and result together. If the caller stops early, pending calls are cancelled, or completed first with
    `finish`.
    """
    threads = processors()
    pool = ThreadPoolExecutor(threads)
    waiting: deque = deque()
    ahead, largest = 1, 1  # the first one shows how large they are

    def measured(item):
        result = function(item)
        return result, size_of(item) + size_of(result)

    try:
        for item in items:
            waiting.append(pool.submit(measured, item))
            while len(waiting) > ahead:
                result, size = waiting.popleft().result()
                largest = max(largest, size)
                ahead = max(1, min(2 * threads, BUDGET // largest))
                yield result
        while waiting:
            yield waiting.popleft().result()[0]
    finally:
        pool.shutdown(cancel_futures=not finish)


def size_of(value: Any) -> int:
    """About how many bytes the pixels and numbers take in a picture, an array, a tensor, or a collection of them."""
    if isinstance(value, Image.Image):
        return value.width * value.height * len(value.getbands())
    if isinstance(value, dict):
        return sum(map(size_of, value.values()))
    if isinstance(value, tuple | list):
        return sum(map(size_of, value))
    return getattr(value, "nbytes", 0)
