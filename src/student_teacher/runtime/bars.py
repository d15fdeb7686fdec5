"""Progress bars."""

from collections.abc import Iterable

from tqdm import tqdm


def with_bar(iterable: Iterable, total: int, description: str) -> Iterable:
    """The iterable, behind a progress bar that goes when it is done."""
    return tqdm(iterable, total=total, desc=description, unit=" images", leave=False, dynamic_ncols=True)
