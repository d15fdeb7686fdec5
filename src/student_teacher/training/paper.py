"""The settings of --paper: "Uninformed Students" (Bergmann et al., CVPR 2020) as published in arXiv 1911.02357v2.

One table per stage that has the option. Section numbers are the paper's.
"""

import textwrap
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from AnomalyNet import DESCRIPTOR_SIZE
from FDFE import PADDING
from student_teacher.detection.AnomalyDetector import NORMALISATIONS
from student_teacher.detection.scoring import IMAGE_SCORES
from student_teacher.runtime.errors import UserError
from student_teacher.training.optimiser import WEIGHT_DECAY

SOURCE = "arXiv 1911.02357v2"
TAUGHT = "taught with --paper"  # the teacher that students learn from
WIDTH = 120  # of a printed line


@dataclass(frozen=True)
class Published:
    """The published settings of a stage, by the names of its arguments.

    Attributes:
        said: what the paper says.
        read: our reading where the paper says nothing.
        ours: this project's own values of settings that have no option.
        fixed: options that must not be given with another value beside --paper.
    """

    said: Mapping[str, Any]
    read: Mapping[str, Any]
    ours: Mapping[str, Any] = field(default_factory=dict)
    fixed: tuple[str, ...] = ()

    @property
    def values(self) -> dict[str, Any]:
        """All settings as published."""
        return {**self.said, **self.read}

    def parse(self, options: ArgumentParser, arguments: list[str] | None) -> Namespace:
        """Add --paper and parse the command line. Options that are given override the published settings.

        Raises UserError if one of the `fixed` options contradicts --paper.
        """
        options.add_argument(
            "--paper",
            action="store_true",
            help=f"use the settings published in {SOURCE}, and print them; other options override them",
        )
        options.set_defaults(**self.ours)
        args = options.parse_args(arguments)
        if args.paper:
            options.set_defaults(**self.values)
            args = options.parse_args(arguments)
            for name in self.fixed:
                if (given := getattr(args, name)) != self.values[name]:
                    raise UserError(f"--{name.replace('_', '-')} {given} contradicts --paper: leave one of them out")
        return args

    def changed(self, args: Namespace) -> list[str]:
        """The settings that an option has changed, each as a text. All patch sizes count as published."""
        return [
            f"{_shown(name, getattr(args, name))} (published: {_value(value)})"
            for name, value in self.values.items()
            if getattr(args, name) != value and name != "patch_size"
        ]

    def identity(self, args: Namespace) -> dict[str, Any]:
        """Additional entries for a model's settings with --paper, so that it differs from models without it."""
        if not args.paper:
            return {}
        # The name sorts first, so that loop.require_same_settings reports it before others.
        return {"--paper": True} | {name: getattr(args, name) for name in self.ours}

    def show(self, args: Namespace) -> None:
        """With --paper, print the settings."""
        if not args.paper:
            return
        for title, settings in ((f"as published in {SOURCE}", self.said), ("where the paper says nothing", self.read)):
            given = {name: getattr(args, name) for name in settings}
            kept = [name for name in settings if given[name] == settings[name] or name == "patch_size"]
            say(title, [_shown(name, given[name]) for name in kept])
        say("not as published, but as given", self.changed(args))


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
    if isinstance(value, list):
        return " ".join(map(_value, value))
    return "native" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


TEACHER = Published(
    said={
        "distillation": "patches",  # 3.1
        "patch_size": [65],  # 4.2, table 2: one scale; 17 33 65 are those of table 3
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
        "image_size": [None],
        "precision": "float32",
        "saved_in": "float32",
    },
    ours={
        "descriptor_size": DESCRIPTOR_SIZE,
        "square_zoom": False,
        "literal_losses": False,
        "weight_decay": WEIGHT_DECAY,
        "schedule": "cosine",
        "saved_in": "float16",
    },
    fixed=("distillation", "optimiser"),
)

STUDENTS = Published(
    said={
        "teacher": TAUGHT,  # 3.2: the students have its architecture, and its descriptors' size with it
        "patch_size": [65],  # 4.2, table 2: one scale; 17 33 65 are those of table 3
        "students": 3,  # 4.2
        "image_size": [256],  # 4.2
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
    ours={
        "whole_images": False,
        "batch_normalisation": True,
        "literal_losses": False,
        "weight_decay": WEIGHT_DECAY,
        "all_descriptors": False,
        "validation": False,
        "normalisation": NORMALISATIONS[0],
        "padding": PADDING,
        "schedule": "cosine",
        "image_score": IMAGE_SCORES[0],
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
