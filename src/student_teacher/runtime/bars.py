"""Progress bars."""

from collections.abc import Iterable

from tqdm import tqdm


def with_bar(iterable: Iterable, total: int, description: str) -> Iterable:
    """The iterable with a progress bar, which disappears at the end."""
    return tqdm(iterable, total=total, desc=description, unit=" images", leave=False, dynamic_ncols=True)
