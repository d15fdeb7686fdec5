"""Batch normalisation over the batches of all processes."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from student_teacher.runtime import distributed


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Normalises (N,C,H,W) by mean and variance over all processes, whose N, H and W may differ; N may be 0.

    Equals nn.BatchNorm2d on the whole batch, gradients included, if the processes' losses add up to the whole batch's
    loss; the gradients of weight and bias are this process's part. Not nn.SyncBatchNorm: that works on GPUs only and is
    not an nn.BatchNorm2d, which the networks look for.
    """

    @classmethod
    def convert(cls, module: nn.Module) -> None:
        """Make every nn.BatchNorm2d in `module` use all processes; with one process nothing changes."""
        if distributed.active():
            for layer in module.modules():
                if isinstance(layer, nn.BatchNorm2d):
                    layer.__class__ = cls  # the same tensors under the same names: only what it computes is new

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        normalised, mean, squares, count = _Normalise.apply(x, self.weight, self.bias, self.eps)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(squares / (count - 1), self.momentum)
        return normalised


class _Normalise(torch.autograd.Function):
    """Uses PyTorch's kernels for the passes over x: written out in float32 they took longer than the convolutions."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        count = x.numel() // x.shape[1]
        mean, variance = torch.zeros_like(weight), torch.zeros_like(weight)
        if count:
            mean, variance = torch.batch_norm_update_stats(x, mean, variance, momentum=0.0)
        # Two passes, the second about the common mean: no difference of large numbers.
        sums = distributed.all_reduce(torch.cat([mean * count, mean.new_tensor([count])]).double())
        total = sums[-1]
        common = sums[:-1] / total
        squares = distributed.all_reduce((variance.double() + (mean - common).square()) * count)
        mean, variance = common.float(), (squares / total).float()
        ctx.save_for_backward(x, weight, mean, variance, total)
        ctx.eps = eps
        squares, total = squares.float(), total.float()
        ctx.mark_non_differentiable(mean, squares, total)
        return F.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps), mean, squares, total

    @staticmethod
    def backward(ctx, gradient, *_):
        x, weight, mean, variance, total = ctx.saved_tensors
        scale = (variance + ctx.eps).rsqrt()
        found, for_weight, for_bias = gradient, torch.zeros_like(weight), torch.zeros_like(weight)
        if x.numel():  # as if mean and variance were constants
            found, for_weight, for_bias = torch.ops.aten.native_batch_norm_backward(
                gradient, x, weight, mean, variance, mean, scale, False, ctx.eps, [True, True, True]
            )
        sums = distributed.all_reduce(torch.cat([for_bias, for_weight]).double())
        by_mean, by_variance = (weight * scale * part for part in (sums / total).float().chunk(2))
        if x.numel():
            found -= F.batch_norm(x, mean, variance, by_variance, by_mean, training=False, eps=ctx.eps)
        return found, for_weight, for_bias, None
