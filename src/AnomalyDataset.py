"""The images of one category, from its index."""

from collections.abc import Callable
from pathlib import Path

from PIL import Image
from torch.utils.data import Dataset

from student_teacher.images.index import COLUMNS, read_index, read_settings
from student_teacher.images.indexing import renew_index
from student_teacher.images.reading import load_mask, load_reduced
from student_teacher.runtime import distributed
from student_teacher.runtime.errors import UserError


class AnomalyDataset(Dataset):
    """The images of one category that meet a constraint, each with its mask and label.

    An item is a dict:
        image: the image (PIL, mode RGB) after `transform`.
        mask: the mask (PIL, mode L, 255 on defects) after `gt_transform`; all 0 if there is none.
        label: 0 for good, 1 for a defect, -1 where nothing is known (MVTec AD 2's private images).
        path: the image's path in the category's folder, with forward slashes.
        size: the height and width of the image's file.

    Args:
        root_dir: the category's folder, which holds the index that mvtec_dataset.sh writes, NAME/NAME.csv. Where
            images have come, gone or changed since, it is written again.
        transform: from a PIL image to what the network takes, such as a tensor (3,H,W); None leaves the image.
        gt_transform: the same for the mask, such as to (1,H,W); None leaves the mask.
        least: large JPEGs may be read at a reduced size, both sides at least this long: see `reading.load_reduced`.
        index: where the index is, if it is not in its usual place: see `index.index_path`.
        **constraint: columns of the index and the value that a row must have, or a tuple of values, as in
            `type=("train", "validation"), label=0`.

    Attributes:
        rows: the index's rows that meet the constraint, in its order; each a dict of COLUMNS, `label` an int.
            `gt_name` is empty for good images, and for defects that have no mask; a file, a folder of files, or
            labelme's .json.
        value_range: of images of more than 8 bits, the values that become black and white: those that
            mvtec_dataset.sh found, or was given. None if it found only images of 8 bits.
        mask_threshold: how bright masks mark a defect, from 0 to 255; None: see `reading.load_mask`.

    Raises:
        UserError: the index is missing or broken; on access, if an image is missing or broken, or its mask has another
            size.
        ValueError: the constraint names a column that does not exist.
    """

    def __init__(
        self,
        root_dir: str | Path,
        transform: Callable | None = None,
        gt_transform: Callable | None = None,
        least: int | None = None,
        *,
        index: Path | None = None,
        **constraint: str | int | tuple[str | int, ...],
    ):
        unknown = sorted(set(constraint) - set(COLUMNS))
        if unknown:
            raise ValueError(f"no such column: {', '.join(unknown)}; there are {', '.join(COLUMNS)}")
        self.root_dir = Path(root_dir).absolute()  # not resolve(): the index is named like a link, not its target
        self.transform = transform
        self.gt_transform = gt_transform
        self.least = least
        distributed.wait_for_all()
        if distributed.is_first():
            renew_index(self.root_dir, index)
        distributed.wait_for_all()
        settings = read_settings(self.root_dir, index)
        self.value_range = settings["value_range"] and tuple(settings["value_range"])
        self.mask_threshold = settings["mask_threshold"]
        rows = read_index(self.root_dir, index)
        allowed = {column: value if isinstance(value, tuple) else (value,) for column, value in constraint.items()}
        self.rows = [row for row in rows if all(row[column] in values for column, values in allowed.items())]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        row = self.rows[index]
        image, (height, width) = load_reduced(self.root_dir / row["image_name"], self.least, self.value_range)
        if row["gt_name"]:
            mask = load_mask(self.root_dir / row["gt_name"], self.mask_threshold)
        else:
            mask = Image.new("L", (width, height))
        if mask.size != (width, height):
            raise UserError(
                f"{self.root_dir / row['gt_name']} has {mask.width} x {mask.height} pixels, its image {width} x "
                f"{height}: correct it and run ./mvtec_dataset.sh again"
            )
        return {
            "image": self.transform(image) if self.transform else image,
            "mask": self.gt_transform(mask) if self.gt_transform else mask,
            "label": row["label"],
            "path": row["image_name"],
            "size": (height, width),
        }
