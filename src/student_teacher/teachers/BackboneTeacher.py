"""A frozen backbone as the teacher: descriptors of an image at several depths."""

from collections.abc import Iterable, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from student_teacher.images import preprocessing
from student_teacher.runtime.running_moments import RunningMoments
from student_teacher.teachers import backbone_weights
from student_teacher.teachers.backbones import MULTIPLE, Backbone, averaged

FINEST_STRIDE, STRIDE = 8, 16  # pixels between places, at least: of the first level, of the others


class Normalisation(nn.Module):
    """Values (N,C,h,w) -> (value - mean) / std, with those of good images: one each, or one a channel, (C,1,1)."""

    def __init__(self, mean: Tensor, std: Tensor):
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, values: Tensor) -> Tensor:
        return (values - self.mean) / self.std


class BackboneTeacher(nn.Module):
    """uint8 images (N,3,H,W) of `size` -> a map of descriptors per level, (N,C,H/stride,W/stride).

    The levels are the backbone's and one more: its last level, of the image at half size. Descriptors are a level's
    features, averaged over 3 x 3 places and normalised. `strides` are those of the maps. Height and width of `size` are
    as `seen_size` gives them.
    """

    def __init__(self, backbone: Backbone, size: tuple[int, int], normalisations: Sequence[Normalisation]):
        super().__init__()
        self.backbone = backbone
        self.size = tuple(size)
        self.strides = strides_of(backbone)
        self.normalisations = nn.ModuleList(normalisations)
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> list[Tensor]:
        features = features_of(self.backbone, images)
        return [normalise(level) for normalise, level in zip(self.normalisations, features, strict=True)]

    @classmethod
    @torch.no_grad()  # tensors created in inference mode can't be loaded into
    def fit(cls, backbone: Backbone, size: tuple[int, int], images: Iterable[Tensor]) -> Self:
        """Compute mean and std from batches of good images, uint8 (N,3,H,W), on the backbone's device."""
        moments = [RunningMoments() for _ in strides_of(backbone)]
        for batch in images:
            for of_level, features in zip(moments, features_of(backbone, batch), strict=True):
                of_level.update(features.permute(0, 2, 3, 1).flatten(0, 2))
        found = [(of_level.mean, of_level.std) for of_level in moments]
        return cls(backbone, size, [Normalisation(*(part[:, None, None].float() for part in both)) for both in found])

    def to_checkpoint(self, backbone: str) -> dict[str, Any]:
        """The teacher as tensors and numbers, for `of_checkpoint`. `backbone` is the backbone's name.

        Of the backbones only a ResNet18's weights are included.
        """
        return {
            "backbone": backbone,
            "size": list(self.size),
            "normalisations": [(part.mean.cpu(), part.std.cpu()) for part in self.normalisations],
            "net": self.backbone.net.state_dict() if backbone == "resnet18" else None,
        }

    @classmethod
    def of_checkpoint(cls, content: dict[str, Any]) -> Self:
        """The inverse of `to_checkpoint`."""
        backbone = backbone_weights.backbone(content["backbone"], "imagenet", content["net"])
        normalisations = [Normalisation(*part) for part in content["normalisations"]]
        return cls(backbone, content["size"], normalisations)


def features_of(backbone: Backbone, images: Tensor) -> list[Tensor]:
    """A teacher's descriptors before they are normalised: uint8 (N,3,H,W) -> float32 (N,C,H/stride,W/stride) each."""
    pictures = preprocessing.normalise(images)
    levels = [*backbone.levels(pictures), backbone.levels(F.avg_pool2d(pictures, 2))[-1]]
    return [pooled(averaged(level.float()), factor) for level, factor in zip(levels, pooling_of(backbone), strict=True)]


def feature_strides(backbone: Backbone) -> tuple[int, ...]:
    """The strides of the backbone's features that make a teacher's levels, in pixels of the image at full size."""
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
