"""What the commands ask for alike: options, their values, folders."""

from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence

from student_teacher.runtime import device
from student_teacher.runtime.errors import UserError
from student_teacher.runtime.paths import add_folders, category_name


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
    """An option's value: a whole number from 0 that generators take."""
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


def parser(description: str, folders: tuple[str, ...] = ("data", "model"), computes: bool = True) -> ArgumentParser:
    """A parser with the options of every stage; of a script that runs no networks unless it `computes`."""
    options = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    options.add_argument(
        "category", type=category_name, help="name of a folder in data/, made ready by ./mvtec_dataset.sh CATEGORY"
    )
    if computes:
        options.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1 ...")
        options.add_argument(
            "--precision",
            choices=device.PRECISIONS,
            default="auto",
            help="auto takes bfloat16 where the hardware computes it faster; float32 where figures shall not hang on "
            "that",
        )
    add_folders(options, *folders)
    return options


def add_image_size(
    options: ArgumentParser,
    default: Sequence[int | None] | None = (256,),
    advice: str = "smaller is faster and misses small defects",
    otherwise: str = "as in training",
) -> None:
    """Add --image-size; `image_size` reads it. `otherwise` says what holds where there is no default."""
    shown = otherwise if default is None else "native" if default[0] is None else default[0]
    options.add_argument(
        "--image-size",
        type=side,
        nargs="+",
        default=default and list(default),
        metavar="PIXELS",
        help="side of the square that images are resized to, or height and width, or native: as they are; "
        f"{advice} (default {shown})",
    )


def image_size(args: Namespace) -> tuple[int, int] | None:
    """Height and width that --image-size asks for, None for native."""
    sides = args.image_size
    if len(sides) > 2 or (len(sides) == 2 and None in sides):
        raise UserError("--image-size takes one number, or height and width, or native alone")
    return None if sides == [None] else (sides[0], sides[-1])


def sides(args: Namespace) -> list[int | None]:
    """What --image-size asks for, as models are told apart by it: 256 256 is 256."""
    return list(dict.fromkeys(args.image_size))


def add_training(options: ArgumentParser, batch_size: int | str, learning_rate: float | str) -> None:
    """Add the options of every training. A text in place of a default says what it hangs on; the value is None then."""
    options.add_argument("--seed", type=seed, default=0, help="same seed, same machine: same numbers (default 0)")
    options.add_argument(
        "--batch-size",
        type=positive,
        default=None if isinstance(batch_size, str) else batch_size,
        help=f"lower this if memory runs out (default {batch_size})",
    )
    options.add_argument(
        "--learning-rate",
        type=positive_real,
        default=None if isinstance(learning_rate, str) else learning_rate,
        metavar="X",
        help=f"its peak, after a warm-up; lower this if the loss rises or is not a number (default {learning_rate})",
    )
    options.add_argument(
        "--restart", action="store_true", help="remove what was trained before, or half of it, and train anew"
    )


def add_stride(options: ArgumentParser, default: int | None, **stored: int | None) -> None:
    """Add --stride; `stored` None: where it is not given, None stands for the default."""
    note = "as the students were trained" if default is None else default
    options.add_argument(
        "--stride",
        type=int,
        choices=(1, 2, 4, 8),
        default=stored.get("stored", default),
        help="every STRIDE-th pixel along each side is described: with patches of 65 pixels 4 costs a tenth of 1, the "
        f"paper's (default {note})",
    )
