"""The values of options: what is allowed, and what is said of others."""

from argparse import ArgumentTypeError


def positive(text: str) -> int:
    """An option's value: a whole number from 1."""
    return _number(int, text, lambda value: value >= 1, "a whole number from 1")


def positive_real(text: str) -> float:
    """An option's value: a number above 0."""
    return _number(float, text, lambda value: 0 < value < float("inf"), "a number above 0")


def fraction(text: str) -> float:
    """An option's value: a number between 0 and 1."""
    return _number(float, text, lambda value: 0 < value < 1, "a number between 0 and 1")


def not_negative(text: str) -> float:
    """An option's value: a number from 0."""
    return _number(float, text, lambda value: 0 <= value < float("inf"), "a number from 0")


def seed(text: str) -> int:
    """An option's value: a whole number from 0 that random generators accept."""
    return _number(int, text, lambda value: 0 <= value < 2**63, "a whole number from 0, below 2^63")


def side(text: str) -> int | None:
    """One of the values of --image-size: a number of pixels, or None for "native"."""
    if text == "native":
        return None
    return _number(int, text, lambda value: value >= 8, "a number of pixels from 8, or native")


def _number(kind, text, allowed, what):
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not allowed(value):
        raise ArgumentTypeError(f"{text}: must be {what}")
    return value
