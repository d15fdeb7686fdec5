"""Quality of a teacher, before any student is trained: nearest neighbours among its descriptors.

Students can hardly detect what their teacher doesn't distinguish. So the test images are scored by the distance of each
of their descriptors to the nearest of many descriptors of good training images (as in PatchCore, Roth et al., CVPR
2022, but with a random choice of descriptors). The backbone's own features, scored in the same way, are the limit for a
perfect teacher; --backbone names it.

How to read the table: image AU-ROC of the map's maximum and of its mean, and AU-PRO up to a false positive rate of 0.3,
on maps of the networks' size. Don't choose settings by these figures on images whose results you will report.

    python3 benchmarks/teacher_neighbours.py magnetic_tile --teacher model/pretrained/teacher_*.pt
"""

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import measuring
import numpy as np
import torch
from torch import Tensor

from AnomalyDataset import AnomalyDataset
from AnomalyNet import DESCRIPTOR_SIZE, AnomalyNet
from FDFE import PADDING, pad
from FDFEAnomalyNet import FDFEAnomalyNet
from student_teacher.detection import scoring
from student_teacher.evaluation import metrics
from student_teacher.images import preprocessing
from student_teacher.images.index import LEARNED
from student_teacher.runtime import checkpoints, command_line, device
from student_teacher.runtime.bars import with_bar
from student_teacher.runtime.errors import run
from student_teacher.runtime.paths import add_folders
from student_teacher.runtime.prefetch import prefetched
from student_teacher.teachers import backbone_weights
from student_teacher.teachers.backbones import BACKBONES

Describe = Callable[[Tensor], Tensor]  # normalised images (N,3,H,W) -> (N,C,h,w)
STRIDE = 8  # also that of the backbones' dense features


def parse_arguments(arguments: list[str] | None = None) -> Namespace:
    """Read the command line."""
    options = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    options.add_argument("category", help="a folder in data/, prepared by ./mvtec_dataset.sh CATEGORY")
    options.add_argument("--teacher", type=Path, nargs="+", default=[], metavar="FILE", help="model/.../teacher_65.pt")
    options.add_argument("--backbone", choices=BACKBONES, help="also score the features of this one")
    options.add_argument("--backbone-weights", default="imagenet", metavar="SOURCE", help="as in teacher_training.py")
    add_folders(options, "data")
    options.add_argument("--image-size", type=command_line.positive, default=256, help="height and width (default 256)")
    options.add_argument(
        "--bank",
        type=command_line.positive,
        default=20_000,
        help="number of good images' descriptors (default 20000)",
    )
    options.add_argument("--seed", type=command_line.seed, default=0)
    options.add_argument("--device", default="auto")
    options.add_argument("--output", type=Path, help="write the figures here, as JSON")
    return options.parse_args(arguments)


def of_teacher(path: Path, where: torch.device) -> Describe:
    """A teacher's descriptors at every STRIDE-th pixel."""
    content = checkpoints.load(path, "teacher")
    net = AnomalyNet(content["patch_size"], descriptor_size=content.get("descriptor_size", DESCRIPTOR_SIZE))
    net.load_state_dict(content["net"])
    return FDFEAnomalyNet(net.to(where, memory_format=device.memory_format(where)).eval(), STRIDE, padding=PADDING)


@torch.inference_mode()
def describe(describing: Describe, dataset: AnomalyDataset, where: torch.device) -> Tensor:
    """All images' descriptors: (N,h,w,C)."""
    found = []
    for sample in with_bar(prefetched(dataset.__getitem__, range(len(dataset))), len(dataset), "images"):
        with device.autocast(where, "auto"):
            found.append(describing(preprocessing.normalise(sample["image"][None].to(where)))[0].permute(1, 2, 0))
    return torch.stack([descriptors.float() for descriptors in found])


def neighbour_maps(good: Tensor, tested: Tensor, bank_size: int, seed: int) -> Tensor:
    """Distance of each descriptor (N,h,w,C) to the nearest of `bank_size` good ones, all normalised: (N,h,w)."""
    bank = good.flatten(0, 2)
    std, mean = torch.std_mean(bank, 0)
    chosen = torch.randperm(len(bank), generator=device.generator(seed))[:bank_size]
    bank = (bank[chosen.to(bank.device)] - mean) / (std + 1e-6)
    tested = (tested - mean) / (std + 1e-6)
    maps = [torch.cdist(image.flatten(0, 1), bank).amin(1).view(image.shape[:2]) for image in tested]
    return torch.stack(maps)


def measure(describing: Describe, first: int, args: Namespace, where: torch.device) -> dict[str, float]:
    """Image AU-ROC of maximum and mean, and AU-PRO. Descriptors are at pixels `first`, `first` + STRIDE ..."""
    size = args.image_size, args.image_size
    folder, transform = args.data / args.category, preprocessing.image_transform(size)
    train = AnomalyDataset(folder, transform, type=LEARNED, label=0)
    test = AnomalyDataset(folder, transform, preprocessing.image_transform(size), type="test")
    maps = neighbour_maps(describe(describing, train, where), describe(describing, test, where), args.bank, args.seed)
    between = scoring.at_every_pixel(maps, STRIDE, size)
    full = pad(between[:, None], (first, -first), (first, -first), "reflect")[:, 0].cpu().numpy()
    masks = [test[index]["mask"][0].numpy() > 127 for index in range(len(test))]
    labels = np.array([row["label"] for row in test.rows])
    scores = {"maximum": maps.amax((1, 2)), "mean": maps.mean((1, 2))}
    figures = {f"image_au_roc_{name}": metrics.au_roc(values.cpu().numpy(), labels) for name, values in scores.items()}
    return figures | {"au_pro": metrics.au_pro(full, np.stack(masks))}


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table, write JSON."""
    args = parse_arguments(arguments)
    measuring.require_measurable(AnomalyDataset(args.data / args.category, type="test"))
    where = device.choose(args.device)
    rows = {str(path): measure(of_teacher(path, where), 0, args, where) for path in args.teacher}
    if args.backbone:
        backbone = backbone_weights.backbone(args.backbone, args.backbone_weights).to(where)
        rows[args.backbone] = measure(backbone.dense, backbone.first_fine, args, where)
    columns = "image_au_roc_maximum", "image_au_roc_mean", "au_pro"
    lines = [(name, *(f"{row[column]:.3f}" for column in columns)) for name, row in rows.items()]
    print(measuring.table(("descriptors", "image AU-ROC, maximum", "mean", "AU-PRO"), lines))
    measuring.write_json(args.output, "teacher_neighbours", args, measuring.machine(where), rows=rows)


if __name__ == "__main__":
    run(main, resumes=False)
