"""Every measure of one category's test set."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from student_teacher.evaluation import pixels
from student_teacher.evaluation.aupimo import aupimo
from student_teacher.evaluation.metrics import (
    AU_PRO_LIMIT,
    AU_PRO_STRICT_LIMIT,
    Curve,
    Curves,
    ThresholdCounts,
    area_under_curve,
    count_gathered,
    count_scores,
    f1,
)
from student_teacher.evaluation.pixels import Maps, Masks, Pixels, Regions

IMAGE_MEASURES = (
    "image_au_roc",
    "image_average_precision",
    "image_best_f1",
    "image_best_f1_threshold",
    "image_f1",
    "image_f1_threshold",
)
PIXEL_MEASURES = (
    "pixel_au_roc",
    "au_pro",
    "au_pro_0.05",
    "aupimo",
    "pixel_average_precision",
    "pixel_best_f1",
    "pixel_best_f1_threshold",
    "pixel_f1",
    "pixel_f1_threshold",
)
SATURATED_MEASURES = ("au_spro", "au_spro_0.05")
ALL = None  # the kind that stands for all of them

NO_ANOMALOUS_IMAGES = "there are no anomalous test images"
NO_GOOD_IMAGES = "there are no good test images"
NO_THRESHOLD = "good images set no threshold"


class Groups(NamedTuple):
    """The pixels of the good images and of each kind apart, so that each kind can be set against the good ones."""

    good: Pixels
    kinds: dict[str, Pixels]

    def against_good(self, kind: str | None) -> list[Pixels]:
        """The good images with those of a kind, or with all."""
        return [self.good, *(self.kinds.values() if kind is ALL else [self.kinds[kind]])]


class Evaluation:
    """Every measure and curve of one category's test set, from one sort of its pixels."""

    def __init__(
        self,
        anomaly_maps: Maps,
        ground_truth: Masks | None,
        image_scores: np.ndarray,
        labels: np.ndarray,
        *,
        kinds: Sequence[str],
        regions: Regions | None = None,
        image_threshold: float | None = None,
        pixel_threshold: float | None = None,
        ignored: Sequence[np.ndarray] | None = None,
        on_disk: Path | None = None,
    ):
        """Measure N test images.

        Args:
            anomaly_maps: (N, H, W), or N maps (H, W) of any sizes.
            ground_truth: masks of the same sizes, nonzero on defects; None for a good image, or None for a category
                without masks. A defective image's mask may be empty: the image counts as anomalous, its pixels as good.
                None for a defective image: where the defect lies is not known, so its pixels do not count.
            image_scores: (N,) finite.
            labels: (N,) zero for good, anything else for anomalous.
            kinds: (N,) the kind of defect; not looked at for good images.
            regions: of each image, which together are its mask, and how they saturate; None where nobody has said.
            image_threshold: set by good images alone: from this score on an image is called anomalous. None: there is
                no such threshold.
            pixel_threshold: the same for pixels of the maps.
            ignored: of each image, nonzero where pixels do not count, neither as good nor as defect.
            on_disk: a folder for nameless files with the pixels of good regions, which can be more than memory holds.
                Maps and masks are read one after another: they may come from files too. None: in memory.

        Raises:
            ValueError: lengths or sizes that differ, a score that is not finite, a good image with a mask that is not
                empty, or regions that are not the mask.
        """
        self._scores = np.asarray(image_scores, dtype=np.float64)
        self._anomalous = np.asarray(labels) != 0
        self._kinds = np.array([str(kind) for kind in kinds])
        self._thresholds = image_threshold, pixel_threshold
        self._check_lengths(len(anomaly_maps), regions)
        self.kinds: list[str] = [str(kind) for kind in np.unique(self._kinds[self._anomalous])]
        self._pixel_measures = PIXEL_MEASURES if regions is None else (*PIXEL_MEASURES, *SATURATED_MEASURES)
        self._unmasked = np.zeros(len(self._anomalous), dtype=bool)
        apart = {"regions": regions, "ignored": ignored, "on_disk": on_disk}
        groups = None if ground_truth is None else self._gather(anomaly_maps, ground_truth, **apart)
        self._of_each = self._aupimo(anomaly_maps, groups, ignored)
        # The counts of the whole set are kept for its curves.
        self._images, self._pixels = self._count_images(ALL), self._count_pixels(groups, ALL)
        self._measures = self._measures_of(ALL, groups, self._images, self._pixels)
        self._measures["au_pro_limit"] = AU_PRO_LIMIT
        self._measures["kinds"] = {
            kind: self._measures_of(kind, groups, self._count_images(kind), self._count_pixels(groups, kind))
            for kind in self.kinds
        }

    def measures(self) -> dict:
        """Return every measure that exists, over all images and for each kind of defect against the good ones.

        Returns:
            A dict that `json` can write: `IMAGE_MEASURES` and `PIXEL_MEASURES` as floats, and where regions are known
            `SATURATED_MEASURES` (AU-PRO up to a false positive rate of 0.3 as `au_pro` and of 0.05 as `au_pro_0.05`;
            F1 at the thresholds that good images set as `image_f1` and `pixel_f1`), `au_pro_limit`, the counts
            `good_images`, `anomalous_images` and, if some have none, `anomalous_images_without_mask`, `missing` with a
            reason for each measure that does not exist and is left out, and `kinds`: for each kind the same measures,
            counts and `missing`, over that kind's images and the good ones.
        """
        return dict(self._measures)

    def aupimo_of_images(self) -> list[float | None]:
        """AUPIMO of each image, whose mean is `aupimo`; None for good images, and where there is nothing to find."""
        return [None if np.isnan(value) else float(value) for value in self._of_each]

    def curves(self) -> Curves:
        """The corners of the curves over all images."""
        image_roc = None if isinstance(self._images, str) else self._images.roc_curve()
        if isinstance(self._pixels, str):
            return Curves(image_roc)
        return Curves(image_roc, self._pixels.roc_curve(), self._pixels.pro_curve())

    def _check_lengths(self, maps: int, regions: Regions | None) -> None:
        lengths = {maps, len(self._scores), len(self._anomalous), len(self._kinds)}
        if len(lengths) > 1:
            raise ValueError(
                f"{maps} anomaly maps, {len(self._scores)} image scores, {len(self._anomalous)} labels "
                f"and {len(self._kinds)} kinds must be as many"
            )
        if regions is not None and len(regions) != maps:
            raise ValueError(f"{maps} anomaly maps, but the regions of {len(regions)} images")
        if not np.isfinite(self._scores).all():
            raise ValueError("an image score is not a finite number")

    def _members(self, kind: str | None) -> np.ndarray:
        return self._anomalous if kind is ALL else self._anomalous & (self._kinds == kind)

    def _gather(
        self,
        anomaly_maps: Maps,
        ground_truth: Masks,
        *,
        regions: Regions | None,
        ignored: Sequence[np.ndarray] | None,
        on_disk: Path | None,
    ) -> Groups:
        anomaly_maps, masks = pixels.check(anomaly_maps, ground_truth)
        for index, mask in enumerate(masks):
            self._unmasked[index] = self._anomalous[index] and mask is None
            if not self._anomalous[index] and mask is not None and mask.any():
                raise ValueError(f"image {index} is labelled good and has a mask that is not empty")

        def of(members):
            chosen = np.flatnonzero(members & ~self._unmasked)
            of_group = None if regions is None else [regions[index] for index in chosen]
            unseen = None if ignored is None else [ignored[index] for index in chosen]
            of_chosen = (
                pixels.OnDemand(lambda number, each=each: each[chosen[number]], len(chosen))
                for each in (anomaly_maps, masks)
            )
            return pixels.gather(*of_chosen, of_group, unseen, on_disk=on_disk)

        return Groups(of(~self._anomalous), {kind: of(self._members(kind)) for kind in self.kinds})

    def _aupimo(self, anomaly_maps: Maps, groups: Groups | None, ignored: Sequence[np.ndarray] | None) -> np.ndarray:
        """AUPIMO of each image, NaN where there is none."""
        values = np.full(len(self._scores), np.nan)
        if groups is not None and self._anomalous.any() and not self._anomalous.all():
            numbers = np.flatnonzero(~self._anomalous)

            def pixels_of(number):
                scores = np.asarray(anomaly_maps[numbers[number]])
                return scores if ignored is None else scores[ignored[numbers[number]] == 0]

            good = pixels.OnDemand(pixels_of, len(numbers))
            indices = np.concatenate([np.flatnonzero(self._members(kind) & ~self._unmasked) for kind in self.kinds])
            values[indices] = aupimo(good, [scores for kind in self.kinds for scores in groups.kinds[kind].defects])
        return values

    def _count_images(self, kind: str | None) -> ThresholdCounts | str:
        """The counts, or in their place why there are none."""
        if not self._anomalous.any():
            return NO_ANOMALOUS_IMAGES
        if self._anomalous.all():
            return NO_GOOD_IMAGES
        taken = ~self._anomalous | self._members(kind)
        return count_scores(self._scores[taken], self._anomalous[taken])

    def _count_pixels(self, groups: Groups | None, kind: str | None) -> ThresholdCounts | str:
        if not self._anomalous.any():
            return NO_ANOMALOUS_IMAGES
        if groups is None or self._unmasked[self._members(kind)].all():
            return "there are no ground truth masks"
        chosen = groups.against_good(kind)
        if not any(group.overlap.regions for group in chosen):
            return "all ground truth masks are empty"
        if not any(len(group.good) for group in chosen):
            return "the ground truth masks leave no good pixel"
        return count_gathered(chosen)

    def _measures_of(
        self, kind: str | None, groups: Groups | None, images: ThresholdCounts | str, counts: ThresholdCounts | str
    ) -> dict:
        members = self._members(kind)
        measures = self._of_images(members, images) | self._of_pixels(members, groups, kind, counts)
        unmasked = int(self._unmasked[members].sum())
        return {
            "good_images": int(np.sum(~self._anomalous)),
            "anomalous_images": int(members.sum()),
            **({"anomalous_images_without_mask": unmasked} if unmasked else {}),
            **{name: value for name, value in measures.items() if not isinstance(value, str)},
            "missing": {name: reason for name, reason in measures.items() if isinstance(reason, str)},
        }

    def _of_images(self, members: np.ndarray, counts: ThresholdCounts | str) -> dict[str, float | str]:
        """The images' measures, in place of one that does not exist the reason."""
        if isinstance(counts, str):
            return dict.fromkeys(IMAGE_MEASURES, counts)
        at_threshold = [NO_THRESHOLD] * 2
        if (threshold := self._thresholds[0]) is not None:
            called = self._scores >= threshold
            found, false = (int(np.sum(called & group)) for group in (members, ~self._anomalous))
            at_threshold = [f1(found, false, counts.positives), float(threshold)]
        values = (counts.au_roc(), counts.average_precision(), *counts.best_f1(), *at_threshold)
        return dict(zip(IMAGE_MEASURES, values, strict=True))

    def _of_pixels(
        self, members: np.ndarray, groups: Groups | None, kind: str | None, counts: ThresholdCounts | str
    ) -> dict[str, float | str]:
        """The same of pixels."""
        if isinstance(counts, str):
            return dict.fromkeys(self._pixel_measures, counts)
        at_threshold = [NO_THRESHOLD] * 2
        if (threshold := self._thresholds[1]) is not None:
            found, false = np.sum(
                [group.at_or_above(threshold) for group in groups.against_good(kind)], axis=0
            ).tolist()
            at_threshold = [f1(found, false, counts.positives), float(threshold)]
        values = [counts.au_roc(), *_areas(counts.pro_curve())]
        values.append(NO_GOOD_IMAGES if self._anomalous.all() else float(np.nanmean(self._of_each[members])))
        values += [counts.average_precision(), *counts.best_f1(), *at_threshold]
        if counts.saturated_overlap is not None:
            values += _areas(counts.spro_curve())
        return dict(zip(self._pixel_measures, values, strict=True))


def _areas(curve: Curve) -> list[float]:
    return [area_under_curve(*curve, limit) for limit in (AU_PRO_LIMIT, AU_PRO_STRICT_LIMIT)]
