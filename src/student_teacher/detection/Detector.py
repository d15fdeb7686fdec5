"""A trained detector, from one file: an image in; its anomaly map, score, p-value and decision out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from scipy.stats import beta
from torch import Tensor

from student_teacher.detection import scoring
from student_teacher.detection.AnomalyDetector import NORMALISATIONS, AnomalyDetector, Found, scale_from_checkpoint
from student_teacher.detection.BackboneDetector import BackboneDetector
from student_teacher.images import preprocessing
from student_teacher.images.arrays import picture_of
from student_teacher.images.reading import ValueRange, load_reduced
from student_teacher.runtime import checkpoints, device
from student_teacher.runtime.cuda_graph import Recorded
from student_teacher.runtime.errors import UserError

VERSION = 5  # of the file: what it says is right for these networks and scores alone
FALSE_ALARM_RATE = 0.05
CONFIDENCE = 0.95
QUANTILES = 20_001  # of good pixels, for the pixel threshold


class Detection(NamedTuple):
    """What a Detector says of an image."""

    anomaly_map: np.ndarray  # float32 (H,W) at the image's own size; 0 is usual, in deviations
    score: float
    p_value: float | None  # None where the detector was calibrated with other settings
    anomalous: bool | None


def conformal_p_value(held_back: Tensor, score: float) -> float:
    """(1 + number of held-back scores (n,) at least as high) / (n + 1)."""
    return (1 + int((held_back >= score).sum())) / (len(held_back) + 1)


def confident_rate(number: int, rate: float) -> float:
    """The false-alarm rate that holds with CONFIDENCE where `number` good images were asked to keep `rate`, 0 to 1.

    `rate` is kept on average over all sets of as many good images. Given one set, the true rate follows a Beta
    distribution (Vovk 2012, "Conditional validity of inductive conformal predictors"); this is its upper bound.
    """
    allowed = int(rate * (number + 1) + 1e-9)
    return float(beta.ppf(CONFIDENCE, allowed, number + 1 - allowed)) if allowed else 0.0


class Calibration:
    """What is usual on good images, scored by students that have not seen them.

    Their scores make a decision conformal; quantiles of their pixels give the pixel threshold.
    """

    def __init__(self, found: Sequence[Found]):
        """Of what was found in those images."""
        self._scores = {
            kind: torch.cat([scoring.image_scores(image.scored_maps, kind) for image in found])
            .double()
            .cpu()
            .sort()
            .values
            for kind in scoring.IMAGE_SCORES
        }
        pixels = np.concatenate([image.anomaly_maps.flatten().numpy(force=True) for image in found])
        self._pixels = torch.from_numpy(np.quantile(pixels, np.linspace(0, 1, QUANTILES)))

    def scores(self, kind: str = scoring.IMAGE_SCORES[0]) -> Tensor:
        """The held-back images' scores, rising: float64 (n,)."""
        return self._scores[kind]

    def p_value(self, score: float, kind: str = scoring.IMAGE_SCORES[0]) -> float:
        """How usual a score is among good images."""
        return conformal_p_value(self._scores[kind], score)

    def threshold(self, rate: float, kind: str = scoring.IMAGE_SCORES[0]) -> float:
        """From this score on a p-value is `rate` or less; infinity where no score can be so unusual."""
        held_back = self._scores[kind]
        allowed = int(rate * (len(held_back) + 1) + 1e-9) - 1  # held-back scores that may lie above
        return float("inf") if allowed < 0 else float(np.nextafter(held_back[-1 - allowed].item(), np.inf))

    @property
    def smallest_rate(self) -> float:
        """The smallest false-alarm rate that so many held-back images can promise."""
        return 1 / (len(self.scores()) + 1)

    def promise(self, rate: float = FALSE_ALARM_RATE) -> str:
        """What so many images can promise, as a sentence."""
        number = len(self.scores())
        if rate < self.smallest_rate:
            return (
                f"{number} good images can promise a false-alarm rate of {self.smallest_rate:.3f} at the least: ask "
                "for that by --false-alarm-rate, or learn from more"
            )
        return (
            f"{number} good images: a false-alarm rate of {rate:g} is kept on average, at most "
            f"{confident_rate(number, rate):.3f} with {CONFIDENCE:.0%} confidence; the smallest that can be asked for "
            f"is {self.smallest_rate:.3f}"
        )

    def pixel_threshold(self, rate: float) -> float:
        """The score that a share `rate` of the pixels of held-back good images exceeds."""
        return float(self._pixels[round((1 - rate) * (QUANTILES - 1))])

    def state_dict(self) -> dict[str, Any]:
        """What `of_state` makes a Calibration of."""
        return {"held_back": self._scores, "pixels": self._pixels}

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> "Calibration":
        """The Calibration whose `state_dict` that was."""
        found = cls.__new__(cls)
        found._scores, found._pixels = state["held_back"], state["pixels"]
        return found


class Detector:
    """Networks, sizes and calibration together. `load_detector` makes one.

    `image_score` is the one of scoring.IMAGE_SCORES that it takes where none is asked for. `paper` is None but for
    students trained with --paper: then those of their settings that are not the published ones. `value_range` holds the
    values that become black and white in images of more than 8 bits.

    detector = load_detector("model/magnetic_tile/detector.pt")
    found = detector("tile.png")
    print(found.score, found.p_value, found.anomalous, found.anomaly_map.shape)
    """

    def __init__(
        self,
        networks: AnomalyDetector | BackboneDetector,
        size: preprocessing.Size,
        calibration: Calibration | None,
        calibrated_stride: int,
        where: torch.device,
        precision: str = "auto",
        *,
        image_score: str = scoring.IMAGE_SCORES[0],
        paper: Sequence[str] | None = None,
        value_range: ValueRange | None = None,
    ):
        self.image_score, self.paper, self.value_range = image_score, paper, value_range
        self.networks = networks.to(where, memory_format=device.memory_format(where)).eval()
        for student in getattr(networks, "global_students", ()):
            student.compute_in(device.dtype_of(where, precision))
        self.size, self.calibration, self.calibrated_stride = size, calibration, calibrated_stride
        self._where, self._precision = where, precision
        self._transform = preprocessing.image_transform(size)
        self._find = Recorded(self._found) if where.type == "cuda" and size else self._found

    @property
    def least_side(self) -> int | None:
        """Large JPEGs may come with both sides this long: see `images.load_reduced`."""
        return preprocessing.least_side(self.size)

    @property
    def fingerprint(self) -> str:
        """Digest of all that its maps depend on."""
        nets = self.networks
        form = f"{VERSION} {self.size} {nets.stride} {getattr(nets, 'normalisation', '')} {self._precision}"
        padded = [scale.padding for scale in getattr(nets, "scales", ())]
        return f"{checkpoints.fingerprint(nets.state_dict())} {form} {padded} {self.value_range}"

    def look_at(self, picture: Image.Image, kind: str | None = None) -> tuple[Tensor, float]:
        """Anomaly map of an RGB picture at the size that the networks see, (h,w), on the CPU, and its image score."""
        found = self._find(self._transform(picture)[None].to(self._where))
        return found.anomaly_maps[0].cpu(), scoring.image_scores(found.scored_maps, kind or self.image_score).item()

    def _found(self, images):
        with device.autocast(self._where, self._precision):
            return self.networks.find(images)

    def p_value_of(self, score: float, kind: str | None = None) -> float | None:
        """How usual a score from `look_at` is among good images; None without calibration."""
        return None if self.calibration is None else self.calibration.p_value(score, kind or self.image_score)

    def __call__(
        self,
        image: Image.Image | np.ndarray | Tensor | str | Path,
        kind: str | None = None,
        false_alarm_rate: float = FALSE_ALARM_RATE,
    ) -> Detection:
        """Look at an image: a picture or a file of any size and mode, or an array or tensor as `picture_of` takes it.

        Arrays are RGB. OpenCV's are BGR: give `cv2.cvtColor(image, cv2.COLOR_BGR2RGB)`.

        `kind` is one of scoring.IMAGE_SCORES, None the detector's own. It is called anomalous where its p-value is
        `false_alarm_rate` or less. Raises UserError where the file is missing or no image, and for
        an array of another shape or type.
        """
        if isinstance(image, str | Path):
            picture, size = load_reduced(image, self.least_side, self.value_range)
        else:
            picture = picture_of(image, self.value_range)
            size = picture.size[::-1]
        anomaly_map, score = self.look_at(picture, kind)
        p_value = self.p_value_of(score, kind)
        decision = None if p_value is None else p_value <= false_alarm_rate
        return Detection(at_own_size(anomaly_map, size), score, p_value, decision)


def at_own_size(anomaly_map: Tensor, size: tuple[int, int]) -> np.ndarray:
    """The map (h,w) at its image's own `size`, (H,W): float32."""
    return np.array(preprocessing.resize(Image.fromarray(anomaly_map.numpy()), size))


def load_detector(
    path: str | Path,
    patch_sizes: Sequence[int] | None = None,
    stride: int | None = None,
    size: preprocessing.Size | str = "trained",
    normalisation: str | None = None,
    device_name: str = "auto",
    precision: str = "auto",
    *,
    paper: bool = False,
) -> Detector:
    """The detector that students_training.py wrote. What is None or "trained" is as in training.

    Of patch students: with some of the `patch_sizes` alone, or another `size` or `normalisation`, the calibration does
    not hold, and scores have no p-values. With another `stride` it holds nearly: the maximum of a finer map is higher.
    Students of a frozen backbone take none of these. Raises UserError where the file is missing or broken, or can't be
    used as asked; with `paper`, where the students were not trained with --paper.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} is not there: run students_training.py {path.parent.name} first")
    content = checkpoints.load(path, "detector")
    if content.get("detector_version") != VERSION:
        raise UserError(f"{path} is of an earlier version: run students_training.py {content['category']}")
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
                f"{path} has a frozen backbone for teacher, at {trained[0]} x {trained[1]} pixels: it takes no other "
                "--image-size, --patch-size, --stride or --normalisation; train students with those you want"
            )
        networks = BackboneDetector.of_checkpoint(content["backbone"])
    else:
        networks = _patch_detector(path, content, patch_sizes, stride, normalisation)
        same = same and len(networks.scales) == len(content["scales"])
    calibration = Calibration.of_state(content["calibration"]) if same else None
    remembered = {"image_score": content.get("image_score", scoring.IMAGE_SCORES[0]), "paper": content.get("paper")}
    remembered["value_range"] = content.get("value_range") and tuple(content["value_range"])
    where = device.choose(device_name)
    return Detector(networks, size, calibration, content["stride"], where, precision, **remembered)


def _patch_detector(path, content, patch_sizes, stride, normalisation):
    there = {scale["patch_size"]: scale for scale in content["scales"]}
    wanted = sorted(set(patch_sizes or there))
    for patch_size in wanted:
        if patch_size not in there:
            raise UserError(
                f"{path} has patch sizes {', '.join(map(str, there))}, not {patch_size}: "
                f"run students_training.py {content['category']} --patch-size with all that you want"
            )
    scales = [scale_from_checkpoint(there[patch_size]) for patch_size in wanted]
    return AnomalyDetector(scales, stride or content["stride"], normalisation)
