"""A frozen backbone as the teacher: descriptors of an image at several depths."""

from collections.abc import Iterable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from student_teacher.images import preprocessing
from student_teacher.runtime.running_moments import RunningMoments
from student_teacher.teachers import backbone_weights
from student_teacher.teachers.backbones import MULTIPLE, Backbone, averaged

VARIANCE_KEPT = 0.99  # of a level's normalised features, by their principal components
COMPLETE_STRIDE = 32  # levels with this stride or more keep all: few places don't show all that good images can be
FINEST_STRIDE, STRIDE = 8, 16  # pixels between places, at least: of the first level, of the others


class BackboneTeacher(nn.Module):
    """uint8 images (N,3,H,W) of `size` -> a map of descriptors per level, (N,K,H/stride,W/stride).

    The levels are the backbone's and one more: its last level, of the image at half size. A level's features are
    averaged over 3 x 3 places, normalised per channel with mean and std of good images, and projected on the principal
    components that explain VARIANCE_KEPT of the variance, or all of it from COMPLETE_STRIDE on. Normalisation and
    projection together are linear: `weights` (K,C) and `biases` (K,) of each level. `strides` are those of the maps.
    Height and width of `size` are as `seen_size` gives them.
    """

    def __init__(self, backbone: Backbone, size: tuple[int, int], weights: list[Tensor], biases: list[Tensor]):
        super().__init__()
        self.backbone = backbone
        self.size = tuple(size)
        self.strides = strides_of(backbone)
        self.projections = nn.ModuleList()
        for weight, bias in zip(weights, biases, strict=True):
            projection = nn.Conv2d(weight.shape[1], weight.shape[0], 1)
            projection.load_state_dict({"weight": weight[..., None, None], "bias": bias})
            self.projections.append(projection)
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> list[Tensor]:
        features, found = features_of(self.backbone, images), []
        for projection, level, factor in zip(self.projections, features, pooling_of(self.backbone), strict=True):
            found.append(pooled(averaged(projection(level)), factor))
        return found

    @classmethod
    @torch.no_grad()  # parameters created in inference mode can't be moved to another device
    def fit(cls, backbone: Backbone, size: tuple[int, int], images: Iterable[Tensor]) -> Self:
        """Compute the principal components from batches of good images, uint8 (N,3,H,W), on the backbone's device."""
        pooling = pooling_of(backbone)
        moments, products = [RunningMoments() for _ in pooling], [0.0 for _ in pooling]
        for batch in images:
            for level, features in enumerate(features_of(backbone, batch)):
                values = pooled(averaged(features.float()), pooling[level]).permute(0, 2, 3, 1).flatten(0, 2)
                moments[level].update(values)
                products[level] = products[level] + (values.T @ values).double()
        weights, biases = [], []
        for part, product, stride in zip(moments, products, strides_of(backbone), strict=True):
            weight, bias = _components(part, product, VARIANCE_KEPT if stride < COMPLETE_STRIDE else 1)
            weights.append(weight)
            biases.append(bias)
        return cls(backbone, size, weights, biases).to(weights[0].device)

    def to_checkpoint(self, backbone: str) -> dict[str, Any]:
        """The teacher as tensors and numbers, for `of_checkpoint`. `backbone` is the backbone's name.

        Of the backbones only a ResNet18's weights are included.
        """
        return {
            "backbone": backbone,
            "size": list(self.size),
            "projections": [{"weight": p.weight[..., 0, 0].cpu(), "bias": p.bias.cpu()} for p in self.projections],
            "net": self.backbone.net.state_dict() if backbone == "resnet18" else None,
        }

    @classmethod
    def of_checkpoint(cls, content: dict[str, Any]) -> Self:
        """The inverse of `to_checkpoint`."""
        backbone = backbone_weights.backbone(content["backbone"], "imagenet", content["net"])
        projections = content["projections"]
        return cls(backbone, content["size"], *([p[name] for p in projections] for name in ("weight", "bias")))


def features_of(backbone: Backbone, images: Tensor) -> list[Tensor]:
    """The features that a teacher's levels are made of, from uint8 images (N,3,H,W): (N,C,H/stride,W/stride) each."""
    pictures = preprocessing.normalise(images)
    return [*backbone.levels(pictures), backbone.levels(F.avg_pool2d(pictures, 2))[-1]]


def feature_strides(backbone: Backbone) -> tuple[int, ...]:
    """The strides of `features_of`, in pixels of the image at full size."""
    return (*backbone.strides, 2 * backbone.strides[-1])


def strides_of(backbone: Backbone) -> tuple[int, ...]:
    """The strides of a teacher's maps: those of the features, but at least FINEST_STRIDE, then STRIDE."""
    return tuple(
        max(stride, STRIDE if level else FINEST_STRIDE) for level, stride in enumerate(feature_strides(backbone))
    )


def pooling_of(backbone: Backbone) -> list[int]:
    """The factors, along each side, by which features are average-pooled to the strides of a teacher's maps."""
    return [stride // own for stride, own in zip(strides_of(backbone), feature_strides(backbone), strict=True)]


def pooled(features: Tensor, factor: int) -> Tensor:
    """Features (N,C,h,w), averaged over squares of `factor` x `factor` places."""
    return F.avg_pool2d(features, factor) if factor > 1 else features


def seen_size(size: tuple[int, int]) -> tuple[int, int]:
    """The nearest height and width of which a backbone accepts the half: multiples of 64, at least 128."""
    height, width = (max(2, round(length / (2 * MULTIPLE))) * 2 * MULTIPLE for length in size)
    return height, width


def _components(moments, products, fraction):
    """Weights (K,C) and biases (K,) that normalise features and project them on their principal components.

    Those that explain this `fraction` of the variance; 1 keeps all.
    """
    std, count = moments.std, moments.count
    covariance = (products - count * moments.mean[:, None] * moments.mean) / count / std / std[:, None]
    values, vectors = (found.flip(-1) for found in torch.linalg.eigh(covariance))
    kept = int((values.cumsum(0) < fraction * values.sum()).sum()) + 1 if fraction < 1 else len(values)
    weights = vectors[:, :kept].T / std
    return weights.float(), -(weights @ moments.mean).float()
