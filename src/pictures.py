"""Pictures of any size, decoded once."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

import images
import preprocessing


class Pictures:
    """The pictures of files, RGB, as a sequence: read when asked for, kept in memory until `budget` bytes are full.

    Resized to `image_size` (None leaves them as they are). Several threads may ask at once.
    """

    def __init__(
        self, paths: Sequence[Path], image_size: preprocessing.Size = None, budget: int = preprocessing.BUDGET
    ):
        self._paths, self._image_size, self._budget = paths, image_size, budget
        self._kept: dict[int, Image.Image] = {}

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Image.Image:
        picture = self._kept.get(index)
        if picture is None:
            picture = preprocessing.resize(images.load_rgb(self._paths[index]), self._image_size)
            self._budget -= 3 * picture.width * picture.height
            if self._budget >= 0:
                self._kept[index] = picture
        return picture
