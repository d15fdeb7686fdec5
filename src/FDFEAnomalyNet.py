"""A patch network applied densely to images: equal to ExtendedAnomalyNet, but fast."""

from torch import Tensor, nn

import FDFE
from FDFE import pad


class FDFEAnomalyNet(nn.Module):
    """The descriptors of a patch network at every `stride`-th pixel: (N,3,H,W) -> (N,C,ceil(H/stride),ceil(W/stride)).

    Equals ExtendedAnomalyNet(net)(images)[:, :, ::stride, ::stride], including gradients, for any net of unpadded
    convolutions, pooling and pointwise layers, and any H and W. Only what those pixels need is computed. With batch
    normalisation or dropout it is equal in evaluation mode only.

    `net` is an AnomalyNet, or an nn.Sequential with `patch_size` given. Parameters are shared with it, not copied.
    `padding` is one of FDFE.PADDINGS. Raises ValueError for a net that can't be made dense, or whose output for one
    patch is not 1 x 1.
    """

    def __init__(self, net: nn.Module, stride: int = 1, patch_size: int | None = None, padding: str = "zeros"):
        super().__init__()
        self.net = net
        self.stride = stride
        self.padding = padding
        self.patch_size = net.patch_size if patch_size is None else patch_size
        layers = FDFE.activations_after_pooling(FDFE.flat_layers(getattr(net, "layers", net)))
        windows = [FDFE.window(layer) for layer in layers]
        left = tuple(FDFE.output_size(windows, self.patch_size, axis) for axis in (0, 1))
        if left != (1, 1):
            raise ValueError(f"the net leaves {left[0]} x {left[1]} of a patch of {self.patch_size} pixels, not 1 x 1")
        (row_step, rows), (column_step, columns) = (FDFE.grids(windows, stride, axis) for axis in (0, 1))
        self.pixel_step = (row_step, column_step)
        self.receptive_field = tuple(FDFE.receptive_field(windows, axis) for axis in (0, 1))
        # A plain list, so that the parameters are registered only once, in net.
        self.placed_layers = [
            (layer, FDFE.Placement((row[0], column[0]), (row[1], column[1])))
            for layer, row, column in zip(layers, rows, columns, strict=True)
        ]

    def forward(self, images: Tensor, offset: tuple[int, int] = (0, 0)) -> Tensor:
        """Describe `images` (N,3,H,W) at rows offset[0]::stride and columns offset[1]::stride."""
        return self.describe_padded(self.pad(images, offset))

    def pad(self, images: Tensor, offset: tuple[int, int] = (0, 0)) -> Tensor:
        """Pad (or crop) so that the first patch is centred on pixel `offset`, and the last one is inside."""
        return pad(images, *self.margins(offset), self.padding)

    def margins(self, offset: tuple[int, int] = (0, 0)) -> tuple[tuple[int, int], tuple[int, int]]:
        """The padding of `pad`: rows (above, below) and columns (left, right)."""
        half = self.patch_size // 2
        rows, columns = (
            (half - start, field - 1 - half) for start, field in zip(offset, self.receptive_field, strict=True)
        )
        return rows, columns

    def describe_padded(self, pixels: Tensor) -> Tensor:
        """Descriptors of all patches within padded `pixels`, at every `stride`-th pixel along both axes."""
        x = pixels[:, :, :: self.pixel_step[0], :: self.pixel_step[1]]
        ours = False  # whether x may be overwritten, as it is not the caller's
        for layer, placement in self.placed_layers:
            x = FDFE.apply_layer(layer, x, placement, overwrite=ours and not x.requires_grad)
            ours = ours or isinstance(layer, nn.Conv2d)
        return x
