"""The test images of a category: their maps, scores and pictures, and where these go."""

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from AnomalyDataset import AnomalyDataset
from student_teacher.detection.Detector import Detector
from student_teacher.evaluation.Evaluation import Evaluation
from student_teacher.evaluation.pixels import OnDemand
from student_teacher.images.ignored import packed, unpacked
from student_teacher.images.index import kind_of, place_of
from student_teacher.images.reading import at_most, mapped, stem_of, write_map
from student_teacher.reports import figures
from student_teacher.reports.inspection import shown_side, with_ignored
from student_teacher.reports.result_page import LARGE_SIDE, ResultPage, page_files
from student_teacher.runtime import distributed
from student_teacher.runtime.bars import with_bar
from student_teacher.runtime.prefetch import alone, prefetched
from student_teacher.runtime.resume_log import ResumeLog

SAVED = "maps", "figures", "page"  # what can be written beside the tables


class TestedImages:
    """The images of `dataset`, and a folder for the results of a `detector`.

    Attributes:
        maps: the images' anomaly maps (H,W), read from their files when they are asked for.
        scores: their image scores, float64 (n,).
        labels: 0 for good, 1 for a defect: (n,).
        kinds: the kind of defect of each.
        masks: where the defects are, bool (H,W), unpacked when they are asked for; None for an image without a mask.
        All but labels and kinds are there after `detect`.
    """

    def __init__(self, dataset: AnomalyDataset, detector: Detector, folder: Path):
        dataset.least, dataset.value_range = shown_side(detector), detector.value_range
        self.dataset, self.detector, self.folder = dataset, detector, folder
        self.category = folder.name
        self.page = ResultPage(folder, self.category)
        self.labels = np.array([row["label"] for row in dataset.rows], dtype=int)
        self.kinds = [kind_of(row) for row in dataset.rows]
        self.maps = OnDemand(lambda number: mapped(self.map_of(number)), len(dataset))
        self.scores = np.empty(0)
        self.masks: Sequence[np.ndarray | None] = []

    def map_of(self, number: int) -> Path:
        """The file of an image's anomaly map."""
        name = Path(self.dataset.rows[number]["image_name"])
        return self.folder / "anomaly_maps" / self.category / name.with_name(f"{stem_of(name)}.tiff")

    def figure_of(self, number: int) -> Path:
        """The file of an image's figure."""
        name = self.dataset.rows[number]["image_name"]
        return self.folder / "figures" / place_of(name).with_name(f"{stem_of(name)}.jpg")

    def files(self, wanted: Collection[str] = SAVED) -> list[Path]:
        """All files that are written if these of SAVED are `wanted`."""
        numbers = range(len(self.dataset))
        names = ["scores.csv", "regions.csv", "metrics.json", "detection.unfinished"]
        names += ["curves.png", "curves.svg", "examples.png"] if "figures" in wanted else []
        files = [self.folder / name for name in names]
        files += map(self.map_of, numbers) if "maps" in wanted else ()
        files += map(self.figure_of, numbers) if "figures" in wanted else ()
        return files + (page_files(self.folder, numbers) if "page" in wanted else [])

    def detect(self, image_score: str, log: ResumeLog) -> None:
        """Score all images and write their maps. Resumes after a stop.

        Maps and images for the page are written while the next images are predicted. Each of several processes takes
        its share of the images.
        """
        dataset, detector, page = self.dataset, self.detector, self.page
        scores, masks = [], []
        numbers = distributed.share(range(len(dataset)))

        def predict(number: int, sample: dict) -> tuple:
            score = log.get(sample["path"])
            written = self.map_of(number), page.picture_of(number), page.picture_of(number, "_small")
            if score is not None and all(path.exists() for path in written):
                return number, sample, None, score
            return number, sample, *detector.predict(sample["image"], image_score)

        def keep(found: tuple) -> tuple:
            number, sample, small_map, score = found
            if small_map is not None:
                with alone(sample["size"][0] * sample["size"][1]):
                    anomaly_map = detector.at_own_size(small_map, sample["size"])
                    write_map(self.map_of(number), anomaly_map)
                page.save_image(number, with_ignored(detector, at_most(sample["image"], LARGE_SIDE)))
                log.put(sample["path"], score)
            return score, packed(np.asarray(sample["mask"]) > 0 if dataset.rows[number]["gt_name"] else None)

        predictions = map(predict, numbers, prefetched(dataset.__getitem__, numbers))
        kept = prefetched(keep, predictions, finish=True)
        for found in with_bar(kept, len(numbers), "anomaly maps"):
            for values, value in zip((scores, masks), found, strict=True):
                values.append(value)
        if distributed.active():
            scores, masks = (distributed.in_order(found) for found in (scores, masks))
        self.scores, self.masks = np.array(scores), OnDemand(lambda number: unpacked(masks[number]), len(masks))

    def draw(self, evaluation: Evaluation, measures: dict, wanted: Collection[str]) -> None:
        """Draw curves, figures and page, as far as they are `wanted`: see SAVED."""
        curves = evaluation.curves()
        if "figures" in wanted:
            figures.save_curves_figure(self.folder / "curves.png", measures, self.scores_of_kinds(), curves)
        if {"figures", "page"} & set(wanted):
            self._draw_images(wanted)
        if "page" in wanted:
            self.page.finish(measures, curves, threshold=measures.get("decisions", {}).get("threshold"))

    def scores_of_kinds(self) -> dict[str, np.ndarray]:
        """The image scores of good images, and of each kind of defect."""
        kinds = np.where(self.labels == 0, "good", self.kinds)
        return {kind: self.scores[kinds == kind] for kind in ("good", *sorted({*kinds.tolist()} - {"good"}))}

    def _draw_images(self, wanted):
        """Draw the page's maps, a figure of each image, and a sheet: each kind's highest, median and lowest score."""
        scale = figures.colour_scale(self.maps)
        kinds: dict[str, list[int]] = {}
        for number in np.argsort(-self.scores):
            kinds.setdefault(self.kinds[number], []).append(int(number))
        chosen = [
            n
            for _, group in sorted(kinds.items())
            for n in dict.fromkeys((group[0], group[len(group) // 2], group[-1]))
        ]

        def draw(number: int) -> figures.Example:
            name, kind = Path(self.dataset.rows[number]["image_name"]), self.kinds[number]
            picture = np.asarray(Image.open(self.page.picture_of(number)))
            mask, anomaly_map, score = self.masks[number], self.maps[number], self.scores[number]
            example = figures.Example(picture, mask, anomaly_map, score, f"{kind}/{stem_of(name)}")
            if "figures" in wanted:
                figures.save_picture(figures.result_figure(example, *scale), self.figure_of(number), figures.DPI)
            self.page.save_map(number, anomaly_map, *scale)
            self.page.add(number, name.name, kind, label=int(self.labels[number]), score=score, mask=mask)
            return example

        drawn = prefetched(draw, range(len(self.dataset)))
        bar = enumerate(with_bar(drawn, len(self.dataset), "figures"))
        examples = {number: example for number, example in bar if number in chosen}
        if "figures" in wanted:
            sheet = figures.contact_sheet([examples[number] for number in chosen], *scale)
            figures.save_picture(sheet, self.folder / "examples.png", figures.SHEET_DPI)
