"""The backbones' weights: options, loading, packing."""

import pickle
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models import ResNet18_Weights

from AnomalyResnet18 import AnomalyResnet18
from student_teacher.runtime import checkpoints
from student_teacher.runtime.errors import UserError
from student_teacher.runtime.paths import PRETRAINED, ROOT
from student_teacher.runtime.settings import option
from student_teacher.teachers.backbones import BACKBONES, Backbone, Lite0, Resnet18
from student_teacher.teachers.EfficientNetLite0 import EfficientNetLite0

NAMED = "imagenet", "random"
EFFICIENTNET_LITE0 = ROOT / "model" / PRETRAINED / "efficientnet_lite0.pt"


def weights_option() -> Any:
    """A field for --backbone-weights; `load` reads it."""
    return option(
        "imagenet",
        "imagenet (best; torchvision downloads them once), random (needs no download, but finds fewer defects), or a "
        "file with a torchvision resnet18 state dict; if stage 1 has adapted the backbone, later stages take that "
        "instead (default imagenet)",
        metavar="SOURCE",
    )


def backbone_option(default: str) -> Any:
    """A field for --backbone; `backbone` reads it."""
    return option(
        default,
        "efficientnet_lite0, whose ImageNet weights ship with the project, or torchvision's resnet18, adapted to the "
        "category if stage 1 was run",
        choices=BACKBONES,
    )


def load(source: str) -> dict[str, Tensor] | None:
    """A torchvision resnet18 state dict: torchvision's for "imagenet", None for "random", else that of the file.

    Raises UserError, with the alternatives, if the weights are not available.
    """
    if source == "random":
        return None
    if source == "imagenet":
        try:
            return ResNet18_Weights.IMAGENET1K_V1.get_state_dict(progress=True, check_hash=True)
        except (OSError, RuntimeError, HTTPException, pickle.UnpicklingError) as error:
            raise UserError(
                f"ImageNet's weights are not available ({getattr(error, 'reason', error)}): give a torchvision "
                "resnet18 state dict with --backbone-weights FILE, or take --backbone-weights random or --backbone "
                "efficientnet_lite0, which needs no download"
            ) from error
    path = Path(source)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        AnomalyResnet18().load_torchvision(state)
    except OSError as error:
        raise UserError(f"--backbone-weights {source}: {error.strerror}; give imagenet, random or a file") from error
    except checkpoints.BROKEN:
        raise UserError(f"--backbone-weights {source} is not a state dict of torchvision's resnet18") from None
    return state


def name(source: str) -> str:
    """The source as models store it in their settings: a file by a digest of its weights, not by its path."""
    state = None if source in NAMED else load(source)
    return source if state is None else checkpoints.fingerprint(state)


def backbone(name: str, source: str, adapted: dict[str, Tensor] | None = None) -> Backbone:
    """The backbone `name`, one of BACKBONES, in evaluation mode and without gradients.

    ResNet18 gets the weights `adapted` (of AnomalyResnet18) if given, else those of `source`, as for `load`. Raises
    UserError if the weights are not available.
    """
    if name == "efficientnet_lite0":
        if source != "imagenet":
            raise UserError(f"--backbone-weights {source}: efficientnet_lite0 has ImageNet's weights only")
        net = EfficientNetLite0()
        state = checkpoints.load(EFFICIENTNET_LITE0, "backbone weights")["net"]
        net.load_state_dict({name: unpacked(value) for name, value in state.items()})
        model = Lite0(net)
    else:
        net = AnomalyResnet18()
        if adapted is not None:
            net.load_state_dict(adapted)
        elif (state := load(source)) is not None:
            net.load_torchvision(state)
        model = Resnet18(net)
    return model.eval().requires_grad_(False)


def adapted_backbone(folder: Path, backbone: str) -> dict[str, Tensor] | None:
    """The weights that stage 1 wrote to a category's folder of models.

    None if there are none, or if `backbone` is not ResNet18.
    """
    path = folder / "resnet18.pt"
    if backbone != "resnet18" or not path.exists():
        return None
    return checkpoints.load(path, "backbone", category=folder.name)["net"]


def backbone_name(backbone: str, source: str, adapted: dict[str, Tensor] | None) -> str:
    """The name of the backbone and its weights, for settings and messages; arguments as for `backbone`."""
    if adapted is not None:
        return f"resnet18.pt of this category, {checkpoints.fingerprint(adapted)}"
    return f"resnet18, {name(source)} weights" if backbone == "resnet18" else backbone


def packed(values: Tensor) -> Tensor:
    """float32 of any shape, rounded to its upper 24 bits: uint8 (...,3). `unpacked` restores it, to a relative 2e-5."""
    bits = values.contiguous().view(torch.int32) + 128
    return bits.view(torch.uint8).view(*values.shape, 4)[..., 1:].clone()


def unpacked(values: Tensor) -> Tensor:
    """The inverse of `packed`: uint8 (...,3) -> float32 (...)."""
    return F.pad(values, (1, 0)).view(torch.float32)[..., 0]
