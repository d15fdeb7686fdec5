"""A patch network made dense: equal to ExtendedAnomalyNet, fast."""

from torch import Tensor, nn

import FDFE
from FDFE import pad


class FDFEAnomalyNet(nn.Module):
    """The descriptors of a patch network at every `stride`-th pixel: (N,3,H,W) -> (N,C,ceil(H/stride),ceil(W/stride)).

    Equals ExtendedAnomalyNet(net)(images)[:, :, ::stride, ::stride], gradients too, for any net made of unpadded
    convolutions, pooling and pointwise layers, and any H and W. Only what those pixels need is computed.
    Layers that tell training from evaluation (batch normalisation, dropout) equal it in evaluation mode.

    `net` is an AnomalyNet, or an nn.Sequential with `patch_size` given. Parameters are shared with it, not copied.
    `padding` says what stands round the image, as in FDFE.pad.
    Raises ValueError for a net that can't be made dense, or that leaves more or less than 1 x 1 of one patch.
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
        # A plain list: the parameters are net's.
        self.placed_layers = [
            (layer, FDFE.Placement((row[0], column[0]), (row[1], column[1])))
            for layer, row, column in zip(layers, rows, columns, strict=True)
        ]

    def forward(self, images: Tensor, offset: tuple[int, int] = (0, 0)) -> Tensor:
        """Describe `images` (N,3,H,W) at rows offset[0]::stride and columns offset[1]::stride."""
        return self.describe_padded(self.pad(images, offset))

    def pad(self, images: Tensor, offset: tuple[int, int] = (0, 0)) -> Tensor:
        """Surround (or trim) such that the first patch is centred on pixel `offset`, the last inside."""
        return pad(images, *self.margins(offset), self.padding)

    def margins(self, offset: tuple[int, int] = (0, 0)) -> tuple[tuple[int, int], tuple[int, int]]:
        """What `pad` adds: rows (above, below) and columns (left, right)."""
        half = self.patch_size // 2
        rows, columns = (
            (half - start, field - 1 - half) for start, field in zip(offset, self.receptive_field, strict=True)
        )
        return rows, columns

    def describe_padded(self, pixels: Tensor) -> Tensor:
        """Describe all patches that lie within `pixels`, every `stride`-th along both axes."""
        x = pixels[:, :, :: self.pixel_step[0], :: self.pixel_step[1]]
        ours = False  # whether x is no longer the caller's
        for layer, placement in self.placed_layers:
            x = FDFE.apply_layer(layer, x, placement, overwrite=ours and not x.requires_grad)
            ours = ours or isinstance(layer, nn.Conv2d)
        return x
