"""Pictures of any size, decoded once."""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from student_teacher.images import preprocessing, reading
from student_teacher.images.ignored import painter
from student_teacher.runtime.errors import UserError


class Pictures:
    """The pictures of files, RGB, as a sequence: read when asked for, kept in memory until `budget` bytes are full.

    Resized to `image_size` (None keeps their size), then painted over where they are `ignored` (h,w). Several threads
    may read at once. A broken file is replaced by the next one, with a line on stderr: among a million pictures, one
    should not end a training. Raises UserError where all are broken.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        image_size: preprocessing.Size = None,
        budget: int = preprocessing.BUDGET,
        *,
        value_range: reading.ValueRange | None = None,
        ignored: np.ndarray | None = None,
    ):
        self._paths, self._image_size, self._budget, self._value_range = paths, image_size, budget, value_range
        self._paint = painter(ignored)
        self._kept: dict[int, Image.Image] = {}
        self._broken: set[int] = set()

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Image.Image:
        for place in range(index, index + len(self)):
            picture = self._picture(place % len(self))
            if picture is not None:
                return picture
        raise UserError(f"{self._paths[index]}: broken, as are all {len(self)} pictures of its set; give others")

    def _picture(self, index):
        """The picture of this very file, None where it is broken."""
        if index in self._kept:
            return self._kept[index]
        try:
            picture = reading.load_rgb(self._paths[index], self._value_range)
            picture = self._paint(preprocessing.resize(picture, self._image_size))
        except UserError as error:
            if index not in self._broken:
                self._broken.add(index)
                print(f"left out: {error}", file=sys.stderr)
            return None
        self._budget -= 3 * picture.width * picture.height
        if self._budget >= 0:
            self._kept[index] = picture
        return picture
