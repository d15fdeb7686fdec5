"""Work done ahead of time by threads, so that the device doesn't wait for loading."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from os import cpu_count
from typing import TypeVar

Item, Result = TypeVar("Item"), TypeVar("Result")


def prefetched(function: Callable[[Item], Result], items: Iterable[Item], finish: bool = False) -> Iterator[Result]:
    """function(item) for each item, in order, a few computed ahead. An exception is raised at its item's turn.

    If the caller stops early, pending calls are cancelled, or completed first with `finish`.
    """
    threads = cpu_count() or 1
    pool = ThreadPoolExecutor(threads)
    waiting: deque = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=not finish)
