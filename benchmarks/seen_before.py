"""The image AU-ROC that a category allows without looking for defects, only from which parts were seen in training.

Some data sets have several photographs of the same part, randomly split into training and test, while the defective
parts occur only in the test images. A method that remembers its training images can then separate good from defective
by "have I seen this part?". This measures how much that alone achieves: the image score is 1 minus the highest
correlation of a thumbnail, with coarse shading removed, with any good training image, over shifts by up to a quarter of
its size. Few defects are large enough to be visible in a thumbnail.

    python3 benchmarks/seen_before.py magnetic_tile
"""

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import measuring
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from AnomalyDataset import AnomalyDataset
from student_teacher.evaluation import metrics
from student_teacher.runtime.bars import with_bar
from student_teacher.runtime.errors import UserError, run
from student_teacher.runtime.paths import add_folders
from student_teacher.runtime.prefetch import prefetched

THUMBNAIL, SHIFT, SHADES = 48, 12, 15  # pixels: side, largest shift, width of the moving mean that is subtracted
ALIKE = 0.8  # two images with this correlation or more are likely to show the same part


def parse_arguments(arguments: list[str] | None = None) -> Namespace:
    """Read the command line."""
    options = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    options.add_argument("category", help="a folder in data/, prepared by ./mvtec_dataset.sh CATEGORY")
    add_folders(options, "data")
    options.add_argument("--output", type=Path, help="write the figures here, as JSON")
    return options.parse_args(arguments)


def thumbnails(dataset: AnomalyDataset) -> Tensor:
    """The `grey_thumbnail`s of a dataset without coarse shading, with mean 0 and norm 1: (N,THUMBNAIL,THUMBNAIL)."""
    samples = prefetched(dataset.__getitem__, range(len(dataset)))
    grey = [sample["image"] for sample in with_bar(samples, len(dataset), "images")]
    half = SHADES // 2
    shades = F.avg_pool2d(F.pad(found := torch.stack(grey), (half,) * 4, mode="reflect"), SHADES, 1)
    found = (found - shades).flatten(1)
    found = found - found.mean(1, keepdim=True)
    return F.normalize(found).view(-1, THUMBNAIL, THUMBNAIL)


def correlations(tested: Tensor, good: Tensor) -> Tensor:
    """Correlation of each tested thumbnail (N,h,w) with each good one (M,h,w), at the best shift: (N,M)."""
    size = (2 * THUMBNAIL,) * 2
    spectra = torch.fft.rfft2(good, s=size)
    found = []
    for spectrum in torch.fft.rfft2(tested, s=size):
        shifted = torch.fft.irfft2(spectrum.conj() * spectra, s=size).roll((SHIFT, SHIFT), (1, 2))
        found.append(shifted[:, : 2 * SHIFT + 1, : 2 * SHIFT + 1].amax((1, 2)))
    return torch.stack(found)


def grey_thumbnail(image: Image.Image) -> Tensor:
    """The image in grey, as (1,THUMBNAIL,THUMBNAIL) from 0 to 255."""
    pixels = np.asarray(image.convert("L").resize((THUMBNAIL, THUMBNAIL)), dtype=np.float32)
    return torch.from_numpy(pixels)[None]


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table, write JSON."""
    args = parse_arguments(arguments)
    good, test = (AnomalyDataset(args.data / args.category, grey_thumbnail, type=part) for part in ("train", "test"))
    labels = np.array([row["label"] for row in test.rows])
    if len(set(labels)) < 2:
        raise UserError(f"{args.data / args.category} needs good and defective test images")
    highest = correlations(thumbnails(test), thumbnails(good)).amax(1).numpy()
    kinds = np.array([Path(row["image_name"]).parent.name for row in test.rows])
    rows = []
    for kind in ("all", *sorted(set(kinds))):
        chosen = np.ones_like(labels, bool) if kind == "all" else kinds == kind
        against = chosen | (labels == 0)
        score = metrics.au_roc(1 - highest[against], labels[against]) if labels[chosen].any() else None
        rows.append({"kind": kind, "seen_before": float((highest[chosen] > ALIKE).mean()), "image_au_roc": score})
    shown = [
        (row["kind"], f"{row['seen_before']:.0%}", "-" if row["image_au_roc"] is None else f"{row['image_au_roc']:.3f}")
        for row in rows
    ]
    print(measuring.table(("kind", "seen before", "image AU-ROC of that alone"), shown))
    measuring.write_json(args.output, "seen_before", args, measuring.machine(torch.device("cpu")), rows=rows)


if __name__ == "__main__":
    run(main, resumes=False)
