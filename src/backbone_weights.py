"""Where the backbone's first weights come from."""

import pickle
import struct
from argparse import ArgumentParser
from http.client import HTTPException
from pathlib import Path

import torch
from torch import Tensor
from torchvision.models import ResNet18_Weights

from AnomalyResnet18 import AnomalyResnet18
from command_line import UserError


def add_option(options: ArgumentParser) -> None:
    """Add --backbone-weights; `load` reads it."""
    options.add_argument(
        "--backbone-weights",
        default="imagenet",
        metavar="SOURCE",
        help="imagenet (through torchvision, which downloads them once: best), random (needs nothing, tells defects "
        "apart less well), or a file with a torchvision resnet18 state dict; where stage 1 has adapted the "
        "backbone, later stages take that instead (default imagenet)",
    )


def load(source: str) -> dict[str, Tensor] | None:
    """A torchvision resnet18 state dict: for "imagenet" torchvision's, None for "random", else the file's.

    Raises UserError, with the ways out, where the weights can't be had.
    """
    if source == "random":
        return None
    if source == "imagenet":
        try:
            return ResNet18_Weights.IMAGENET1K_V1.get_state_dict(progress=True, check_hash=True)
        except (OSError, RuntimeError, HTTPException, pickle.UnpicklingError) as error:
            raise UserError(
                f"ImageNet's weights can't be had ({getattr(error, 'reason', error)}): give a torchvision resnet18 "
                "state dict by --backbone-weights FILE, or take --backbone-weights random; a teacher can be taught by "
                "--backbone efficientnet_lite0, too"
            ) from error
    path = Path(source)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        AnomalyResnet18().load_torchvision(state)
    except OSError as error:
        raise UserError(f"--backbone-weights {source}: {error.strerror}; give imagenet, random or a file") from error
    except (
        RuntimeError, pickle.UnpicklingError, EOFError, ValueError, LookupError, AttributeError, TypeError, struct.error
    ):  # fmt: skip
        raise UserError(f"--backbone-weights {source} is no state dict of torchvision's resnet18") from None
    return state
