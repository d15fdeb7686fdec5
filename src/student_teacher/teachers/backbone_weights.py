"""Where the backbones' weights come from."""

import pickle
from argparse import ArgumentParser, Namespace
from http.client import HTTPException
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models import ResNet18_Weights

from AnomalyResnet18 import AnomalyResnet18
from student_teacher.runtime import checkpoints
from student_teacher.runtime.errors import UserError
from student_teacher.runtime.paths import PRETRAINED, ROOT
from student_teacher.teachers.backbones import BACKBONES, Backbone, Lite0, Resnet18
from student_teacher.teachers.EfficientNetLite0 import EfficientNetLite0

NAMED = "imagenet", "random"
EFFICIENTNET_LITE0 = ROOT / "model" / PRETRAINED / "efficientnet_lite0.pt"


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
                "state dict by --backbone-weights FILE, or take --backbone-weights random or --backbone "
                "efficientnet_lite0, whose weights ship"
            ) from error
    path = Path(source)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        AnomalyResnet18().load_torchvision(state)
    except OSError as error:
        raise UserError(f"--backbone-weights {source}: {error.strerror}; give imagenet, random or a file") from error
    except checkpoints.BROKEN:
        raise UserError(f"--backbone-weights {source} is no state dict of torchvision's resnet18") from None
    return state


def name(source: str) -> str:
    """What models are told apart by: a file's weights are what is in it, wherever it lies."""
    state = None if source in NAMED else load(source)
    return source if state is None else checkpoints.fingerprint(state)


def add_options(options: ArgumentParser, default: str) -> None:
    """Add --backbone and --backbone-weights; `backbone` reads them."""
    options.add_argument(
        "--backbone",
        choices=BACKBONES,
        default=default,
        help="efficientnet_lite0, with ImageNet's weights, which ship with the project, or torchvision's resnet18, "
        f"adapted to the category where stage 1 did that (default {default})",
    )
    add_option(options)


def backbone(name: str, source: str, adapted: dict[str, Tensor] | None = None) -> Backbone:
    """The backbone `name` of BACKBONES, not to be trained any more.

    ResNet18 has the weights `adapted` (of AnomalyResnet18), else those of `source`, as `load` takes it.
    Raises UserError where weights can't be had.
    """
    if name == "efficientnet_lite0":
        if source != "imagenet":
            raise UserError(f"--backbone-weights {source}: efficientnet_lite0 has ImageNet's weights alone")
        net = EfficientNetLite0()
        state = checkpoints.load(EFFICIENTNET_LITE0, "backbone weights")["net"]
        net.load_state_dict({name: unpacked(value) for name, value in state.items()})
        found = Lite0(net)
    else:
        net = AnomalyResnet18()
        if adapted is not None:
            net.load_state_dict(adapted)
        elif (state := load(source)) is not None:
            net.load_torchvision(state)
        found = Resnet18(net)
    return found.eval().requires_grad_(False)


def adapted_backbone(args: Namespace) -> dict[str, Tensor] | None:
    """The weights that stage 1 made for the category, None where it made none or another backbone is wanted."""
    path = args.model / args.category / "resnet18.pt"
    if args.backbone != "resnet18" or not path.exists():
        return None
    return checkpoints.load(path, "backbone", category=args.category)["net"]


def backbone_name(args: Namespace, adapted: dict[str, Tensor] | None) -> str:
    """Which backbone it is, and whose weights."""
    if adapted is not None:
        return f"resnet18.pt of this category, {checkpoints.fingerprint(adapted)}"
    if args.backbone != "resnet18":
        return args.backbone
    return f"resnet18, {name(args.backbone_weights)} weights"


def packed(values: Tensor) -> Tensor:
    """float32 of any shape, rounded to the upper 24 bits: uint8 (...,3). `unpacked` gives them back, to 2e-5."""
    bits = values.contiguous().view(torch.int32) + 128
    return bits.view(torch.uint8).view(*values.shape, 4)[..., 1:].clone()


def unpacked(values: Tensor) -> Tensor:
    """What `packed` packed: uint8 (...,3) -> float32 (...)."""
    return F.pad(values, (1, 0)).view(torch.float32)[..., 0]
