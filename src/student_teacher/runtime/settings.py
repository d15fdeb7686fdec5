"""Settings of a command: a frozen dataclass whose fields become the options of its command line.

Each field states its default, and in the option's help why one would change it. What tells trained models apart comes
from the same fields.
"""

import dataclasses
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from student_teacher.runtime import command_line
from student_teacher.runtime.device import PRECISIONS, Compute, choose
from student_teacher.runtime.errors import UserError
from student_teacher.runtime.paths import ROOT, category_name


def option(default: Any, help: str, *, identity: bool = False, group: str | None = None, **argparse: Any) -> Any:
    """A field with an option; further arguments are those of argparse's add_argument.

    `name` is the option's name if it differs from the field's. The default is added to the help unless it is there
    already. With `identity` the value tells trained models apart. Options of the same `group` are listed together,
    under that title.
    """
    if "(default" not in help and isinstance(default, int | float | str) and not isinstance(default, bool):
        help += f" (default {default})"
    metadata = {"option": {"help": help, **argparse}, "identity": identity, "group": group}
    return dataclasses.field(default=default, metadata=metadata)


def folder(name: str) -> Any:
    """A field for one of the project's folders, with an option to use another instead."""
    help = f"use this instead of the project's folder {name}/ (default {name})"
    return option(ROOT / name, help, type=Path, metavar="DIR")


def image_size_option(default: Sequence[int | None] | None, help: str) -> Any:
    """A field for --image-size: the sides as given, each once. `help` says what speaks for other values."""
    return option(
        default,
        f"images are resized to a square of this side, or to this height and width; native keeps their size; {help}",
        identity=True,
        type=command_line.side,
        nargs="+",
        metavar="PIXELS",
    )


def stride_option(default: int | None, note: str, **further: Any) -> Any:
    """A field for --stride; `note` names the default in the help."""
    return option(
        default,
        "describe every STRIDE-th pixel along each side; the paper takes 1; with patches of 65 pixels 4 costs a tenth "
        f"of that (default {note})",
        type=int,
        choices=(1, 2, 4, 8),
        **further,
    )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of all settings."""

    @classmethod
    def parser(cls, description: str, defaults: Mapping[str, Any] | None = None) -> ArgumentParser:
        """A parser with an option for each field that `option` made; `defaults` replace the fields' own."""
        parser = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
        groups = {None: parser}
        for field in dataclasses.fields(cls):
            if "option" not in field.metadata:
                continue
            title = field.metadata["group"]
            if title not in groups:
                groups[title] = parser.add_argument_group(title)
            given = dict(field.metadata["option"])
            if given.pop("positional", False):
                groups[title].add_argument(field.name, **given)
                continue
            if isinstance(field.default, bool):
                given["action"] = "store_true"
            flag = given.pop("name", f"--{field.name.replace('_', '-')}")
            groups[title].add_argument(flag, dest=field.name, default=field.default, **given)
        parser.set_defaults(**(defaults or {}))
        return parser

    @classmethod
    def parse(
        cls, description: str, arguments: list[str] | None = None, defaults: Mapping[str, Any] | None = None
    ) -> Self:
        """From the command line. `defaults`, by the fields' names, are used where an option is not given."""
        given = vars(cls.parser(description, defaults).parse_args(arguments))
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})

    def identity(self, of: type["Settings"] | None = None) -> dict[str, Any]:
        """The settings that tell trained models apart: all, or those that the base class `of` has."""
        named = [field.name for field in dataclasses.fields(of or self) if field.metadata.get("identity")]
        values = {name: getattr(self, name) for name in named}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def without_options(self) -> dict[str, Any]:
        """The settings that have no option."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if not field.metadata}


@dataclass(frozen=True, kw_only=True)
class Command(Settings):
    """Settings of every command that uses a category's models."""

    category: str = option(
        dataclasses.MISSING,
        "name of a folder in data/, prepared by ./mvtec_dataset.sh CATEGORY",
        positional=True,
        type=category_name,
    )
    model: Path = folder("model")

    @property
    def models(self) -> Path:
        """The category's folder of models."""
        return self.model / self.category

    @property
    def detector(self) -> Path:
        """The file of the category's detector."""
        return self.models / "detector.pt"


@dataclass(frozen=True, kw_only=True)
class Stage(Command):
    """Settings of every stage."""

    device: str = option("auto", "auto (a GPU if available), cpu, cuda, cuda:1 ...")
    precision: str = option(
        "auto",
        "auto takes bfloat16 if the hardware computes it faster; choose float32 for results that don't depend on the "
        "hardware (default auto)",
        identity=True,
        choices=PRECISIONS,
    )
    data: Path = folder("data")
    index: Path | None = option(
        None,
        "the category's index: a .csv, or a folder with CATEGORY.csv; give it to all stages (default in the category's "
        "folder, or below the project's folder index/ if that takes no files)",
        type=Path,
        metavar="FILE",
    )
    image_size: tuple[int | None, ...] | None = image_size_option(
        (256,), "smaller is faster and misses small defects (default 256)"
    )

    def __post_init__(self):
        if self.image_size is None:
            return
        if len(self.image_size) > 2 or (len(self.image_size) == 2 and None in self.image_size):
            raise UserError("--image-size takes one number, or height and width, or the word native")
        object.__setattr__(self, "image_size", tuple(dict.fromkeys(self.image_size)))  # 256 256 is 256

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width to which images are resized; None for native."""
        return None if self.image_size == (None,) else (self.image_size[0], self.image_size[-1])

    @property
    def images(self) -> Path:
        """The category's folder of images."""
        return self.data / self.category


@dataclass(frozen=True, kw_only=True)
class TrainingStage(Stage):
    """Settings of every stage that trains."""

    seed: int = option(
        0, "the same seed gives the same results on the same machine", identity=True, type=command_line.seed
    )
    restart: bool = option(False, "remove what was trained before, finished or not, and train again")

    @property
    def compute(self) -> Compute:
        """Where and how to compute."""
        return Compute(choose(self.device), self.precision, self.seed)


def batch_size_option(default: int | None, note: str = "") -> Any:
    """A field for --batch-size; `note` names a default that depends on other options."""
    return option(
        default,
        f"lower this if memory runs out{note and f' (default {note})'}",
        identity=True,
        type=command_line.positive,
    )


def learning_rate_option(default: float | None, note: str = "") -> Any:
    """A field for --learning-rate; `note` names a default that depends on other options."""
    return option(
        default,
        f"peak after the warm-up; lower this if the loss rises or is not a number{note and f' (default {note})'}",
        identity=True,
        type=command_line.positive_real,
        metavar="X",
    )
