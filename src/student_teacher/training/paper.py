"""The settings of --paper: "Uninformed Students" (Bergmann et al., CVPR 2020) as published in arXiv 1911.02357v2.

One table per stage that has the option. Section numbers are the paper's.
"""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from student_teacher.runtime.errors import UserError
from student_teacher.runtime.settings import Settings, option
from student_teacher.training.optimiser import WEIGHT_DECAY

SOURCE = "arXiv 1911.02357v2"
TAUGHT = "taught with --paper"  # the teacher that students learn from
WIDTH = 120  # of a printed line


def paper_option() -> Any:
    """A field for --paper."""
    return option(False, f"use the settings published in {SOURCE}, and print them; other options override them")


Chosen = TypeVar("Chosen", bound=Settings)


@dataclass(frozen=True)
class Published:
    """The published settings of a stage, by the names of its arguments.

    Attributes:
        said: what the paper says.
        read: our reading where the paper says nothing.
        fixed: options that must not be given with another value beside --paper.
    """

    said: Mapping[str, Any]
    read: Mapping[str, Any]
    fixed: tuple[str, ...] = ()

    @property
    def values(self) -> dict[str, Any]:
        """All settings as published."""
        return {**self.said, **self.read}

    def parse(self, kind: type[Chosen], description: str, arguments: list[str] | None) -> Chosen:
        """Settings of this `kind`, as published with --paper. Options that are given override the published ones.

        Raises UserError if one of the `fixed` options contradicts --paper.
        """
        settings = kind.parse(description, arguments)
        if not settings.paper:
            return settings
        settings = kind.parse(description, arguments, defaults=self.values)
        for name in self.fixed:
            if (given := getattr(settings, name)) != self.values[name]:
                raise UserError(f"--{name.replace('_', '-')} {given} contradicts --paper: leave one of them out")
        return settings

    def changed(self, settings: Settings) -> list[str]:
        """The settings that an option has changed, each as a text. All patch sizes count as published."""
        return [
            f"{_shown(name, getattr(settings, name))} (published: {_value(value)})"
            for name, value in self.values.items()
            if getattr(settings, name) != value and name != "patch_size"
        ]

    def identity(self, settings: Settings) -> dict[str, Any]:
        """Additional entries for a model's settings with --paper, so that it differs from models without it."""
        if not settings.paper:
            return {}
        # The name sorts first, so that loop.require_same_settings reports it before others.
        return {"--paper": True} | settings.without_options()

    def show(self, settings: Settings) -> None:
        """With --paper, print the settings."""
        if not settings.paper:
            return
        for title, table in ((f"as published in {SOURCE}", self.said), ("where the paper says nothing", self.read)):
            given = {name: getattr(settings, name) for name in table}
            kept = [name for name in table if given[name] == table[name] or name == "patch_size"]
            say(title, [_shown(name, given[name]) for name in kept])
        say("not as published, but as given", self.changed(settings))


def say(title: str, texts: Sequence[str]) -> None:
    """Print a title and the texts, if there are any."""
    if texts:
        print(textwrap.fill(f"{title}: {', '.join(texts)}", WIDTH, subsequent_indent="  "))


def _shown(name, value):
    """A setting as a text."""
    name = name.replace("_", " ")
    if isinstance(value, bool):
        return name if value else f"no {name}"
    return f"{name} {_value(value)}"


def _value(value):
    if isinstance(value, tuple):
        return " ".join(map(_value, value))
    return "native" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


TEACHER = Published(
    said={
        "distillation": "patches",  # 3.1
        "patch_size": (65,),  # 4.2, table 2: one scale; 17 33 65 are those of table 3
        "descriptor_size": 128,  # 4; the layer that decodes them to the backbone's 512 features is for training only
        "backbone": "resnet18",  # 4: its 512 features before the classifier
        "backbone_weights": "imagenet",  # 4
        "square_zoom": True,  # 4: pictures are zoomed to equal width and height, from 4p to 16p
        "literal_losses": True,  # 3.1, equations (1) to (5): sums over channels, features as they are
        "distillation_weight": 1.0,  # 4.2
        "metric_weight": 0.0,  # 4.2: without it the teacher was best on MNIST and CIFAR-10 (4.1, table 1)
        "compactness_weight": 1.0,  # 4.2
        "optimiser": "adam",  # 4
        "learning_rate": 2e-4,  # 4
        "weight_decay": WEIGHT_DECAY,  # 4
        "batch_size": 64,  # 4
        "steps": 50_000,  # 4
    },
    read={
        "schedule": "constant",  # the paper calls it the initial learning rate, but names no other
        "backbone_size": None,  # the backbone sees the patch's own pixels
        "image_size": (None,),
        "precision": "float32",
        "saved_in": "float32",
    },
    fixed=("distillation", "optimiser"),
)

STUDENTS = Published(
    said={
        "teacher": TAUGHT,  # 3.2: the students have its architecture, and its descriptors' size with it
        "patch_size": (65,),  # 4.2, table 2: one scale; 17 33 65 are those of table 3
        "students": 3,  # 4.2
        "image_size": (256,),  # 4.2
        "stride": 1,  # 3.1: a descriptor for every pixel
        "whole_images": True,  # 3.2, equation (7)
        "batch_normalisation": False,  # appendix, tables of the networks
        "literal_losses": True,  # 3.2, equation (7): sums over channels
        "optimiser": "adam",  # 4.2
        "learning_rate": 1e-4,  # 4.2
        "weight_decay": WEIGHT_DECAY,  # 4.2
        "batch_size": 1,  # 4.2
        "epochs": 100,  # 4.2
        "all_descriptors": True,  # 3.2: mean and std of the teacher's descriptors are over all training images
        "validation": True,  # 3.2: mean and std of error and variance are over good images not used for training
        "normalisation": "image",  # 3.2, equation (11): one mean and one std
    },
    read={
        "padding": "zeros",  # around the image, after its colours are normalised
        "schedule": "constant",
        "image_score": "maximum",  # sections 3.2 and 4.2 score pixels
        "precision": "float32",
    },
    fixed=("optimiser",),
)

DETECTION = Published(
    said={
        "stride": 1,  # 3.3: maps are of the image's size
        "normalisation": "image",  # 3.2, equation (11); 3.3, equation (12): the mean of several scales
    },
    read={
        "image_score": "maximum",
        "precision": "float32",
    },
)
