"""A patch network on every pixel, patch by patch: slow, the reference for FDFEAnomalyNet."""

import torch
from torch import Tensor, nn

from FDFE import pad


class ExtendedAnomalyNet(nn.Module):
    """Applies a patch network to the patch around every pixel: (N,3,H,W) -> (N,C,H,W).

    The image is padded as `padding` says, see FDFE.pad, so that border pixels have a patch too. `net` maps (B,3,p,p) to
    (B,C); `patch_size` is p, by default `net.patch_size`; `batch_size` patches are computed at a time.
    """

    def __init__(self, net: nn.Module, patch_size: int | None = None, batch_size: int = 256, padding: str = "zeros"):
        super().__init__()
        self.net = net
        self.patch_size = net.patch_size if patch_size is None else patch_size
        self.batch_size = batch_size
        self.padding = padding

    def forward(self, images: Tensor) -> Tensor:
        number, _, height, width = images.shape
        size, before = self.patch_size, self.patch_size // 2
        after = size - 1 - before
        padded = pad(images, (before, after), (before, after), self.padding)
        patches = padded.unfold(2, size, 1).unfold(3, size, 1)  # a view (N,3,H,W,p,p): nothing is copied yet
        positions = torch.cartesian_prod(torch.arange(number), torch.arange(height), torch.arange(width))
        descriptors = torch.cat(
            [self.net(patches[n, :, y, x]) for n, y, x in (part.unbind(1) for part in positions.split(self.batch_size))]
        )
        return descriptors.unflatten(0, (number, height, width)).permute(0, 3, 1, 2)
