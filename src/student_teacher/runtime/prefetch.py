"""Work done ahead by threads, so that loading never keeps the device waiting."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from os import cpu_count
from typing import TypeVar

Item, Result = TypeVar("Item"), TypeVar("Result")


def prefetched(function: Callable[[Item], Result], items: Iterable[Item], finish: bool = False) -> Iterator[Result]:
    """function(item) for each item, in order, a few computed ahead. An exception comes up at its item's turn.

    Where reading stops early, those computed ahead are dropped, unless they are to `finish`.
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
