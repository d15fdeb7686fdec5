"""A trained detector in one file: image in, anomaly map, score, p-value and decision out."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.stats import beta
from torch import Tensor

from student_teacher.detection import scoring
from student_teacher.detection.AnomalyDetector import NORMALISATIONS, AnomalyDetector, Maps, scale_from_checkpoint
from student_teacher.detection.BackboneDetector import BackboneDetector
from student_teacher.detection.decisions import FALSE_ALARM_RATE, PIXEL_FALSE_ALARM_RATE, Decisions, Threshold
from student_teacher.detection.PixelQuantiles import PixelQuantiles
from student_teacher.detection.regions import AnomalousRegion, regions_above
from student_teacher.images import ignored as ignoring
from student_teacher.images import preprocessing
from student_teacher.images.arrays import picture_of
from student_teacher.images.reading import ValueRange, load_reduced
from student_teacher.runtime import checkpoints, device, distributed
from student_teacher.runtime.cuda_graph import Recorded
from student_teacher.runtime.errors import UserError
from student_teacher.runtime.prefetch import prefetched

VERSION = 9  # of the file; increase it when networks or scores change, as the calibration is then wrong
CONFIDENCE = 0.95
QUANTILES = 20_001  # of good images' pixels, for the pixel threshold


class Detection(NamedTuple):
    """A Detector's result for one image."""

    anomaly_map: np.ndarray  # float32 (H,W) at the image's own size, in stds above the mean of good images
    score: float
    p_value: float | None  # None if the detector was calibrated with other settings
    anomalous: bool | None
    pixel_threshold: float | None

    @property
    def regions(self) -> list[AnomalousRegion]:
        """The connected regions above the pixel threshold, the highest first. Raises UserError if there is none."""
        if self.pixel_threshold is None:
            raise UserError("regions need a pixel threshold: load the detector with the settings of its training")
        return regions_above(self.anomaly_map, self.pixel_threshold)


def conformal_p_value(good_scores: Tensor, score: float) -> float:
    """(1 + number of calibration scores (n,) at least as high) / (n + 1), in (0, 1]."""
    return (1 + int((good_scores >= score).sum())) / (len(good_scores) + 1)


def alarms_allowed(number: int, rate: float) -> int:
    """How many of `number` + 1 good images may be called anomalous at this false-alarm rate, 0 to 1."""
    return int(rate * (number + 1) + 1e-9)


def confident_rate(number: int, rate: float) -> float:
    """The false-alarm rate, 0 to 1, that is not exceeded with CONFIDENCE when `number` good images calibrate `rate`.

    `rate` holds on average over all sets of `number` good images. For one set, the true rate follows a Beta
    distribution (Vovk 2012, "Conditional validity of inductive conformal predictors"); this is its upper bound.
    """
    allowed = alarms_allowed(number, rate)
    return float(beta.ppf(CONFIDENCE, allowed, number + 1 - allowed)) if allowed else 0.0


class Calibration:
    """Scores of good images, computed by students that have not seen them.

    Image scores give conformal p-values; quantiles of the pixels' scores give the pixel threshold.
    """

    def __init__(
        self,
        found: Iterable[Maps],
        ignored: np.ndarray | None = None,
        *,
        shared: bool = False,
        gains: Mapping[str, float] | None = None,
    ):
        """From those images' maps, without regions to ignore (h,w).

        `shared`: each of several processes gives the maps of its share of the images. `gains`, by image score, are
        added to all images' scores.
        """
        scores: list[dict[str, Tensor]] = []
        pixels = PixelQuantiles(shared)
        for image in found:
            seen = ignoring.seen(ignored, tuple(image.anomaly_maps.shape[1:]))
            scores.append(
                {
                    name: scoring.image_scores(image.scored_maps, name, seen).double().cpu()
                    for name in scoring.IMAGE_SCORES
                }
            )
            pixels.update(image.anomaly_maps[:, seen])
        if shared:
            scores = [each for part in distributed.gathered(scores) for each in part]
        together = {name: torch.cat([each[name] for each in scores]) for name in scoring.IMAGE_SCORES}
        self._scores = {name: (own + gains[name] if gains else own).sort().values for name, own in together.items()}
        self._pixels = torch.from_numpy(pixels.at(np.linspace(0, 1, QUANTILES)))

    def scores(self, image_score: str) -> Tensor:
        """The good images' scores, ascending: float64 (n,)."""
        return self._scores[image_score]

    def p_value(self, score: float, image_score: str) -> float:
        """The conformal p-value of a score, in (0, 1]: how common scores at least as high are among good images."""
        return conformal_p_value(self._scores[image_score], score)

    def threshold(self, rate: float, image_score: str) -> float:
        """The score from which the p-value is `rate` or less; infinity if too few images for any p-value so low."""
        scores = self._scores[image_score]
        allowed = alarms_allowed(len(scores), rate) - 1  # scores that may lie above it
        return float("inf") if allowed < 0 else float(np.nextafter(scores[-1 - allowed].item(), np.inf))

    @property
    def number(self) -> int:
        """How many good images there are."""
        return len(self._scores[scoring.MEAN])

    @property
    def smallest_rate(self) -> float:
        """The smallest false-alarm rate that this number of images can guarantee."""
        return 1 / (self.number + 1)

    def promise(self, rate: float = FALSE_ALARM_RATE) -> str:
        """The guaranteed false-alarm rate, as a sentence for the user."""
        number = self.number
        if rate < self.smallest_rate:
            return (
                f"{number} good images can guarantee a false-alarm rate of {self.smallest_rate:.3f} at best: set "
                "--false-alarm-rate to that or higher, or train on more images"
            )
        return (
            f"{number} good images: a false-alarm rate of {rate:g} holds on average, at most "
            f"{confident_rate(number, rate):.3f} with {CONFIDENCE:.0%} confidence; the smallest possible rate is "
            f"{self.smallest_rate:.3f}"
        )

    def pixel_threshold(self, rate: float) -> float:
        """The score that a fraction `rate` of the good images' pixels exceeds."""
        return float(self._pixels[round((1 - rate) * (QUANTILES - 1))])

    def state_dict(self) -> dict[str, Any]:
        """The calibration as tensors, for `of_state`."""
        return {"scores": self._scores, "pixels": self._pixels}

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> "Calibration":
        """The inverse of `state_dict`."""
        calibration = cls.__new__(cls)
        calibration._scores, calibration._pixels = state["scores"], state["pixels"]
        return calibration


class Detector:
    """Networks, sizes and calibration together. `load_detector` makes one.

    `image_score`, one of scoring.IMAGE_SCORES, is its default; None takes that of the networks. `paper` is None unless
    the students were trained with --paper: then it lists their settings that differ from the published ones.
    `value_range` holds the values that become black and white in images of more than 8 bits. `saved_threshold` is that
    of --save-threshold, if any. Regions (h,w) that were `painted` over in training are painted over here too, and
    ignored, as are those of `ignored`.

    detector = load_detector("model/magnetic_tile/detector.pt")
    found = detector("tile.png")
    print(found.score, found.p_value, found.anomalous, found.anomaly_map.shape)
    """

    def __init__(
        self,
        networks: AnomalyDetector | BackboneDetector,
        size: preprocessing.Size,
        calibration: Calibration | None,
        *,
        calibrated_stride: int,
        where: torch.device,
        precision: str = "auto",
        image_score: str | None = None,
        paper: Sequence[str] | None = None,
        value_range: ValueRange | None = None,
        saved_threshold: Threshold | None = None,
        painted: np.ndarray | None = None,
        ignored: np.ndarray | None = None,
    ):
        self.painted = painted
        self._ignored = [mask for mask in (painted, ignored) if mask is not None]
        self.saved_threshold = saved_threshold
        self.image_score, self.paper, self.value_range = image_score or networks.image_score, paper, value_range
        self._on = device.Compute(where, precision)
        self.networks = self._on.place(networks).eval()
        for student in getattr(networks, "global_students", ()):
            student.compute_in(device.dtype_of(where, precision))
        self.size, self.calibration, self.calibrated_stride = size, calibration, calibrated_stride
        self._transform = preprocessing.image_transform(size, painted)
        self._maps = Recorded(self._compute) if where.type == "cuda" and size else self._compute

    @property
    def least_side(self) -> int | None:
        """Both sides of an image must be at least this long, in pixels: see reading.load_reduced."""
        return preprocessing.least_side(self.size)

    @property
    def fingerprint(self) -> str:
        """Digest of everything that its maps depend on."""
        nets = self.networks
        form = f"{VERSION} {self.size} {nets.stride} {getattr(nets, 'normalisation', '')} {self._on.precision}"
        padded = [scale.padding for scale in getattr(nets, "scales", ())]
        masks = [ignoring.digest_of(mask) for mask in self._ignored]
        return f"{checkpoints.fingerprint(nets.state_dict())} {form} {padded} {self.value_range} {masks}"

    @property
    def ignores(self) -> bool:
        """Whether regions of images are ignored."""
        return bool(self._ignored)

    def ignored_at(self, size: tuple[int, int]) -> np.ndarray | None:
        """Where to ignore an image or map (H,W); None where nothing is to be ignored."""
        if not self.ignores:
            return None
        ignored = np.any([ignoring.at(mask, size) for mask in self._ignored], axis=0)
        if ignored.all():
            raise UserError(f"the regions to ignore leave nothing of {size[0]} x {size[1]} places to be looked at")
        return ignored

    def predict(self, picture: Image.Image, image_score: str | None = None) -> tuple[Tensor, float]:
        """Anomaly map (h,w) of an RGB picture, at the networks' own resolution, on the CPU; and its image score."""
        maps = self._maps(self._transform(picture)[None].to(self._on.where))
        ignored = self.ignored_at(tuple(maps.anomaly_maps.shape[1:]))
        seen = None if ignored is None else torch.from_numpy(~ignored)
        score = scoring.image_scores(maps.scored_maps, image_score or self.image_score, seen)
        return torch.from_numpy(_lowered(maps.anomaly_maps[0].cpu().numpy(), ignored)), score.item()

    def at_own_size(self, anomaly_map: Tensor, size: tuple[int, int]) -> np.ndarray:
        """The map (h,w), resized to its image's own `size` (H,W): float32. What is ignored has the lowest score."""
        return _lowered(at_own_size(anomaly_map, size), self.ignored_at(size))

    def _compute(self, images):
        with self._on.autocast():
            return self.networks.maps(images)

    def p_value_of(self, score: float, image_score: str | None = None) -> float | None:
        """The p-value of a score from `predict`, in (0, 1]; None without calibration."""
        return None if self.calibration is None else self.calibration.p_value(score, image_score or self.image_score)

    def decisions(
        self,
        image_score: str | None = None,
        false_alarm_rate: float | None = None,
        pixel_false_alarm_rate: float = PIXEL_FALSE_ALARM_RATE,
        threshold: float | None = None,
    ) -> Decisions:
        """When images are anomalous: from `threshold` on, or else as often among good ones as `false_alarm_rate` says.

        With neither, the threshold that --save-threshold has kept counts, or else a rate of FALSE_ALARM_RATE. Rates
        are from 0 to 1; `image_score` is as in `__call__`.
        """
        own = Decisions(image_score or self.image_score, None, None)
        if (calibration := self.calibration) is not None:
            rate = false_alarm_rate or FALSE_ALARM_RATE
            from_score = calibration.threshold(rate, own.image_score)
            own = Decisions(own.image_score, from_score, calibration.pixel_threshold(pixel_false_alarm_rate), rate)
            if self.saved_threshold and false_alarm_rate is None and own.image_score == self.image_score:
                own = own.by(self.saved_threshold)
        return own if threshold is None else own.by(Threshold(threshold, from_labels=False))

    def __call__(
        self,
        image: Image.Image | np.ndarray | Tensor | str | Path,
        image_score: str | None = None,
        false_alarm_rate: float | None = None,
        threshold: float | None = None,
    ) -> Detection:
        """Predict one image: a picture or a file of any size and mode, or an array or tensor as `picture_of` takes it.

        Arrays are RGB. OpenCV's are BGR: give `cv2.cvtColor(image, cv2.COLOR_BGR2RGB)`.

        `image_score` is one of scoring.IMAGE_SCORES; None takes the detector's own. The image is anomalous if its
        p-value is at most `false_alarm_rate`, 0 to 1, or its score at least `threshold`: see `decisions`. Raises
        UserError if the file is missing or not an image, and for an array of another shape or type.
        """
        return self.batch([image], image_score, false_alarm_rate, threshold)[0]

    def batch(
        self,
        images: Sequence[Image.Image | np.ndarray | Tensor | str | Path],
        image_score: str | None = None,
        false_alarm_rate: float | None = None,
        threshold: float | None = None,
    ) -> list[Detection]:
        """Predict several images, files read by several threads; arguments and errors as of `__call__`."""
        decisions = self.decisions(image_score, false_alarm_rate, threshold=threshold)
        found = []
        for picture, size in prefetched(self._read, images):
            anomaly_map, score = self.predict(picture, image_score)
            p_value, anomalous = self.p_value_of(score, image_score), decisions.anomalous(score)
            own_map = self.at_own_size(anomaly_map, size)
            found.append(Detection(own_map, score, p_value, anomalous, decisions.pixel_threshold))
        return found

    def _read(self, image):
        if isinstance(image, str | Path):
            return load_reduced(image, self.least_side, self.value_range)
        picture = picture_of(image, self.value_range)
        return picture, picture.size[::-1]


def at_own_size(anomaly_map: Tensor, size: tuple[int, int]) -> np.ndarray:
    """The map (h,w), resized to its image's own `size` (H,W): float32."""
    # As Pillow resizes, to rounding, and three times as fast.
    return F.interpolate(anomaly_map[None, None], size, mode="bilinear", antialias=True)[0, 0].numpy()


def _lowered(anomaly_map, ignored):
    """The map, in which whatever is ignored now has the lowest score of what counts."""
    if ignored is not None:  # in place: the map of a line scan has a gigabyte
        anomaly_map[ignored] = anomaly_map.min(where=~ignored, initial=np.inf)
    return anomaly_map


def load_detector(
    path: str | Path,
    patch_sizes: Sequence[int] | None = None,
    stride: int | None = None,
    size: preprocessing.Size | str = "trained",
    *,
    normalisation: str | None = None,
    device_name: str = "auto",
    precision: str = "auto",
    paper: bool = False,
    ignored: np.ndarray | None = None,
) -> Detector:
    """Load the detector that students_training.py wrote. None and "trained" stand for the settings of training.

    For patch students only: with fewer `patch_sizes`, or another `size` or `normalisation`, the calibration does not
    hold, and there are no p-values. With another `stride` p-values are approximate: the maximum of a finer map is
    higher. Students of a frozen backbone accept none of these four. A mask `ignored` (h,w) is ignored beside what was
    ignored in training; p-values are then cautious. Raises UserError if the file is missing or broken, or if an option
    doesn't fit it; with `paper`, also if the students were not trained with --paper.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} is not there: run students_training.py {path.parent.name} first")
    content = checkpoints.load(path, "detector")
    if content.get("detector_version") != VERSION:
        raise UserError(f"{path} was written by another version: run students_training.py {content['category']}")
    if paper and content.get("paper") is None:
        raise UserError(
            f"{path} was not trained with --paper: run students_training.py {content['category']} --paper, with "
            "another --model to keep this one"
        )
    trained = content["image_size"] and tuple(content["image_size"])
    size = trained if size == "trained" else size
    own_normalisation = content.get("normalisation", NORMALISATIONS[0])
    normalisation = normalisation or own_normalisation
    same = size == trained and normalisation == own_normalisation
    if "backbone" in content:
        if not same or patch_sizes or stride:
            raise UserError(
                f"{path} has a frozen backbone as teacher, at {trained[0]} x {trained[1]} pixels: leave out "
                "--image-size, --patch-size, --stride and --normalisation, or train students with other settings"
            )
        networks = BackboneDetector.of_checkpoint(content["backbone"])
    else:
        networks = _patch_detector(path, content, patch_sizes, stride=stride, normalisation=normalisation)
        same = same and len(networks.scales) == len(content["scales"])
    calibration = Calibration.of_state(content["calibration"]) if same else None
    remembered = {"image_score": content.get("image_score"), "paper": content.get("paper")}
    remembered["value_range"] = content.get("value_range") and tuple(content["value_range"])
    remembered["saved_threshold"] = content.get("threshold") and Threshold(*content["threshold"])
    remembered |= {"painted": ignoring.unpacked(content.get("ignored")), "ignored": ignored}
    where = device.choose(device_name)
    remembered["calibrated_stride"] = content["stride"]
    return Detector(networks, size, calibration, where=where, precision=precision, **remembered)


def save_threshold(path: Path, threshold: Threshold | None) -> None:
    """Keep a threshold for the detector's own image score in detector.pt, or None; all else stays as it is.

    Raises UserError if the file can't be read or written.
    """
    content = checkpoints.load(path, "detector")
    checkpoints.save(path, "detector", content["category"], content | {"threshold": threshold and tuple(threshold)})


def _patch_detector(path, content, patch_sizes, *, stride, normalisation):
    there = {scale["patch_size"]: scale for scale in content["scales"]}
    wanted = sorted(set(patch_sizes or there))
    for patch_size in wanted:
        if patch_size not in there:
            raise UserError(
                f"{path} has patch sizes {', '.join(map(str, there))}, not {patch_size}: "
                f"run students_training.py {content['category']} --patch-size with all sizes that you need"
            )
    scales = [scale_from_checkpoint(there[patch_size]) for patch_size in wanted]
    return AnomalyDetector(scales, stride or content["stride"], normalisation)
