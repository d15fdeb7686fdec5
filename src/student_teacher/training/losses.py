"""The losses of "Uninformed Students" (Bergmann et al., CVPR 2020, arXiv 1911.02357v2), with the paper's equations.

Squared distances are means over channels where the paper takes sums: with normalised targets, 1 is then the loss of
predicting the mean, and neither margin nor weights depend on the number of channels. `literal` uses the paper's
equations as printed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def knowledge_distillation(descriptors: Tensor, features: Tensor, literal: bool = False) -> Tensor:
    """Section 3.1, equation (1): squared distance of decoded descriptors (N,F) to the backbone's features (N,F)."""
    return F.mse_loss(descriptors, features) * (features.shape[1] if literal else 1)


def metric_learning(anchors: Tensor, positives: Tensor, margin: float = 1.0, literal: bool = False) -> Tensor:
    """Section 3.1, equations (2) to (4): triplets of descriptors (N,C), mean over N. In [0, inf).

    `positives` are descriptors of the same patches, shifted; in the paper also with noise. The negative is the hardest
    one in the batch: the other patch whose descriptor is nearest to the anchor or to the positive. With `literal` it is
    the next patch of the batch, whose order is random. Raises ValueError for N < 2.
    """
    if len(anchors) < 2:
        raise ValueError("metric learning needs two patches or more: negatives are the other patches")
    if literal:
        negatives = anchors.roll(1, 0)
        to_positive, *to_negative = (
            (a - b).square().sum(1) for a, b in ((anchors, positives), (anchors, negatives), (positives, negatives))
        )
        return (margin + to_positive - torch.minimum(*to_negative)).clamp_min(0).mean()
    to_positive = (anchors - positives).square().mean(1)
    same = torch.eye(len(anchors), dtype=torch.bool, device=anchors.device)
    nearest = torch.minimum(squared_distances(anchors, anchors), squared_distances(positives, anchors))
    to_negative = nearest.masked_fill(same, torch.inf).amin(1)
    return (margin + to_positive - to_negative).clamp_min(0).mean()


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances, means over channels, of each row of `a` (N,C) to each row of `b` (M,C): (N,M), in [0, inf)."""
    squares = a.square().mean(1)[:, None] + b.square().mean(1)[None, :]
    return (squares - 2 * (a @ b.T) / a.shape[1]).clamp_min(0)


def compactness(descriptors: Tensor, literal: bool = False) -> Tensor:
    """Section 3.1, equation (5): correlation between different dimensions of the descriptors (N,C) over the batch.

    The mean magnitude of the off-diagonal entries of the (C,C) correlation matrix, in [0, 1]. `literal` is the paper's
    sum of these entries, where opposite signs cancel, in [-C, C (C - 1)]. Raises ValueError for N < 2.
    """
    if len(descriptors) < 2:
        raise ValueError("a correlation needs two descriptors or more")
    centred = descriptors - descriptors.mean(0)
    unit = centred / centred.norm(dim=0).clamp_min(1e-12)
    correlations = unit.T @ unit
    size = len(correlations)
    values = correlations if literal else correlations.abs()
    total = values.sum() - values.diagonal().sum()
    return total if literal else total / (size * (size - 1))


def regression(student: Tensor, teacher: Tensor, literal: bool = False) -> Tensor:
    """Section 3.2, equation (7): squared distance of a student's descriptors (N,C,H,W) to the normalised teacher's."""
    return F.mse_loss(student, teacher) * (teacher.shape[1] if literal else 1)
