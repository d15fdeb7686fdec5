"""Time src/student_teacher/evaluation beside a plain implementation that walks over every threshold.

All compute pixel AU-ROC, average precision, best F1 and AU-PRO at the limits 0.3 and 0.05 of the same seeded synthetic
maps, taking turns, and must agree to 1e-6. The plain one follows the formulas of MVTec AD's evaluation code (Bergmann
et al., IJCV 2021): it sorts all pixels by score and adds up, pixel by pixel, their contributions to the false positive
rate and to the overlap with the regions. It is also timed for AU-PRO alone, which is all that MVTec's code computes.
What AUPIMO and F1 at a threshold add is timed apart: a plain AUPIMO goes through every threshold of the good images.

--check CATEGORY compares the metrics.json of a category that has been tested to what the plain way makes of its maps.

    python3 benchmarks/metrics.py --output metrics_benchmark.json
"""

import argparse
import functools
import json
import sys
from pathlib import Path

import numpy as np
import scipy
from PIL import Image
from scipy import ndimage

# Before this folder, where this file itself is named metrics.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))
import measuring

from AnomalyDataset import AnomalyDataset
from student_teacher.evaluation.aupimo import FPR_LIMITS, aupimo
from student_teacher.evaluation.Evaluation import Evaluation
from student_teacher.evaluation.metrics import AU_PRO_LIMIT, AU_PRO_STRICT_LIMIT
from student_teacher.evaluation.pixels import Maps, Masks
from student_teacher.images.reading import stem_of
from student_teacher.runtime import command_line
from student_teacher.runtime.errors import run
from student_teacher.runtime.paths import add_folders

LIMITS = {"au_pro": AU_PRO_LIMIT, "au_pro_0.05": AU_PRO_STRICT_LIMIT}
MEASURES = (*LIMITS, "pixel_au_roc", "pixel_average_precision", "pixel_best_f1", "aupimo", "pixel_f1")
THRESHOLD = 2.0  # of pixels, for F1
TOLERANCE = 1e-6
OURS = "ours, all measures"


def synthetic_maps(count: int, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Make maps (count, size, size) of smooth noise, float32, and masks of blobs, which the maps show more or less.

    A quarter of the images is good. Scores are rounded in a quarter of the maps, so that there are heavy ties.
    """
    rng = np.random.default_rng(seed)
    maps = np.empty((count, size, size), dtype=np.float32)
    masks = np.zeros((count, size, size), dtype=np.uint8)
    rows, columns = np.mgrid[:size, :size]
    for index in range(count):
        noise = ndimage.gaussian_filter(rng.standard_normal((size, size), dtype=np.float32), 3)
        scores = noise / noise.std() + 0.2 * rng.standard_normal((size, size), dtype=np.float32)
        if index % 4:
            for _ in range(rng.integers(1, 6)):
                row, column = rng.integers(0, size, 2)
                radius = rng.uniform(0.005, 0.08) * size
                masks[index] |= (rows - row) ** 2 + (columns - column) ** 2 <= radius**2
            scores += rng.uniform(0.5, 4) * ndimage.gaussian_filter(masks[index].astype(np.float32), 4)
        maps[index] = scores.round(1) if index % 4 == 1 else scores
    return maps, masks


def ours_at_good_thresholds(maps: np.ndarray, masks: np.ndarray) -> dict[str, float]:
    """Compute AUPIMO alone with the project's code, masks read for it: what it adds to the others, at most."""
    defective = masks.any((1, 2))
    defects = [scores[mask != 0] for scores, mask in zip(maps[defective], masks[defective], strict=True)]
    return {"aupimo": float(aupimo(list(maps[~defective]), defects).mean())}


def ours(maps: np.ndarray, masks: np.ndarray) -> dict[str, float]:
    """Compute all measures with the project's code."""
    labels = masks.any((1, 2))
    kinds = ["defect" if label else "good" for label in labels]
    found = Evaluation(maps, masks, maps.max((1, 2)), labels, kinds=kinds, pixel_threshold=THRESHOLD).measures()
    return {name: found[name] for name in MEASURES}


def plain(maps: Maps, masks: Masks, au_pro_alone: bool = False) -> dict[str, float]:
    """Compute the same with every pixel's score as a threshold; or AU-PRO alone, as MVTec AD's code does."""
    false_positive, overlap, regions = [], [], 0
    for mask in masks:
        labels, count = ndimage.label(mask, np.ones((3, 3), dtype=int))
        regions += count
        false_positive.append((labels == 0).astype(np.uint32).ravel())
        overlap.append(np.zeros(mask.size))
        for region in range(1, count + 1):
            inside = labels.ravel() == region
            overlap[-1][inside] = 1 / np.count_nonzero(inside)
    scores, false_positive, overlap, defective = (
        np.concatenate([np.ravel(part) for part in parts]) for parts in (maps, false_positive, overlap, masks)
    )
    defective = defective != 0
    order = np.argsort(scores)[::-1]
    scores = scores[order]
    last_of_ties = np.append(np.diff(scores) != 0, True)
    false_positives = np.cumsum(false_positive[order], dtype=np.int64)[last_of_ties]
    fpr = np.concatenate(([0], false_positives / np.count_nonzero(~defective), [1]))
    pro = np.concatenate(([0], np.cumsum(overlap[order])[last_of_ties] / regions, [1]))
    result = {}
    for name, limit in LIMITS.items():
        within = fpr <= limit
        x, y = np.append(fpr[within], limit), np.append(pro[within], np.interp(limit, fpr, pro))
        result[name] = float(np.trapezoid(y, x) / limit)
    if au_pro_alone:
        return result
    positives = np.count_nonzero(defective)
    true_positives = np.cumsum(defective[order], dtype=np.int64)[last_of_ties]
    tpr = np.concatenate(([0], true_positives / positives, [1]))
    precision = true_positives / (true_positives + false_positives)
    result["pixel_au_roc"] = float(np.trapezoid(tpr, fpr))
    result["pixel_average_precision"] = float(np.sum(np.diff(tpr[:-1]) * precision))
    result["pixel_best_f1"] = float(np.max(2 * true_positives / (positives + true_positives + false_positives)))
    return result


def plain_at_good_thresholds(
    maps: Maps, masks: Masks, labels: np.ndarray | None = None, threshold: float = THRESHOLD
) -> dict[str, float]:
    """AUPIMO by every threshold that a good image sets, and F1 of the pixels at `threshold`."""
    labels = np.array([mask.any() for mask in masks]) if labels is None else labels
    good = [scores for scores, label in zip(maps, labels, strict=True) if not label]
    lower, upper = np.log(FPR_LIMITS)
    defects = [scores[mask != 0] for scores, mask in zip(maps, masks, strict=True) if mask.any()]
    areas, rate = np.zeros(len(defects)), 0.0
    for level in np.unique(np.concatenate([np.ravel(scores) for scores in good]))[::-1]:
        begin, rate = rate, np.mean([np.mean(scores >= level) for scores in good])
        width = np.diff(np.clip(np.log([max(begin, 1e-300), rate]), lower, upper))[0]
        areas += [width * np.mean(scores > level) for scores in defects]
        if np.log(rate) >= upper:
            break
    found, positives = (np.concatenate([np.ravel(part) for part in parts]) for parts in (maps, masks))
    found, positives = found >= threshold, positives != 0
    f1 = 2 * np.count_nonzero(found & positives) / (np.count_nonzero(found) + np.count_nonzero(positives))
    return {"aupimo": float(areas.mean() / (upper - lower)), "pixel_f1": f1}


def read_result(category: str, data: Path, results: Path) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Read the maps that src/anomaly_detection.py wrote, and the masks, each at its image's own size."""
    maps, masks = [], []
    dataset = AnomalyDataset(data / category, type="test")
    for number, row in enumerate(dataset.rows):
        tiff = (
            results
            / category
            / "anomaly_maps"
            / category
            / Path(row["image_name"]).with_name(f"{stem_of(row['image_name'])}.tiff")
        )
        maps.append(np.asarray(Image.open(tiff)))
        masks.append(np.asarray(dataset[number]["mask"]) != 0)
    return maps, masks


def check_result(category: str, data: Path, results: Path) -> float:
    """Print metrics.json of a category beside the plain figures of the same maps; return the largest difference."""
    maps, masks = read_result(category, data, results)
    found = json.loads((results / category / "metrics.json").read_text(encoding="utf-8"))
    anomalous = np.array([row["label"] for row in AnomalyDataset(data / category, type="test").rows]) != 0
    expected = plain(maps, masks) | plain_at_good_thresholds(maps, masks, anomalous, found["pixel_f1_threshold"])
    maxima = np.array([values.max() for values in maps])
    higher = np.sign(maxima[anomalous][:, None] - maxima[~anomalous]) / 2 + 0.5  # a tie counts half
    expected["image_au_roc_of_maxima"] = float(higher.mean())
    lines = [(name, f"{found[name]:.8f}", f"{value:.8f}") for name, value in expected.items()]
    print(measuring.table((category, "metrics.json", "plain"), lines))
    return max(abs(found[name] - value) for name, value in expected.items())


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    positive = command_line.positive
    parser.add_argument("--maps", type=positive, default=80, help="number of maps, a quarter of them good (80)")
    parser.add_argument("--size", type=positive, default=512, help="height and width of a map in pixels (512)")
    parser.add_argument(
        "--repeats",
        type=positive,
        default=5,
        help="turns each takes (5); more if the spread is wide, as on a busy machine",
    )
    parser.add_argument("--seed", type=command_line.seed, default=0, help="of the synthetic maps (0)")
    parser.add_argument("--output", type=Path, help="write the times and the measures here, as JSON")
    parser.add_argument(
        "--check", metavar="CATEGORY", help="instead, compare the metrics.json of a tested category to the plain way's"
    )
    add_folders(parser, "data", "results")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark, print the table, write the file; 1 if the implementations disagree."""
    args = parse_arguments(arguments)
    if args.check:
        difference = check_result(args.check, args.data, args.results)
        print(f"largest difference: {difference:.1e} (at most {TOLERANCE:.0e})")
        return 0 if difference <= TOLERANCE else 1

    maps, masks = synthetic_maps(args.maps, args.size, args.seed)
    contenders = {
        OURS: ours,
        "ours, AUPIMO alone": ours_at_good_thresholds,
        "plain, AU-PRO alone": functools.partial(plain, au_pro_alone=True),
        "plain, without AUPIMO and F1": plain,
        "plain, AUPIMO and F1 alone": plain_at_good_thresholds,
    }
    measures = {}

    def work(name, function):
        measures[name] = function(maps, masks)

    works = {name: functools.partial(work, name, function) for name, function in contenders.items()}
    timings = measuring.interleaved(works, args.repeats, warm_up=0)  # NumPy has nothing to warm up

    machine = measuring.machine() | {"numpy": np.__version__, "scipy": scipy.__version__}
    print(f"{args.maps} maps of {args.size} x {args.size}, {args.repeats} turns each")
    print(f"{machine['cpu']}, {machine['cores']} cores, numpy {np.__version__}, scipy {scipy.__version__}\n")
    ours_median = timings[OURS].median
    lines = [(name, timing.rounded, measuring.ratio(timing.median / ours_median)) for name, timing in timings.items()]
    print(measuring.table(("", "ms: median (spread)", "median to ours"), lines))
    first = measures[OURS]
    difference = max(abs(first[name] - value) for others in measures.values() for name, value in others.items())
    print(f"\nmeasures: {', '.join(f'{name} {value:.6f}' for name, value in first.items())}")
    print(f"largest difference: {difference:.1e} (at most {TOLERANCE:.0e})")
    measuring.write_json(
        args.output,
        "metrics",
        args,
        machine,
        warm_up_turns=0,
        timings={name: timing.summary() for name, timing in timings.items()},
        measures=measures,
        largest_difference=difference,
    )
    return 0 if difference <= TOLERANCE else 1


if __name__ == "__main__":
    run(main, resumes=False)
