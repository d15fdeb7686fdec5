"""Ablation of the default detector: the same students, with parts left out or with other weights.

The students are fitted once for each data set, image size and backbone. Then maps and scores are combined in many ways:
from single levels, global or local students, with other weights, with and without the expected errors. The table shows
image AU-ROC / AU-PRO up to a false positive rate of 0.3, at the images' own sizes.

    python3 benchmarks/ablation.py bottle demo_carpet --output ablation.json
"""

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Container
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import described
import measuring
from torch import Tensor

from AnomalyDataset import AnomalyDataset
from student_teacher.detection import scoring
from student_teacher.detection.BackboneDetector import (
    GLOBAL,
    KINDS,
    LOCAL,
    MAP,
    SCORE,
    BackboneDetector,
    Errors,
    counts,
    mean_of_levels,
)
from student_teacher.images.index import LEARNED
from student_teacher.runtime import command_line, device
from student_teacher.runtime.bars import with_bar
from student_teacher.runtime.errors import run
from student_teacher.runtime.paths import add_folders
from student_teacher.teachers import backbone_weights
from student_teacher.teachers.BackboneTeacher import seen_size
from student_teacher.training import backbone_students


def parse_arguments(arguments: list[str] | None = None) -> Namespace:
    """Read the command line."""
    options = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    options.add_argument("categories", nargs="+", help="prepared by mvtec_dataset.sh, with defects and masks")
    add_folders(options, "data", "model")
    options.add_argument(
        "--image-size", type=command_line.positive, nargs="+", default=[512, 256], help="(default 512 256)"
    )
    options.add_argument(
        "--resnet18",
        action="store_true",
        help="also measure torchvision's ResNet18 as backbone, adapted by stage 1 or else with --backbone-weights",
    )
    options.add_argument("--backbone-weights", default="imagenet", help="as for students_training.py")
    options.add_argument("--device", default="auto")
    options.add_argument("--precision", choices=device.PRECISIONS, default="auto")
    options.add_argument("--seed", type=command_line.seed, default=0)
    options.add_argument("--output", type=Path, help="write machine, settings and the table here, as JSON")
    return options.parse_args(arguments)


def combined(
    networks: BackboneDetector,
    scores: dict[str, list[Tensor]],
    use: str,
    weight: Tensor | float,
    *,
    places: Container[int] | None = None,
) -> Tensor:
    """Standardised errors, as of BackboneDetector.standardised -> (N,h,w), global students with this `weight`.

    All levels that count for the `use`, or those with an index in `places`.
    """
    size, means = networks.grid(networks.stride), {}
    for kind in KINDS:
        levels = [
            level
            for place, (level, stride) in enumerate(zip(scores[kind], networks.strides[kind], strict=True))
            if (counts(use, stride) if places is None else place in places)
        ]
        if levels:
            means[kind] = mean_of_levels(levels, size)
    both = means[LOCAL] + weight * (means[GLOBAL] - means[LOCAL]) if len(means) == 2 else means.popitem()[1]
    return both[:, 0]


def ways(networks: BackboneDetector, errors: Errors, plain: BackboneDetector) -> dict[str, Callable[[], tuple]]:
    """The variants, of errors with M = 1: each returns anomaly maps and scored maps.

    `plain` is calibrated without expected errors.
    """
    by = {use: networks.standardised(use, errors) for use in (MAP, SCORE)}
    raw = plain.standardised(SCORE, without_expectations(errors))
    of_map, of_score = (networks.weights(use, errors) for use in (MAP, SCORE))

    def both(map_weight, score_weight, *, only=None, scored=None, score=by[SCORE], maps=by[MAP]):
        return (
            combined(networks, maps, MAP, map_weight, places=only),
            combined(networks, score, SCORE, score_weight, places=only or scored),
        )

    found = {
        "default": partial(both, of_map, of_score),
        "global students only": partial(both, 1, 1),
        "local students only": partial(both, 0, 0),
        "equal weights": partial(both, 0.5, 0.5),
        "map: the same weights at all places": partial(both, networks.map_weight, of_score),
        "score: without expected errors": partial(both, of_map, of_score, score=raw),
        "map: minus expected errors": partial(both, of_map, of_score, maps=by[SCORE]),
        "score: without the image at half size": partial(
            both, of_map, of_score, scored=range(len(networks.strides[GLOBAL]) - 1)
        ),
    }
    for place, stride in enumerate(networks.strides[GLOBAL]):
        found[f"global, only level {place + 1} (stride {stride})"] = partial(both, 1, 1, only=[place])
    for place, stride in enumerate(networks.strides[LOCAL]):
        found[f"local, only level {place + 2} (stride {stride})"] = partial(both, 0, 0, only=[place])
    return found


def without_expectations(errors: Errors) -> Errors:
    """The same errors, with expected errors of 0."""
    return errors._replace(expected={kind: [level * 0 for level in levels] for kind, levels in errors.actual.items()})


def measure(category: str, args: Namespace) -> dict[str, tuple[float, float]]:
    """Image AU-ROC and AU-PRO of each variant."""
    sets = [
        AnomalyDataset(args.data / category, type=LEARNED, label=0),
        AnomalyDataset(args.data / category, type="test"),
    ]
    samples = [sets[1][index] for index in range(len(sets[1]))]
    learned, found, compute = len(sets[0]), {}, measuring.compute(args)
    backbones = {"": None}
    if args.resnet18:
        adapted = backbone_weights.adapted_backbone(args.model / category, "resnet18")
        name = backbone_weights.backbone_name("resnet18", args.backbone_weights, adapted)
        backbones[name] = backbone_weights.backbone("resnet18", args.backbone_weights, adapted)
    for name, backbone in backbones.items():
        for side in args.image_size if not name else args.image_size[:1]:
            teacher, maps = described.teacher_and_maps(sets, seen_size((side, side)), compute, backbone)
            good = [level[:learned] for level in maps]
            groups = backbone_students.look_alikes(good, teacher.strides)
            fitted = backbone_students.fit_students(teacher, good, groups, compute)
            networks, _ = backbone_students.calibrated(teacher, fitted)
            plain, _ = backbone_students.calibrated(
                teacher, fitted._replace(errors=without_expectations(fitted.errors))
            )
            errors = described.errors(networks, [level[learned:] for level in maps], compute).together()
            first = not found
            for way, work in ways(networks, errors, plain).items():
                if first or way == "default":
                    label = way if first else ", ".join(filter(None, (name, f"at {side} x {side}")))
                    maps_of, scored = work()
                    for score in scoring.IMAGE_SCORES if label == "default" else (networks.image_score,):
                        scores = scoring.image_scores(scored, score).tolist()
                        measures = described.measures(maps_of.cpu(), scores, samples)
                        row = label if score == networks.image_score else f"image score: {score}"
                        found[row] = measures["image_au_roc"], measures["au_pro"]
    return found


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table, write JSON."""
    args = parse_arguments(arguments)
    found = {category: measure(category, args) for category in with_bar(args.categories, len(args.categories), "sets")}
    machine = measuring.machine(device.choose(args.device))
    print(f"{measuring.machine_line(machine)}; seed {args.seed}, {args.precision}, {args.image_size[0]} pixels\n")
    labels = list(dict.fromkeys(label for ways_of in found.values() for label in ways_of))
    lines = [
        (
            label,
            *(
                "{:.3f} / {:.3f}".format(*found[category][label]) if label in found[category] else ""
                for category in found
            ),
        )
        for label in labels
    ]
    print(measuring.table(("variant", *found), lines))
    measuring.write_json(args.output, "ablation", args, machine, rows=found)


if __name__ == "__main__":
    run(main, resumes=False)
