"""A student that sees the whole image, in closed form."""

from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Number of components of whole maps to keep: half the number of images, within these limits. More don't predict better.
FEWEST_COMPONENTS, MOST_COMPONENTS = 100, 320
PENALTY = 0.05  # of ridge regression, times the mean squared norm of a map
FOLDS = 5  # to estimate the loss from dropping components


class GlobalStudent(nn.Module):
    """Predicts the teacher's map of a new image as a linear combination of its maps of good images.

    A linear autoencoder of whole maps, fitted in closed form by ridge regression on the maps of good images; it takes
    the place of the convolutional autoencoder of EfficientAD (Batzner et al., WACV 2024). It learns which features
    occur together, and at which places.

    For maps with K channels: `mean` (K,h,w), and `basis` (R,K h w) as int8 with one of the `scales` (R,) per row. The
    prediction is mean + basis' basis (map - mean): the basis includes the root of the ridge's shrinkage. `explained` is
    the fraction of the maps' variance that is predicted, 0 to 1, each good image left out of the fit in turn.
    """

    def __init__(self, mean: Tensor, basis: Tensor, scales: Tensor, explained: float):
        super().__init__()
        self.explained = explained
        self.register_buffer("mean", mean)
        self.register_buffer("scales", scales)
        self.register_buffer("basis", basis.float() * scales[:, None])

    def forward(self, maps: Tensor) -> Tensor:
        """Squared error of the prediction at each place, summed over channels: maps (N,K,h,w) -> (N,h,w)."""
        centred = (maps.float() - self.mean).flatten(1)
        error = centred - F.linear(centred.to(self.basis.dtype), self.basis) @ self.basis
        return error.square_().view(-1, *self.mean.shape).sum(1)

    @classmethod
    @torch.no_grad()  # tensors created in inference mode can't be loaded into
    def fit(cls, maps: Tensor, groups: Sequence[Sequence[int]] | None = None) -> tuple[Self, Tensor]:
        """Fit to the maps (n,K,h,w) of n good images, n >= 2; any floating-point type, computed in float32.

        Also returns each image's squared errors (n,h,w) with its group of `groups` left out of the fit (without
        `groups`, with the image alone left out): see `left_out_weights`.
        """
        mean = torch.stack([channel.float().mean(0) for channel in maps.unbind(1)])
        # A channel at a time: the maps of all images in float32 would take gigabytes at once.
        channels = [
            (channel.float() - channel_mean).flatten(1).to(maps.dtype)
            for channel, channel_mean in zip(maps.unbind(1), mean, strict=True)
        ]
        gram = sum(channel.float() @ channel.float().T for channel in channels).double()
        penalty = PENALTY * gram.diagonal().mean() + 1e-12
        alone = left_out_weights(gram, penalty, [[index] for index in range(len(maps))])
        unexplained = (alone @ gram * alone).sum() / (gram.trace() + 1e-12)
        weights = (left_out_weights(gram, penalty, groups) if groups else alone).float()
        errors = sum((weights @ channel.float()).square_() for channel in channels).view(-1, *mean.shape[1:])
        errors *= lost_by_truncation(gram, penalty)
        values, vectors = leading(gram)
        weights = (vectors / (values + penalty).sqrt()).T.float()
        basis = torch.cat([(weights @ channel.float()) for channel in channels], 1)
        scales = basis.abs().amax(1).clamp_min(1e-12) / 127
        return cls(
            mean, (basis / scales[:, None]).round_().to(torch.int8), scales, max(0.0, 1 - unexplained.item())
        ), errors

    def compute_in(self, dtype: torch.dtype) -> None:
        """Keep the basis in this type: autocast would convert it for each image, which is slower than the product."""
        self.basis = self.basis.to(dtype)

    @property
    def codes(self) -> Tensor:
        """The basis as int8 (R,K h w), without its scales."""
        return (self.basis.float() / self.scales[:, None]).round().to(torch.int8)

    def to_checkpoint(self) -> dict[str, Any]:
        """The student as tensors and numbers, for `of_checkpoint`."""
        return {
            "mean": self.mean.half().cpu(),
            "basis": self.codes.cpu(),
            "scales": self.scales.cpu(),
            "explained": self.explained,
        }

    @classmethod
    def of_checkpoint(cls, content: dict[str, Any]) -> Self:
        """The inverse of `to_checkpoint`."""
        return cls(content["mean"].float(), content["basis"], content["scales"], content["explained"])


def left_out_weights(gram: Tensor, penalty: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
    """Weights (n,n): times the n centred maps they give each map's residual from a fit without its group.

    `gram` (n,n) holds the inner products of the centred maps. The fit is a mean and a ridge regression on the other
    images. This is exact, in closed form: for a group B the residuals are inverse(Q_BB) (Q maps)_B, where Q is the
    inverse of the penalised Gram matrix with the mean taken out (Allen 1974, PRESS, for single images; Dubrule 1983,
    Cross Validation of Kriging, for groups and with a mean).
    """
    number = len(gram)
    inverse = torch.linalg.inv(gram + penalty * torch.eye(number, dtype=gram.dtype, device=gram.device))
    without_mean = inverse - 1 / (number * penalty)
    weights = torch.empty_like(inverse)
    for group in groups:
        rows = torch.as_tensor(group, device=gram.device)
        weights[rows] = torch.linalg.solve(without_mean[rows[:, None], rows], inverse[rows])
    return weights


def leading(gram: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvalues (R,) and eigenvectors (n,R) to keep: the largest ones, without those that are nearly 0."""
    values, vectors = (found.flip(-1) for found in torch.linalg.eigh(gram))
    kept = max(1, min(components_of(len(gram)), int((values > 1e-6 * values[0]).sum())))
    return values[:kept], vectors[:, :kept]


def components_of(number: int) -> int:
    """The largest number of components to keep for this number of images."""
    return min(MOST_COMPONENTS, max(FEWEST_COMPONENTS, number // 2))


def lost_by_truncation(gram: Tensor, penalty: Tensor) -> float:
    """The factor by which dropping components raises the squared error on left-out images; 1 if all are kept.

    Estimated by cross-validation in FOLDS folds, from the Gram matrix (n,n) of the centred maps alone.
    """
    number = len(gram)
    kept = components_of(number)
    if number <= kept:
        return 1.0
    errors = torch.zeros(2, dtype=gram.dtype, device=gram.device)
    for fold in range(FOLDS):
        left_out = torch.arange(number, device=gram.device) % FOLDS == fold
        rows = torch.eye(number, dtype=gram.dtype, device=gram.device) - (~left_out / (~left_out).sum())
        learned, tested = rows[~left_out], rows[left_out]
        values, vectors = (found.flip(-1) for found in torch.linalg.eigh(learned @ gram @ learned.T))
        coefficients = (tested @ gram @ learned.T @ vectors).square() / values.clamp_min(1e-9 * values[0])
        shrinkage = values / (values + penalty)
        explained = coefficients * (2 * shrinkage - shrinkage.square())
        total = (tested @ gram * tested).sum()
        errors += torch.stack([total - explained[:, :kept].sum(), total - explained.sum()])
    return (errors[0] / errors[1]).item()
