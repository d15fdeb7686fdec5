"""Options that the commands share, and the parsing of their values."""

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


def parser(description: str, folders: tuple[str, ...] = ("data", "model"), computes: bool = True) -> ArgumentParser:
    """A parser with the options of every stage; those for device and precision only if the command `computes`."""
    options = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    options.add_argument(
        "category", type=category_name, help="name of a folder in data/, prepared by ./mvtec_dataset.sh CATEGORY"
    )
    if computes:
        options.add_argument("--device", default="auto", help="auto (a GPU if available), cpu, cuda, cuda:1 ...")
        options.add_argument(
            "--precision",
            choices=device.PRECISIONS,
            default="auto",
            help="auto takes bfloat16 if the hardware computes it faster; choose float32 for results that don't depend "
            "on the hardware",
        )
    add_folders(options, *folders)
    return options


def add_image_size(
    options: ArgumentParser,
    default: Sequence[int | None] | None = (256,),
    advice: str = "smaller is faster and misses small defects",
    otherwise: str = "as in training",
) -> None:
    """Add --image-size, which `image_size` reads. `otherwise` is the text for the help if there is no default."""
    shown = otherwise if default is None else "native" if default[0] is None else default[0]
    options.add_argument(
        "--image-size",
        type=side,
        nargs="+",
        default=default and list(default),
        metavar="PIXELS",
        help="images are resized to a square of this side, or to this height and width; native keeps their size; "
        f"{advice} (default {shown})",
    )


def image_size(args: Namespace) -> tuple[int, int] | None:
    """Height and width that --image-size asks for, None for native."""
    sides = args.image_size
    if len(sides) > 2 or (len(sides) == 2 and None in sides):
        raise UserError("--image-size takes one number, or height and width, or the word native")
    return None if sides == [None] else (sides[0], sides[-1])


def sides(args: Namespace) -> list[int | None]:
    """The value of --image-size as models store it in their settings: 256 256 becomes 256."""
    return list(dict.fromkeys(args.image_size))


def add_training(options: ArgumentParser, batch_size: int | str, learning_rate: float | str) -> None:
    """Add the options of every training. Defaults given as text depend on other options; their value is None."""
    options.add_argument(
        "--seed", type=seed, default=0, help="the same seed gives the same results on the same machine (default 0)"
    )
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
        help=f"peak after the warm-up; lower this if the loss rises or is not a number (default {learning_rate})",
    )
    options.add_argument(
        "--restart", action="store_true", help="remove what was trained before, finished or not, and train again"
    )


def add_stride(options: ArgumentParser, default: int | None, **stored: int | None) -> None:
    """Add --stride. With stored=None the value is None if the option is not given."""
    note = "as the students were trained" if default is None else default
    options.add_argument(
        "--stride",
        type=int,
        choices=(1, 2, 4, 8),
        default=stored.get("stored", default),
        help="describe every STRIDE-th pixel along each side; the paper takes 1; with patches of 65 pixels 4 costs a "
        f"tenth of that (default {note})",
    )
