"""Knowledge distillation: the teacher's training targets and its answers (section 3.1 of "Uninformed Students").

There are two ways. `PatchDistillation` is the paper's: backbone and teacher describe the same patches, one by one.
`DenseDistillation` runs the backbone once on a whole view, and the teacher describes every fourth pixel of it: that
gives thousands of targets at the cost of a few patches.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from AnomalyNet import AnomalyNet
from FDFEAnomalyNet import FDFEAnomalyNet
from student_teacher.images import preprocessing
from student_teacher.runtime import device, distributed
from student_teacher.teachers import backbones
from student_teacher.teachers.backbones import Backbone
from student_teacher.training.patches import PatchSampler
from student_teacher.training.views import ViewSampler

DENSE_STRIDE = backbones.STRIDE // 2  # the backbone sees a view at twice the teacher's resolution
TRIPLETS = 128  # drawn from a batch's dense descriptors; few, as the distances between all of them are computed
VIEW = {17: 128, 33: 256, 65: 256}  # side in pixels; smaller for the net without pooling, which is the slowest


class Answer(NamedTuple):
    """A net's descriptors (n,C) of a batch, and triplets if requested.

    `anchors` (m,C) are some or all of the descriptors; `positives` (m,C) are those of the same patches, shifted.
    """

    descriptors: Tensor
    anchors: Tensor
    positives: Tensor | None


class PatchDistillation:
    """The paper's way: batches of patches, and the backbone's pooled features of each, resized to `backbone_size`.

    `square`: as in patches.PatchSampler.
    """

    def __init__(
        self, backbone: Backbone, patch_size: int, backbone_size: int, where: torch.device, *, square: bool = False
    ):
        self._backbone, self.patch_size, self._size, self._where = backbone, patch_size, backbone_size, where
        self._square = square

    def batches(
        self, pictures: Sequence[Image.Image], seed: int, steps: range, size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """For each step, patches and partners from patches.PatchSampler."""
        return PatchSampler(pictures, self.patch_size, seed, square=self._square).batches(steps, size)

    def features(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The backbone's features of a batch (n,F), to which descriptors should decode."""
        return self._backbone.of_patches(batch[0].to(self._where), self._size).float()

    def pixels(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The net's input for a batch: (n,3,p,p)."""
        return batch[0].to(self._where)

    def ask(self, net: AnomalyNet, batch: tuple[Tensor, Tensor], triplets: bool) -> Answer:
        """The net's descriptors of a batch."""
        patches, partners = (part.to(self._where) for part in batch)
        if not triplets:
            descriptors = net(patches).float()
            return Answer(descriptors, descriptors, None)
        descriptors, positives = net(torch.cat([patches, partners])).float().chunk(2)
        return Answer(descriptors, descriptors, positives)


class DenseDistillation:
    """Batches of views: backbone features with stride 8 on a view of twice the size, descriptors with stride 4.

    Descriptors are computed wherever the patch lies within the view, at the features' positions, to less than one
    pixel. Positives are the descriptors of the next place along a random axis, 4 pixels away.
    """

    def __init__(self, backbone: Backbone, patch_size: int, where: torch.device):
        self.patch_size = patch_size
        self._backbone, self._view, self._where = backbone, VIEW[patch_size], where
        # Feature i is at pixel 8 i + first of the large view: at 4 i + (first + 0.5) / 2 - 0.5 of the small one.
        pixel = round(backbone.first_fine / 2 - 0.25)
        self._start = (pixel - patch_size // 2) % DENSE_STRIDE
        first = (self._start + patch_size // 2 - pixel) // DENSE_STRIDE
        field = FDFEAnomalyNet(AnomalyNet(patch_size), DENSE_STRIDE).receptive_field[0]
        self._places = slice(first, first + (self._view - self._start - field) // DENSE_STRIDE + 1)

    def batches(
        self, pictures: Sequence[Image.Image], seed: int, steps: range, size: int
    ) -> Iterator[tuple[int, Tensor]]:
        """For each step, a seed for its triplets, and views from views.ViewSampler."""
        seeds = (device.seed_of(seed, "triplets", step) for step in steps)
        return zip(seeds, ViewSampler(pictures, self._view, seed, self._where).batches(steps, size), strict=True)

    def features(self, batch: tuple[int, Tensor]) -> Tensor:
        """The backbone's features of a batch (n,F), to which descriptors should decode."""
        features = self._backbone.dense(preprocessing.normalise(batch[1]))
        return features[:, :, self._places, self._places].permute(0, 2, 3, 1).flatten(0, 2)

    def pixels(self, batch: tuple[int, Tensor]) -> Tensor:
        """The net's input for a batch, views at half the backbone's size: (N,3,side,side)."""
        return F.avg_pool2d(preprocessing.normalise(batch[1]), 2)

    def ask(self, net: AnomalyNet, batch: tuple[int, Tensor], triplets: bool) -> Answer:
        """The net's descriptors of a batch."""
        seed, _ = batch
        pixels = self.pixels(batch)[:, :, self._start :, self._start :]
        dense = FDFEAnomalyNet(net, DENSE_STRIDE).describe_padded(pixels).float().permute(0, 2, 3, 1)
        views = round(distributed.summed(len(dense)))
        drawn = places_beside((views, *dense.shape[1:3]), torch.Generator().manual_seed(seed))
        chosen, beside = map(in_own_share, drawn)
        return Answer(dense.flatten(0, 2), dense[chosen], dense[beside] if triplets else None)


Distillation = PatchDistillation | DenseDistillation
Batch = tuple[Tensor, Tensor] | tuple[int, Tensor]  # an item of their `batches`
Places = tuple[Tensor, Tensor, Tensor]  # views, rows, columns


def places_beside(shape: tuple[int, int, int], random: torch.Generator) -> tuple[Places, Places]:
    """At most TRIPLETS random places among (views, rows, columns), and for each the place below it or to its right.

    Rows and columns are even, so that all places differ: else a descriptor could be its own negative.
    """
    views, rows, columns = shape
    grid = torch.cartesian_prod(torch.arange(views), torch.arange(0, rows - 1, 2), torch.arange(0, columns - 1, 2))
    view, row, column = grid[torch.randperm(len(grid), generator=random)[:TRIPLETS]].unbind(1)
    down = torch.randint(2, view.shape, generator=random)
    return (view, row, column), (view, row + down, column + 1 - down)


def in_own_share(places: Places) -> Places:
    """Of places in the views of all processes, those in this process's views, numbered within the process."""
    number = distributed.processes()
    view, row, column = (values[places[0] % number == distributed.rank()] for values in places)
    return view // number, row, column
