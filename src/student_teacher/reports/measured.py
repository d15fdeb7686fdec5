"""What metrics.json, scores.csv and regions.csv say of a category's test images."""

import math

import numpy as np

from AnomalyDataset import AnomalyDataset
from student_teacher.detection.decisions import Decisions, Threshold, halfway_below
from student_teacher.detection.regions import regions_above
from student_teacher.evaluation import metrics
from student_teacher.evaluation.Evaluation import Evaluation
from student_teacher.evaluation.regions import Region
from student_teacher.images.defect_regions import load_regions, read_saturations
from student_teacher.reports.inspection import regions_table, table
from student_teacher.reports.TestedImages import TestedImages
from student_teacher.runtime.errors import UserError
from student_teacher.runtime.prefetch import prefetched

MOST_IN_MEMORY = 250_000_000  # pixels of test images: 1 GB; the measures of more are taken on disk
SUMMARY = "image_au_roc", "image_f1", "pixel_au_roc", "au_pro", "au_spro_0.05", "aupimo", "pixel_f1"


def scores_table(tested: TestedImages, image_score: str) -> str:
    """Path, label, image score and p-value of every image, as CSV."""
    p_values = [tested.detector.p_value_of(score, image_score) for score in tested.scores]
    rows = zip(tested.dataset.rows, tested.scores, p_values, strict=True)
    cells = ((row["image_name"], row["label"], score, "" if p is None else p) for row, score, p in rows)
    return table(("path", "label", "image_score", "p_value"), cells)


def regions_found(tested: TestedImages, threshold: float | None) -> str:
    """The regions of every image above the pixel threshold, as CSV."""
    found = prefetched(lambda scores: regions_above(scores, threshold), () if threshold is None else tested.maps)
    cells = (
        (row["image_name"], [region.cells() for region in regions])
        for row, regions in zip(tested.dataset.rows, found, strict=False)
    )
    return regions_table(cells)


def best_threshold(scores: np.ndarray, labels: np.ndarray) -> Threshold:
    """The threshold of the test images' best F1. Raises UserError if not both kinds of images are there."""
    if not 0 < labels.sum() < len(labels):
        raise UserError("--threshold best-f1 needs test images of both kinds: good ones and some with defects")
    _, score = metrics.count_scores(scores, labels).best_f1()
    return Threshold(halfway_below(score, scores), from_labels=True)


def decided(decisions: Decisions, scores: np.ndarray, labels: np.ndarray) -> dict[str, float | bool]:
    """The fractions of good and of defective test images that are called anomalous, beside what has decided it."""
    called = scores >= decisions.threshold
    shares = {"observed_false_alarm_rate": called[labels == 0], "found": called[labels == 1]}
    by = {"false_alarm_rate": decisions.false_alarm_rate}
    if decisions.false_alarm_rate is None:
        by = {"threshold": decisions.threshold, "threshold_used_labels": decisions.from_labels}
    return by | {name: float(part.mean()) for name, part in shares.items() if len(part)}


def regions_of(dataset: AnomalyDataset) -> list[list[Region]] | None:
    """The regions of each image's defects, where defects_config.json says how they saturate (MVTec LOCO)."""
    saturations = read_saturations(dataset.root_dir)
    if saturations is None:
        return None
    paths = [dataset.root_dir / row["gt_name"] if row["gt_name"] else None for row in dataset.rows]
    return [
        [Region(*region) for region in load_regions(path, saturations, dataset.mask_threshold)] if path else []
        for path in paths
    ]


def evaluation_of(tested: TestedImages, decisions: Decisions, regions: list[list[Region]] | None) -> Evaluation:
    """The evaluation of what was found, at the thresholds of the decisions."""
    detector, shapes = tested.detector, [scores.shape for scores in tested.maps]
    ignored_at = {shape: detector.ignored_at(shape) for shape in set(shapes)}
    return Evaluation(
        tested.maps,
        tested.masks if any(row["gt_name"] for row in tested.dataset.rows) else None,
        tested.scores,
        tested.labels,
        kinds=tested.kinds,
        regions=regions,
        image_threshold=None if decisions.threshold == np.inf else decisions.threshold,
        pixel_threshold=decisions.pixel_threshold,
        ignored=[ignored_at[shape] for shape in shapes] if detector.ignores else None,
        on_disk=tested.folder if sum(map(math.prod, shapes)) > MOST_IN_MEMORY else None,
    )


def measures_of(evaluation: Evaluation, tested: TestedImages) -> dict:
    """What metrics.json holds, except the decisions."""
    measures = evaluation.measures()
    if "image_au_roc" in measures:  # as MVTec AD's evaluation script takes it, from the maps at their own size
        measures["image_au_roc_of_maxima"] = metrics.au_roc(
            np.array([values.max() for values in tested.maps]), tested.labels
        )
    if "aupimo" in measures:
        each = zip(tested.dataset.rows, evaluation.aupimo_of_images(), strict=True)
        measures["aupimo_of_images"] = {row["image_name"]: value for row, value in each if value is not None}
    return measures


def summary_of(measures: dict) -> list[str]:
    """A line for each main measure and for the decisions."""
    missing = measures["missing"]
    lines = [
        f"{name} {measures[name]:.4f}" if name in measures else f"{name}: none, {missing[name]}"
        for name in SUMMARY
        if name in measures or name in missing
    ]
    if unmasked := measures.get("anomalous_images_without_mask"):
        lines.append(
            f"{unmasked} images with defects have no mask: they count for image figures, not for pixel figures"
        )
    decided_by = measures.get("decisions", {})
    lines += [f"{name} {value:.4f}" for name, value in decided_by.items() if not isinstance(value, bool)]
    if decided_by.get("threshold_used_labels"):
        lines.append("the threshold used the test images' labels: figures at it flatter the detector")
    return lines
