"""Images decoded and resized once, kept as bytes while they fit."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from student_teacher.images.preprocessing import BUDGET
from student_teacher.runtime.prefetch import prefetched


class ImageStore:
    """Random access to uint8 images (3,H,W) that `load(index)` gives, for indices below `number`.

    Loaded once, with a progress bar, until `budget` bytes are full; the others are loaded again each time, while the
    batch before is being computed. Images may differ in size.
    """

    def __init__(self, load: Callable[[int], Tensor], number: int, budget: int = BUDGET):
        self._load, self._number = load, number
        self._kept: dict[int, Tensor] = {}
        for index, image in enumerate(tqdm(prefetched(load, range(number)), "images", number, leave=False)):
            budget -= image.nbytes
            if budget < 0:
                break
            self._kept[index] = image

    def __len__(self) -> int:
        return self._number

    def batches(self, wanted: Iterable[Sequence[int]]) -> Iterator[list[Tensor]]:
        """For each sequence of indices its images, gathered by size: a list of (n,3,H,W)."""
        return prefetched(self._gather, wanted)

    def _gather(self, indices: Sequence[int]) -> list[Tensor]:
        by_size: dict[torch.Size, list[Tensor]] = {}
        for index in indices:
            image = self._kept[index] if index in self._kept else self._load(index)
            by_size.setdefault(image.shape, []).append(image)
        return [torch.stack(images) for images in by_size.values()]
