"""Stage 4: compare students with the teacher on the test images -> anomaly maps, scores, measures and pictures.

The map is the students' error plus their variance (section 3.2 of "Uninformed Students"), standardised with mean and
std of good images. BackboneDetector.py and AnomalyDetector.py combine the students into map and image score.
Written under results/CATEGORY/:
  index.html      the result page: measures, curves and every image; opens from disk (its pictures are in page/)
  metrics.json    image_au_roc, pixel_au_roc, au_pro, aupimo and others, over all images and per kind of defect;
                  image_f1 and pixel_f1 at the thresholds of the decisions; au_spro where the category has a
                  defects_config.json, as in MVTec LOCO; image_au_roc_of_maxima uses the maps' maxima as scores, like
                  MVTec AD's evaluation script
  scores.csv      path, label, image score and p-value of every test image
  regions.csv     of every connected region above the pixel threshold: box, area, peak and mean score, centre
  figures/        image, ground truth and anomaly map of every test image, on one colour scale; JPEG
  curves.png      ROC and PRO curves, and the scores of good against anomalous images (also as SVG)
  examples.png    of each kind the most anomalous image, the median and the least anomalous, on one sheet
  anomaly_maps/   float32 TIFFs at the images' own size, as MVTec AD's evaluation script reads them
"""

import json
import sys
from argparse import ArgumentTypeError
from collections.abc import Collection, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from AnomalyDataset import AnomalyDataset
from student_teacher.detection import scoring
from student_teacher.detection.AnomalyDetector import NORMALISATIONS
from student_teacher.detection.decisions import (
    FALSE_ALARM_RATE,
    PIXEL_FALSE_ALARM_RATE,
    Decisions,
    Threshold,
    halfway_below,
)
from student_teacher.detection.Detector import Detector, load_detector, save_threshold
from student_teacher.detection.regions import regions_above
from student_teacher.evaluation import metrics
from student_teacher.evaluation.Evaluation import Evaluation
from student_teacher.evaluation.pixels import OnDemand
from student_teacher.evaluation.regions import Region
from student_teacher.images import category, ignored
from student_teacher.images.defect_regions import load_regions, read_saturations
from student_teacher.images.index import kind_of, place_of
from student_teacher.images.reading import at_most, encoded, mapped, stem_of
from student_teacher.reports import figures, inspection, watching
from student_teacher.reports.inspection import regions_table, shown_side, table, with_ignored
from student_teacher.reports.result_page import LARGE_SIDE, ResultPage, page_files
from student_teacher.runtime import command_line, distributed
from student_teacher.runtime.bars import with_bar
from student_teacher.runtime.errors import UserError
from student_teacher.runtime.files import write_atomically
from student_teacher.runtime.ledger import Ledger
from student_teacher.runtime.prefetch import alone, prefetched
from student_teacher.runtime.resume_log import ResumeLog
from student_teacher.runtime.settings import Stage, folder, image_size_option, option, stride_option
from student_teacher.training import paper

BEST_F1, NO_THRESHOLD = "best-f1", "none"  # values of --threshold
SAVED = "maps", "figures", "page"  # what can be written of test images beside the tables
MOST_IN_MEMORY = 250_000_000  # pixels of test images: 1 GB; the measures of more are taken on disk
BROKEN_IMAGES = 3  # exit status
SUMMARY = "image_au_roc", "image_f1", "pixel_au_roc", "au_pro", "au_spro_0.05", "aupimo", "pixel_f1"


def threshold(text: str) -> float | str:
    """The value of --threshold: a score, or BEST_F1 or NO_THRESHOLD."""
    if text in (BEST_F1, NO_THRESHOLD):
        return text
    try:
        if np.isfinite(score := float(text)):
            return score
    except ValueError:
        pass
    raise ArgumentTypeError(f"{text}: must be a score, {BEST_F1} or {NO_THRESHOLD}")


@dataclass(frozen=True, kw_only=True)
class Settings(Stage):
    """The options of stage 4. None: the value of training, or as the help says."""

    results: Path = folder("results")
    patch_size: tuple[int, ...] | None = option(
        None,
        "use only these scales of the detector (default: all that students_training.py put into it)",
        type=int,
        nargs="+",
        metavar="P",
    )
    stride: int | None = stride_option(None, "as the students were trained")
    image_size: tuple[int | None, ...] | None = image_size_option(
        None, "smaller is faster and misses small defects (default as in training)"
    )
    image_score: str | None = option(
        None,
        "how pixel scores give the image's score: top, the mean of the highest 1 %%; maximum, the paper's, if defects "
        "are tiny and images free of noise; mean, for defects that change the whole image (default top; maximum if the "
        "students were trained with --paper)",
        choices=scoring.IMAGE_SCORES,
    )
    normalisation: str | None = option(
        None,
        "for patch students: standardise errors with mean and std of good images at each place, or of the whole image, "
        "as in the paper (default place; image if the students were trained with --paper)",
        choices=NORMALISATIONS,
    )
    ignore: Path | None = ignored.ignore_option()
    input: tuple[Path, ...] | None = option(
        None,
        "inspect these images, and all in these folders and their subfolders, instead of the category's test images; "
        "no labels, masks or index needed",
        type=Path,
        nargs="+",
        metavar="PATH",
    )
    watch: bool = option(
        False,
        "go on looking at the folders of --input, and decide on each image as soon as it is whole, until Ctrl-C; "
        "--input - takes paths from standard input instead, one a line",
    )
    output: Path | None = option(
        None,
        "folder for the results of --input (default results/CATEGORY/inspection, with --watch results/CATEGORY/watch)",
        type=Path,
        metavar="DIR",
    )
    save: tuple[str, ...] | None = option(
        None,
        "what is written beside the tables: of --input maps, overlays and page, of the test images maps, figures and "
        "page (default: all of these; with no name: tables alone)",
        nargs="*",
        choices=sorted({*SAVED, *inspection.SAVED}),
    )
    overwrite: bool = option(
        False,
        "replace files in the folder for results that were not written by this command, and results of another --input",
    )
    false_alarm_rate: float | None = option(
        None,
        "fraction of good images that may be called anomalous: lower misses more defects (default: the threshold that "
        f"--save-threshold has kept, or {FALSE_ALARM_RATE})",
        type=command_line.fraction,
        metavar="X",
    )
    threshold: float | str | None = option(
        None,
        "call images anomalous from this score on, instead; best-f1 takes the one that is best on the category's "
        "labelled test images; none goes back to the false-alarm rate",
        type=threshold,
        metavar="SCORE",
    )
    save_threshold: bool = option(False, "keep --threshold in detector.pt, so that it holds from now on")
    pixel_false_alarm_rate: float = option(
        PIXEL_FALSE_ALARM_RATE,
        "fraction of good images' pixels that may be outlined and count as found in pixel_f1",
        type=command_line.fraction,
        metavar="X",
    )
    show: bool = option(False, "open the curves and the examples in a window")
    paper: bool = paper.paper_option()

    @property
    def own_results(self) -> Path:
        """The category's folder of results."""
        return self.results / self.category

    @property
    def watches(self) -> bool:
        """Whether images of --input are awaited: in folders, or as paths on standard input."""
        return self.watch or self.input == (watching.STANDARD_INPUT,)

    @property
    def kinds(self) -> frozenset[str]:
        """What is written beside the tables."""
        everything = () if self.watches else inspection.SAVED if self.input else SAVED
        return frozenset(everything if self.save is None else self.save)


def parse_arguments(arguments: list[str] | None = None) -> Settings:
    """Read the command line. Raises UserError if options contradict each other."""
    settings = paper.DETECTION.parse(Settings, __doc__, arguments)
    require_consistent(settings)
    return settings


def require_consistent(settings: Settings) -> None:
    """Raise UserError if options contradict each other."""
    given, save = settings.input, settings.save or ()
    fit = inspection.SAVED if given else SAVED
    whose = "the test images" if given else "--input"
    wrong = {
        "--threshold contradicts --false-alarm-rate: leave one of them out": settings.threshold is not None
        and settings.false_alarm_rate is not None,
        "--save-threshold needs --threshold: a score, best-f1, or none to remove the one that is kept": (
            settings.save_threshold and settings.threshold is None
        ),
        f"--save {min(set(save) - set(fit), default='')} is for {whose}: leave it out": set(save) - set(fit),
        "--threshold best-f1 comes from the labelled test images: run without --input, with --save-threshold; --input "
        "then uses it": given and settings.threshold == BEST_F1,
        "--show is for the test images; with --input open the result page, index.html": given and settings.show,
        "--show needs --save figures": settings.show and "figures" not in settings.kinds,
        "--watch needs --input with a folder to watch": settings.watch and not given,
        "--save page needs all images: it does not go with --watch or --input -": settings.watches and "page" in save,
        "--watch runs in one process, without torchrun": settings.watches and distributed.active(),
        "--output needs --input; results of the test images go to the folder --results": settings.output and not given,
    }
    for message, holds in wrong.items():
        if holds:
            raise UserError(message)


def detector_of(settings: Settings) -> tuple[Detector, Decisions]:
    """The category's detector with the options of the command line, and its thresholds."""
    given = ignored.load(settings.images, settings.ignore)
    size = "trained" if settings.image_size is None else settings.size
    detector = load_detector(
        settings.detector,
        settings.patch_size,
        settings.stride,
        size,
        settings.normalisation,
        settings.device,
        settings.precision,
        paper=settings.paper,
        ignored=given,
    )
    if given is not None and (detector.painted is None or (given & ~ignored.at(detector.painted, given.shape)).any()):
        print("not all that is ignored was so in training: p-values are cautious; train again for exact ones")
    rate = settings.false_alarm_rate or (FALSE_ALARM_RATE if settings.threshold in (BEST_F1, NO_THRESHOLD) else None)
    given = settings.threshold if isinstance(settings.threshold, float) else None
    decisions = detector.decisions(settings.image_score, rate, settings.pixel_false_alarm_rate, given)
    paper.DETECTION.show(settings)
    paper.say("not trained as published", detector.paper or ())
    if detector.calibration is None:
        print("no p-values and no thresholds: the detector was calibrated with other settings")
    elif decisions.threshold == np.inf and settings.threshold != BEST_F1:
        print(
            f"--false-alarm-rate {decisions.false_alarm_rate:g} is below {detector.calibration.smallest_rate:.3g}, the "
            "smallest that so few good images can guarantee: no image will be called anomalous"
        )
    if settings.save_threshold and (detector.calibration is None or decisions.image_score != detector.image_score):
        raise UserError(
            "--save-threshold keeps a threshold for the settings of training: leave out --image-score, "
            "--patch-size, --image-size and --normalisation"
        )
    if detector.calibration and detector.networks.stride != detector.calibrated_stride:
        print(f"p-values are approximate: they were calibrated with --stride {detector.calibrated_stride}")
    return detector, decisions


def detect(
    detector: Detector, dataset: AnomalyDataset, image_score: str, page: ResultPage, log: ResumeLog
) -> tuple[Sequence[np.ndarray], np.ndarray, list[np.ndarray | None]]:
    """Map (H,W), from its file, score and mask (None without a defect) of each image. Resumes after a stop.

    Writes maps and images for the page while the next images are predicted. Each of several processes takes its share
    of the images.
    """
    scores, masks = [], []
    numbers = distributed.share(range(len(dataset)))

    def path_of(number: int) -> Path:
        return pictures_of(page.path.parent, page.category, dataset.rows[number])[0]

    def predict(number: int, sample: dict) -> tuple:
        score = log.get(sample["path"])
        written = path_of(number), page.picture_of(number), page.picture_of(number, "_small")
        if score is not None and all(path.exists() for path in written):
            return number, sample, None, score
        return number, sample, *detector.predict(sample["image"], image_score)

    def keep(found: tuple) -> tuple:
        number, sample, small_map, score = found
        if small_map is not None:
            with alone(sample["size"][0] * sample["size"][1]):
                anomaly_map = detector.at_own_size(small_map, sample["size"])
                write_atomically(path_of(number), encoded(Image.fromarray(anomaly_map), "TIFF"))
            page.save_image(number, with_ignored(detector, at_most(sample["image"], LARGE_SIDE)))
            log.put(sample["path"], score)
        return score, np.asarray(sample["mask"]) > 0 if dataset.rows[number]["gt_name"] else None

    predictions = map(predict, numbers, prefetched(dataset.__getitem__, numbers))
    kept = prefetched(keep, predictions, finish=True)
    for found in with_bar(kept, len(numbers), "anomaly maps"):
        for values, value in zip((scores, masks), found, strict=True):
            values.append(value)
    if distributed.active():
        scores, masks = (distributed.in_order(found) for found in (scores, masks))
    maps = OnDemand(lambda number: mapped(path_of(number)), len(dataset))
    return maps, np.array(scores), masks


def scores_table(dataset: AnomalyDataset, scores: np.ndarray, p_values: list[float | None]) -> str:
    """Path, label, image score and p-value of every image, as CSV."""
    rows = zip(dataset.rows, scores, p_values, strict=True)
    cells = ((row["image_name"], row["label"], score, "" if p is None else p) for row, score, p in rows)
    return table(("path", "label", "image_score", "p_value"), cells)


def regions_found(dataset: AnomalyDataset, maps: Sequence[np.ndarray], threshold: float | None) -> str:
    """The regions of every image above the pixel threshold, as CSV."""
    found = prefetched(lambda scores: regions_above(scores, threshold), () if threshold is None else maps)
    cells = (
        (row["image_name"], [region.cells() for region in regions])
        for row, regions in zip(dataset.rows, found, strict=False)
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


def pictures_of(results: Path, category: str, row: dict) -> tuple[Path, Path]:
    """Where map and figure of an image go."""
    name = Path(row["image_name"])
    anomaly_map = results / "anomaly_maps" / category / name.with_name(f"{stem_of(name)}.tiff")
    return anomaly_map, results / "figures" / place_of(row["image_name"]).with_name(f"{stem_of(name)}.jpg")


def files_written(results: Path, category: str, dataset: AnomalyDataset, kinds: Collection[str] = SAVED) -> list[Path]:
    """All files that are written of a category's test images, of these kinds."""
    names = ["scores.csv", "regions.csv", "metrics.json", "detection.unfinished"]
    names += ["curves.png", "curves.svg", "examples.png"] if "figures" in kinds else []
    maps, drawn = zip(*(pictures_of(results, category, row) for row in dataset.rows), strict=True)
    files = [results / name for name in names]
    files += [*(maps if "maps" in kinds else ()), *(drawn if "figures" in kinds else ())]
    return files + (page_files(results, range(len(dataset))) if "page" in kinds else [])


def measures_of(evaluation: Evaluation, dataset: AnomalyDataset, maps, labels) -> dict:
    """What metrics.json holds, except the decisions."""
    measures = evaluation.measures()
    if "image_au_roc" in measures:  # as MVTec AD's evaluation script takes it, from the maps at their own size
        measures["image_au_roc_of_maxima"] = metrics.au_roc(np.array([values.max() for values in maps]), labels)
    if "aupimo" in measures:
        each = zip(dataset.rows, evaluation.aupimo_of_images(), strict=True)
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


def write_figures(dataset: AnomalyDataset, found: tuple, page: ResultPage, wanted: Collection[str]) -> None:
    """Draw a figure of each image, a sheet with each kind's highest, median and lowest score, and the page's maps."""
    maps, scores, masks = found
    scale = figures.colour_scale(maps)
    results = page.path.parent
    kinds: dict[str, list[int]] = {}
    for number in np.argsort(-scores):
        kinds.setdefault(kind_of(dataset.rows[number]), []).append(int(number))
    chosen = [
        n for _, group in sorted(kinds.items()) for n in dict.fromkeys((group[0], group[len(group) // 2], group[-1]))
    ]

    def draw(number: int) -> figures.Example:
        row, picture = dataset.rows[number], Image.open(page.picture_of(number))
        name, kind = Path(row["image_name"]), kind_of(row)
        example = figures.Example(
            np.asarray(picture), masks[number], maps[number], scores[number], f"{kind}/{stem_of(name)}"
        )
        path = pictures_of(results, page.category, row)[1]
        if "figures" in wanted:
            figures.save_picture(figures.result_figure(example, *scale), path, figures.DPI)
        page.save_map(number, maps[number], *scale)
        page.add(number, name.name, kind, label=row["label"], score=scores[number], mask=masks[number])
        return example

    drawn = prefetched(draw, range(len(dataset)))
    bar = enumerate(with_bar(drawn, len(dataset), "figures"))
    examples = {number: example for number, example in bar if number in chosen}
    if "figures" in wanted:
        sheet = figures.contact_sheet([examples[number] for number in chosen], *scale)
        figures.save_picture(sheet, results / "examples.png", figures.SHEET_DPI)


def watch_input(settings: Settings) -> int:
    """Decide on the images of --input as they arrive. Returns the exit status."""
    output = settings.output or settings.own_results / "watch"
    with redirect_stdout(sys.stderr):  # standard output is for decisions alone
        detector, decisions = detector_of(settings)
        if settings.save_threshold:
            keep_threshold(settings, decisions)
    outputs = inspection.Outputs(output, settings.kinds)
    broken = watching.watch(detector, decisions, settings.input, outputs, overwrite=settings.overwrite)
    return BROKEN_IMAGES if broken and not settings.watch else 0


def inspect_input(settings: Settings) -> int:
    """Inspect the images of --input. Returns the exit status."""
    output = settings.output or settings.own_results / "inspection"
    outputs = inspection.Outputs(output, settings.kinds)
    detector, decisions = detector_of(settings)
    if settings.save_threshold:
        keep_threshold(settings, decisions)
    broken = inspection.inspect(
        detector, decisions, settings.input, outputs, category=settings.category, overwrite=settings.overwrite
    )
    return BROKEN_IMAGES if broken else 0


def keep_threshold(settings: Settings, decisions: Decisions) -> None:
    """Write the image threshold into detector.pt, or remove it for --threshold none."""
    path = settings.detector
    chosen = decisions.false_alarm_rate is None
    save_threshold(path, Threshold(decisions.threshold, decisions.from_labels) if chosen else None)
    print(f"{path}: {f'keeps the threshold {decisions.threshold:.6g}' if chosen else 'keeps no threshold'}")


def measure_test_images(settings: Settings) -> None:
    """Score and measure the category's test images."""
    dataset = AnomalyDataset(settings.images, type="test")
    if not dataset.rows:
        raise UserError(f"{settings.images} has no test images: put some into test/, or give --input")
    regions = regions_of(dataset)  # first, so that what is wrong with them is known at once
    detector, decisions = detector_of(settings)
    dataset.least, dataset.value_range = shown_side(detector), detector.value_range
    results, kinds = settings.own_results, settings.kinds
    ledger = Ledger(
        results, "test images", files_written(results, settings.category, dataset), overwrite=settings.overwrite
    )
    images = category.identity_of(dataset)["images"]
    log = ResumeLog(results / "detection.unfinished", f"{detector.fingerprint} {images} {decisions.image_score}")
    page = ResultPage(results, settings.category)
    maps, scores, masks = detect(detector, dataset, decisions.image_score, page, log)
    labels = np.array([row["label"] for row in dataset.rows], dtype=int)
    if settings.threshold == BEST_F1:
        decisions = decisions.by(best_threshold(scores, labels))
    if settings.save_threshold:
        keep_threshold(settings, decisions)
    if distributed.is_first():
        ignored_at = {shape: detector.ignored_at(shape) for shape in {scores.shape for scores in maps}}
        have_masks = any(row["gt_name"] for row in dataset.rows)
        evaluation = Evaluation(
            maps,
            masks if have_masks else None,
            scores,
            labels,
            [kind_of(row) for row in dataset.rows],
            regions=regions,
            image_threshold=None if decisions.threshold == np.inf else decisions.threshold,
            pixel_threshold=decisions.pixel_threshold,
            ignored=[ignored_at[scores.shape] for scores in maps] if detector.ignores else None,
            on_disk=results if sum(scores.size for scores in maps) > MOST_IN_MEMORY else None,
        )
        measures = measures_of(evaluation, dataset, maps, labels)
        if decisions.threshold is not None:
            measures["decisions"] = decided(decisions, scores, labels)
        p_values = [detector.p_value_of(score, decisions.image_score) for score in scores]
        write_atomically(results / "scores.csv", scores_table(dataset, scores, p_values))
        write_atomically(results / "regions.csv", regions_found(dataset, maps, decisions.pixel_threshold))
        draw(evaluation, measures, dataset, (maps, scores, masks), page=page, kinds=kinds)
        write_atomically(results / "metrics.json", json.dumps(measures, indent=1) + "\n")
        print("\n".join(summary_of(measures)))
        if "page" in kinds:
            print(f"result page: {page.path}")
        if "figures" in kinds:
            print(f"pictures: {results / 'examples.png'}, {results / 'curves.png'}, {results / 'figures'}/")
    log.finish()
    # Maps and pictures that were needed on the way, but not to be kept, are removed.
    ledger.finish(files_written(results, settings.category, dataset, kinds))


def draw(
    evaluation: Evaluation,
    measures: dict,
    dataset: AnomalyDataset,
    found: tuple,
    *,
    page: ResultPage,
    kinds: Collection[str],
) -> None:
    """Draw curves, figures and page of what `detect` has found, those of these kinds."""
    _, scores, _ = found
    curves = evaluation.image_roc_curve(), evaluation.pixel_roc_curve(), evaluation.pro_curve()
    if "figures" in kinds:
        labels = np.array([row["label"] for row in dataset.rows], dtype=int)
        path = page.path.with_name("curves.png")
        figures.save_curves_figure(path, measures, scores, labels, [kind_of(row) for row in dataset.rows], *curves)
    if {"figures", "page"} & set(kinds):
        write_figures(dataset, found, page, kinds)
    if "page" in kinds:
        page.finish(measures, *curves, threshold=measures.get("decisions", {}).get("threshold"))


def main(arguments: list[str] | None = None) -> int:
    """Run stage 4. Returns the exit status: 3 if some images of --input could not be read."""
    settings = parse_arguments(arguments)
    if settings.input:
        return watch_input(settings) if settings.watches else inspect_input(settings)
    measure_test_images(settings)
    if settings.show and distributed.is_first():
        for name in ("examples.png", "curves.png"):
            Image.open(settings.own_results / name).show()
    return 0


if __name__ == "__main__":
    distributed.run(main)
