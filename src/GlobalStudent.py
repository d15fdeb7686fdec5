"""A student that sees the whole image at once, and remembers the good ones."""

from collections.abc import Callable, Iterable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from AnomalyNet import AnomalyNet
from FDFEAnomalyNet import FDFEAnomalyNet
from scales import PADDING, zoomed, zoomed_stride
from scoring import at_every_pixel, enlarged
from usual import Statistics, by_place

SIDE = 256  # pixels along each side of the image as it sees it, at most
STRIDE = 8  # of these between descriptors
EXPLAINED = 0.95  # of the descriptors' variance: the rest tells apart images, not defects
COMPONENTS = 512  # of whole maps, at most: half a megabyte or less for each
PENALTY = 0.05  # of ridge regression, beside the mean squared norm of a map
FEWEST_IMAGES, MOST_IMAGES = 8, 1_000  # to fit to
PROJECTED_IMAGES = 100  # at most, to find the descriptors' components
SURELY_GOOD = 0.25  # of any image: what its least anomalous part scores tells how unknown the whole is

# What a net says of good images, so many at most: (1,C,rows,columns) each.
Describe = Callable[[FDFEAnomalyNet, int], Iterable[Tensor]]


class GlobalStudent(nn.Module):
    """Predicts the teacher's descriptors of an image from those of good images, as their linear combination.

    A linear autoencoder of whole descriptor maps, in the place of the convolutional one of EfficientAD (Batzner et al.,
    WACV 2024), and fitted in closed form: ridge regression on the maps of good images. The other students see a patch
    and know what is usual anywhere; this one knows what goes with what, and where. Its anomaly score is its error by
    place, as it is usual on good images that are left out of the fit. So a part unlike all that it remembers is
    somewhat anomalous everywhere: `level` says how much.

    For maps of K components of the descriptor, R of the whole map: `projection` (K,512) of normalised descriptors,
    `mean` (K,rows,columns), `basis` (R,K rows columns), orthonormal, and `shrinkage` (R,), from 0 to 1. `size` is
    height and width of the image as it is seen, `explained` the share of the maps' variance that it predicts on good
    images that are left out: as much is its part in the anomaly score.
    """

    def __init__(
        self,
        size: tuple[int, int],
        projection: Tensor,
        mean: Tensor,
        basis: Tensor,
        shrinkage: Tensor,
        explained: Tensor,
        place_mean: Tensor,
        place_deviation: Tensor,
    ):
        super().__init__()
        self.size = tuple(size)
        self.register_buffer("projection", projection)
        self.register_buffer("mean", mean)
        self.register_buffer("basis", basis)
        self.register_buffer("shrinkage", shrinkage)
        self.register_buffer("explained", explained)
        self.register_buffer("place_mean", place_mean)
        self.register_buffer("place_deviation", place_deviation)

    def forward(self, describing: FDFEAnomalyNet, pixels: Tensor, zoom: int) -> tuple[Tensor, Tensor]:
        """Anomaly scores (N,H,W) and levels (N,) of normalised images (N,3,H,W); `describing`: see `described_by`."""
        error = self.error(describing(seen_image(pixels, self.size, zoom)))
        scores = by_place(error, self.place_mean, self.place_deviation)
        return self._of_pixels(scores, describing.stride, pixels, zoom), level(scores)

    def _of_pixels(self, scores, stride, pixels, zoom):
        height, width = self.size
        inner = -(-height // zoom), -(-width // zoom)
        scores = enlarged(at_every_pixel(scores, stride, inner), zoom, self.size)
        if self.size == pixels.shape[2:]:
            return scores
        return F.interpolate(scores[:, None], pixels.shape[2:], mode="bilinear")[:, 0]

    def described_by(self, teacher: AnomalyNet, zoom: int) -> FDFEAnomalyNet:
        """The principal components of the descriptors of a teacher that describes in normalised form."""
        return dense(teacher.projected(self.projection), zoom)

    def error(self, descriptors: Tensor) -> Tensor:
        """Squared distance of principal components (N,K,rows,columns) to what is predicted: (N,rows,columns)."""
        maps = (descriptors.float() - self.mean).flatten(1)
        precise = not torch.is_autocast_enabled(maps.device.type)
        basis = self.basis.float() if precise else self.basis
        predicted = F.linear(F.linear(maps, basis) * self.shrinkage, basis.T)
        return (maps - predicted).view(-1, *self.mean.shape).square().sum(1)

    @classmethod
    @torch.no_grad()
    def fit(cls, teacher: AnomalyNet, zoom: int, size: tuple[int, int], describe: Describe) -> Self:
        """Fit to the good images that `describe` describes, FEWEST_IMAGES at least. `teacher`: as in `described_by`."""
        projection = principal_components(describe(dense(teacher, zoom), PROJECTED_IMAGES))
        maps = torch.cat([found.half() for found in describe(dense(teacher.projected(projection), zoom), MOST_IMAGES)])
        mean = torch.stack([channel.float().mean(0) for channel in maps.unbind(1)])
        # A channel at a time, here and below: the maps of all images in float32 would take a gigabyte at once.
        channels = [(channel - usual).half().flatten(1) for channel, usual in zip(maps.unbind(1), mean, strict=True)]
        del maps
        gram = sum((channel.float() @ channel.float().T).double() for channel in channels)
        penalty = PENALTY * gram.diagonal().mean() + 1e-12
        values, vectors = (found.flip(-1) for found in torch.linalg.eigh(gram))
        left_out = leave_one_out(values, vectors, penalty).float()
        errors = sum((left_out @ channel.float()).square() for channel in channels).view(-1, *mean.shape[1:])
        variance = gram.diagonal().mean() / errors[0].numel()
        explained = (1 - (errors.mean() + 1e-12) / (variance + 1e-12)).clamp(0, 1).float()
        statistics = Statistics()
        statistics.update(errors, torch.zeros_like(errors))
        kept = min(COMPONENTS, int((values > 1e-6 * values[0]).sum()))
        weights = (vectors[:, :kept] / values[:kept].sqrt()).T.float()
        basis = torch.cat([(weights @ channel.float()).bfloat16() for channel in channels], 1)
        shrinkage = (values[:kept] / (values[:kept] + penalty)).float()
        places = (found.to(mean.device) for found in statistics.of_places())
        return cls(size, projection, mean, basis, shrinkage, explained, *places)

    def to_checkpoint(self) -> dict[str, Any]:
        """What `of_checkpoint` rebuilds it from."""
        return {"size": list(self.size), "state": self.state_dict()}

    @classmethod
    def of_checkpoint(cls, content: dict[str, Any]) -> Self:
        """The GlobalStudent whose `to_checkpoint` that was."""
        return cls(content["size"], **content["state"])


def level(scores: Tensor) -> Tensor:
    """What SURELY_GOOD of the scores (N,h,w) of each image don't exceed, 0 at least: (N,)."""
    scores = scores.flatten(1)
    return scores.kthvalue(max(1, round(SURELY_GOOD * scores.shape[1])), 1).values.clamp_min(0)


def leave_one_out(values: Tensor, vectors: Tensor, penalty: Tensor) -> Tensor:
    """Weights (N,N) that make of N centred maps the residual of each from a fit of mean and ridge to the others alone.

    Exact, from the eigenvalues and eigenvectors of the maps' Gram matrix: the residual with all of them over 1 minus
    its leverage (Allen, 1974: PRESS).
    """
    inverse = (vectors / (values + penalty)) @ vectors.T
    return inverse / (inverse.diagonal() - 1 / (len(values) * penalty))[:, None]


def dense(net: AnomalyNet, zoom: int) -> FDFEAnomalyNet:
    """The net at the places where a GlobalStudent wants descriptors."""
    return FDFEAnomalyNet(net, zoomed_stride(STRIDE, zoom), padding=PADDING)


def seen_image(pixels: Tensor, size: tuple[int, int], zoom: int) -> Tensor:
    """Normalised images (N,3,H,W) at `size`, and then zoomed as for the other students."""
    if pixels.shape[2:] != size:
        pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
    return zoomed(pixels, zoom)


def size_seen(size: tuple[int, int] | None) -> tuple[int, int]:
    """Height and width at which images of `size` (None: of many sizes) are seen."""
    height, width = size or (SIDE, SIDE)
    return min(height, SIDE), min(width, SIDE)


def principal_components(descriptors: Iterable[Tensor]) -> Tensor:
    """The fewest orthonormal directions (K,C) that hold EXPLAINED of the variance of centred descriptors (1,C,h,w)."""
    products = sum(torch.einsum("nchw,ndhw->cd", found.float(), found.float()).double() for found in descriptors)
    values, vectors = (found.flip(-1) for found in torch.linalg.eigh(products))
    shares = values.cumsum(0) / values.sum()
    return vectors[:, : int((shares < EXPLAINED).sum()) + 1].T.float().contiguous()
