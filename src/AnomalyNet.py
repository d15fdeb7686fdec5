"""The patch networks of "Uninformed Students" (Bergmann et al., CVPR 2020, tables in the appendix)."""

import copy
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

DESCRIPTOR_SIZE = 512
LEAKY_SLOPE = 5e-3


class Convolution(NamedTuple):
    """A convolution to `channels` with a square kernel; leaky ReLU follows."""

    channels: int
    kernel: int


class Pooling(NamedTuple):
    """Max pooling, `size` x `size`, with stride `size`."""

    size: int


C, P = Convolution, Pooling(2)

ARCHITECTURES: dict[int, tuple[Convolution | Pooling, ...]] = {
    65: (C(128, 5), P, C(128, 5), P, C(256, 5), P, C(256, 4), C(128, 1)),
    33: (C(128, 5), P, C(256, 5), P, C(256, 2), C(128, 4)),
    17: (C(128, 6), C(256, 5), C(256, 5), C(128, 4)),
}
PATCH_SIZES = tuple(sorted(ARCHITECTURES))
DEFAULT_PATCH_SIZES = (33, 65)


class AnomalyNet(nn.Module):
    """Describes patches of `patch_size` x `patch_size` pixels: (N,3,p,p) -> (N,descriptor_size).

    Teacher and students share this architecture. One patch leaves `layers` with a spatial size of 1 x 1; FDFEAnomalyNet
    applies the network to every pixel of an image.

    With a `descriptor_size` of 128, descriptors are the output of the last convolution in the paper's tables, without
    activation: the layer that decodes them is then used only for distillation, as in the paper (section 4).

    `batch_normalisation` adds one after every convolution but the last. It speeds up training: a teacher needs hundreds
    of steps instead of thousands. `folded` merges it into the weights afterwards.

    Raises ValueError for a patch size that is not in ARCHITECTURES, and for patches of another size.
    """

    def __init__(self, patch_size: int, batch_normalisation: bool = False, descriptor_size: int = DESCRIPTOR_SIZE):
        super().__init__()
        if patch_size not in ARCHITECTURES:
            raise ValueError(f"patch size {patch_size}: choose one of {', '.join(map(str, PATCH_SIZES))}")
        self.patch_size, self.descriptor_size = patch_size, descriptor_size
        layers: list[nn.Module] = []
        channels = 3
        for layer in ARCHITECTURES[patch_size]:
            match layer:
                case Convolution(width, kernel):
                    convolution = nn.Conv2d(channels, width, kernel)
                    nn.init.kaiming_normal_(convolution.weight, a=LEAKY_SLOPE, nonlinearity="leaky_relu")
                    nn.init.zeros_(convolution.bias)
                    layers.append(convolution)
                    if batch_normalisation:
                        layers.append(nn.BatchNorm2d(width))
                    layers.append(nn.LeakyReLU(LEAKY_SLOPE))
                    channels = width
                case Pooling(size):
                    layers.append(nn.MaxPool2d(size))
        if descriptor_size == channels:
            while not isinstance(layers[-1], nn.Conv2d):
                layers.pop()
        else:
            layers.append(nn.Conv2d(channels, descriptor_size, 1))
        self.layers = nn.Sequential(*layers)

    def forward(self, patches: Tensor) -> Tensor:
        expected = (3, self.patch_size, self.patch_size)
        if patches.ndim != 4 or patches.shape[1:] != expected:
            raise ValueError(f"patches of shape {tuple(patches.shape)}: expected (N, {', '.join(map(str, expected))})")
        return self.layers(patches).flatten(1)

    @torch.no_grad()
    def folded(self) -> "AnomalyNet":
        """Return the same network in evaluation mode, with batch normalisation merged into the convolutions."""
        plain = AnomalyNet(self.patch_size, descriptor_size=self.descriptor_size)
        layers = [layer for layer in self.layers if not isinstance(layer, nn.BatchNorm2d)]
        norms = {self.layers[place - 1]: norm for place, norm in enumerate(self.layers) if norm not in layers}
        for target, layer in zip(plain.layers, layers, strict=True):
            if layer in norms:
                layer = fuse_conv_bn_eval(layer.eval(), norms[layer].eval())
            target.load_state_dict(layer.state_dict())
        return plain.eval()

    @torch.no_grad()
    def start_from(self, trained: "AnomalyNet", images: Tensor) -> None:
        """Take over the weights of a net without batch normalisation, so that descriptors stay the same.

        Scale and shift of this net's batch normalisation are set to undo it, with the statistics of `images` (N,3,H,W);
        this is exact on those images.
        """
        weights = iter(trained.layers)
        for layer in self.layers:
            if isinstance(layer, nn.BatchNorm2d):
                variance, mean = torch.var_mean(images, (0, 2, 3), correction=0)
                layer.weight.copy_((variance + layer.eps).sqrt())
                layer.bias.copy_(mean)
            else:
                layer.load_state_dict(next(weights).state_dict())
            images = layer(images)

    @torch.no_grad()
    def with_normalised_descriptors(self, mean: Tensor, std: Tensor) -> Self:
        """Return a copy whose descriptors are (descriptor - mean) / std, per channel (C,).

        The last convolution is linear, so the paper's normalisation (section 3.2) is merged into its weights.
        """
        normalised = copy.deepcopy(self)
        decode = normalised.layers[-1]
        mean, std = (values.to(decode.weight.device).double() for values in (mean, std))
        decode.weight.copy_(decode.weight.double() / std[:, None, None, None])
        decode.bias.copy_((decode.bias.double() - mean) / std)
        return normalised

    @torch.no_grad()
    def projected(self, projection: Tensor) -> Self:
        """Return a copy whose descriptors are `projection` (K,C) times the descriptor, (K,)."""
        found = copy.deepcopy(self)
        found.descriptor_size = len(projection)
        decode = found.layers[-1]
        projection = projection.to(decode.weight.device).double()
        found.layers[-1] = nn.Conv2d(decode.in_channels, len(projection), decode.kernel_size).to(decode.weight.device)
        found.layers[-1].weight.copy_(torch.tensordot(projection, decode.weight.double(), 1))
        found.layers[-1].bias.copy_(projection @ decode.bias.double())
        return found
