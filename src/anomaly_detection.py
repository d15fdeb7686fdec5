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
)
from student_teacher.detection.Detector import Detector, load_detector, save_threshold
from student_teacher.images import category, ignored
from student_teacher.reports import inspection, measured, submission, watching
from student_teacher.reports.TestedImages import SAVED, TestedImages
from student_teacher.runtime import command_line, distributed
from student_teacher.runtime.errors import UserError
from student_teacher.runtime.files import write_atomically
from student_teacher.runtime.ledger import Ledger
from student_teacher.runtime.resume_log import ResumeLog
from student_teacher.runtime.settings import Stage, folder, image_size_option, option, stride_option
from student_teacher.training import paper

BEST_F1, NO_THRESHOLD = "best-f1", "none"  # values of --threshold
BROKEN_IMAGES = 3  # exit status


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
        "how pixel scores give the image's score: smooth, a smooth maximum; top, the mean of the highest 1 %%; "
        "maximum, the paper's, if defects are tiny and images free of noise; mean, for defects that change the whole "
        "image (default smooth; top for patch students; maximum if they were trained with --paper)",
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
    submission: Path | None = option(
        None,
        "instead, write the files that MVTec AD 2's server takes of its private test images; give one folder for all "
        "objects",
        type=Path,
        metavar="DIR",
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
    def wanted(self) -> frozenset[str]:
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
        "--show needs --save figures": settings.show and "figures" not in settings.wanted,
        "--watch needs --input with a folder to watch": settings.watch and not given,
        "--save page needs all images: it does not go with --watch or --input -": settings.watches and "page" in save,
        "--submission is for the private images of MVTec AD 2: leave out --input": settings.submission and given,
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
        normalisation=settings.normalisation,
        device_name=settings.device,
        precision=settings.precision,
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


def watch_input(settings: Settings) -> int:
    """Decide on the images of --input as they arrive. Returns the exit status."""
    output = settings.output or settings.own_results / "watch"
    with redirect_stdout(sys.stderr):  # standard output is for decisions alone
        detector, decisions = detector_of(settings)
        if settings.save_threshold:
            keep_threshold(settings, decisions)
    outputs = inspection.Outputs(output, settings.wanted)
    broken = watching.watch(detector, decisions, settings.input, outputs, overwrite=settings.overwrite)
    return BROKEN_IMAGES if broken and not settings.watch else 0


def inspect_input(settings: Settings) -> int:
    """Inspect the images of --input. Returns the exit status."""
    output = settings.output or settings.own_results / "inspection"
    outputs = inspection.Outputs(output, settings.wanted)
    detector, decisions = detector_of(settings)
    if settings.save_threshold:
        keep_threshold(settings, decisions)
    broken = inspection.inspect(
        detector, decisions, settings.input, outputs, category=settings.category, overwrite=settings.overwrite
    )
    return BROKEN_IMAGES if broken else 0


def submit(settings: Settings) -> None:
    """Write the files that MVTec AD 2's server takes."""
    dataset = submission.private_images(settings.images, settings.index)
    detector, decisions = detector_of(settings)
    if decisions.pixel_threshold is None:
        raise UserError("--submission needs the pixel threshold of training: leave out options that change the maps")
    submission.submit(detector, decisions.pixel_threshold, dataset, settings.submission, overwrite=settings.overwrite)
    print(f"{settings.submission}: {len(dataset)} images of {settings.category}, pixel threshold from good images")


def keep_threshold(settings: Settings, decisions: Decisions) -> None:
    """Write the image threshold into detector.pt, or remove it for --threshold none."""
    path = settings.detector
    chosen = decisions.false_alarm_rate is None
    save_threshold(path, Threshold(decisions.threshold, decisions.from_labels) if chosen else None)
    print(f"{path}: {f'keeps the threshold {decisions.threshold:.6g}' if chosen else 'keeps no threshold'}")


def measure_test_images(settings: Settings) -> None:
    """Score and measure the category's test images."""
    dataset = AnomalyDataset(settings.images, index=settings.index, type="test")
    if not dataset.rows:
        raise UserError(f"{settings.images} has no test images: put some into test/, or give --input")
    regions = measured.regions_of(dataset)  # first, so that what is wrong with them is known at once
    detector, decisions = detector_of(settings)
    results, wanted = settings.own_results, settings.wanted
    tested = TestedImages(dataset, detector, results)
    ledger = Ledger(results, "test images", tested.files(), overwrite=settings.overwrite)
    images = category.identity_of(dataset)["images"]
    log = ResumeLog(results / "detection.unfinished", f"{detector.fingerprint} {images} {decisions.image_score}")
    tested.detect(decisions.image_score, log)
    if settings.threshold == BEST_F1:
        decisions = decisions.by(measured.best_threshold(tested.scores, tested.labels))
    if settings.save_threshold:
        keep_threshold(settings, decisions)
    if distributed.is_first():
        evaluation = measured.evaluation_of(tested, decisions, regions)
        measures = measured.measures_of(evaluation, tested)
        if decisions.threshold is not None:
            measures["decisions"] = measured.decided(decisions, tested.scores, tested.labels)
        write_atomically(results / "scores.csv", measured.scores_table(tested, decisions.image_score))
        write_atomically(results / "regions.csv", measured.regions_found(tested, decisions.pixel_threshold))
        tested.draw(evaluation, measures, wanted)
        write_atomically(results / "metrics.json", json.dumps(measures, indent=1) + "\n")
        print("\n".join(measured.summary_of(measures)))
        if "page" in wanted:
            print(f"result page: {tested.page.path}")
        if "figures" in wanted:
            print(f"pictures: {results / 'examples.png'}, {results / 'curves.png'}, {results / 'figures'}/")
    log.finish()
    ledger.finish(tested.files(wanted))  # what was needed on the way, but is not to be kept, is removed


def main(arguments: list[str] | None = None) -> int:
    """Run stage 4. Returns the exit status: 3 if some images of --input could not be read."""
    settings = parse_arguments(arguments)
    if settings.input:
        return watch_input(settings) if settings.watches else inspect_input(settings)
    if settings.submission:
        submit(settings)
        return 0
    measure_test_images(settings)
    if settings.show and distributed.is_first():
        for name in ("examples.png", "curves.png"):
            Image.open(settings.own_results / name).show()
    return 0


if __name__ == "__main__":
    distributed.run(main)
