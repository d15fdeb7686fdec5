"""The result pages: one for the images of a category, one for the measures of all categories.

Both are static: style, script and data are inside the page, pictures in a folder beside it, so that it opens from disk
without a server or network. The templates are in the folder page/.
"""

import html
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from urllib.parse import quote

import numpy as np
from contourpy import contour_generator
from PIL import Image

from student_teacher.evaluation.metrics import Curve, Curves
from student_teacher.images.reading import at_most, encoded
from student_teacher.reports import figures
from student_teacher.reports.published import BESIDE, SOURCES
from student_teacher.runtime.files import write_atomically

TEMPLATES = Path(__file__).resolve().parent / "page"

# The longest side in pixels of the picture on a card, of the one that opens from it, and of map and mask. Maps are
# smooth: stretched over a larger picture, they look the same.
CARD_SIDE, LARGE_SIDE, MAP_SIDE = 320, 1024, 512
CURVE_UNITS = 1000  # width and height of a curve's drawing

NO_CURVES = Curves()


def page_files(folder: Path, numbers: Iterable[int]) -> list[Path]:
    """All files of the page in `folder` that shows images of these numbers."""
    pictures = [path for number in numbers for path in page_pictures(folder, number)]
    return [folder / "index.html", folder / "page" / "cover.jpg", *pictures]


def page_pictures(folder: Path, number: int) -> list[Path]:
    """The page's pictures of the image of this number: large, small and map."""
    return [_picture(folder, number, kind) for kind in ("", "_small", "_map")]


def _picture(folder, number, kind):
    # By number: an image's name may have characters that are not allowed in a file system or URL.
    return folder / "page" / f"{number:04d}{kind}.{'png' if kind == '_map' else 'jpg'}"


class ResultPage:
    """The page of one category: `index.html`, and the folder `page/` with three pictures for each image.

    Images are identified by numbers. Several threads and processes may save pictures at the same time; only one process
    calls `add` for each image and finishes the page. Only names, scores and outlines are kept in memory until then.
    """

    def __init__(self, folder: Path, category: str):
        """Start the page, removing an older one.

        Args:
            folder: where `index.html` goes; made if it is not there.
            category: the page's title.
        """
        self.path = Path(folder) / "index.html"
        self.category = category
        (Path(folder) / "page").mkdir(parents=True, exist_ok=True)
        # If the run stops half-way, no page is better than an old one that shows new pictures.
        self.path.unlink(missing_ok=True)
        self._images: dict[int, dict] = {}

    def picture_of(self, number: int, kind: str = "") -> Path:
        """The path of an image's picture: large (""), small ("_small") or its map ("_map")."""
        return _picture(self.path.parent, number, kind)

    def save_image(self, number: int, picture: Image.Image) -> None:
        """Write the RGB picture of an image, at most LARGE_SIDE long, and a small one."""
        write_atomically(self.picture_of(number), encoded(at_most(picture, LARGE_SIDE), "JPEG", **figures.JPEG))
        write_atomically(self.picture_of(number, "_small"), encoded(at_most(picture, CARD_SIDE), "JPEG", quality=82))

    def save_map(self, number: int, anomaly_map: np.ndarray, vmin: float, vmax: float) -> None:
        """Write the picture of an image's anomaly map (h, w), of any size; it is stretched over the image.

        Args:
            number: the image's.
            anomaly_map: (h, w).
            vmin, vmax: the ends of the maps' colour scale; `figures.colour_scale` proposes them.

        Raises:
            ValueError: vmin is not below vmax.
        """
        values = at_most(Image.fromarray(np.asarray(anomaly_map, dtype=np.float32)), MAP_SIDE)
        picture = Image.fromarray(figures.levels(np.asarray(values), vmin, vmax))
        # A palette with an opacity for each colour needs a third of the bytes of RGBA.
        picture.putpalette(figures.MAP_COLOURS.round().astype(np.uint8).tobytes())
        opacity = (255 * figures.MAP_OPACITY).round().astype(np.uint8)
        # Level 2 takes half the time of the default for a tenth more bytes.
        content = encoded(picture, "PNG", transparency=opacity.tobytes(), compress_level=2)
        write_atomically(self.picture_of(number, "_map"), content)

    def add(
        self, number: int, name: str, kind: str, *, label: int | None, score: float, mask: np.ndarray | None = None
    ) -> None:
        """Add an image whose pictures have been saved.

        Args:
            number: the image's.
            name: of the image's file; any characters.
            kind: of defect, or "good".
            label: zero for good, anything else for anomalous, None if unknown.
            score: the image's anomaly score; from the threshold on the image counts as defective.
            mask: (H, W), nonzero on defects; None where there is none.

        Raises:
            ValueError: the score is not finite.
        """
        score = float(score)
        if not np.isfinite(score):
            raise ValueError(f"the score of {name} is {score}, not a finite number")
        with Image.open(self.picture_of(number)) as picture:
            width, height = picture.size
        entry = {
            "file": self.picture_of(number).stem,
            "name": name,
            "kind": kind,
            "label": None if label is None else int(label != 0),
            "score": score,
            "width": width,
            "height": height,
        }
        if mask is not None and np.any(mask):
            area = Image.fromarray((np.asarray(mask) != 0).astype(np.float32))
            # Every pixel that a defect touches: else small defects would be lost in the reduction.
            area = np.asarray(at_most(area, MAP_SIDE, Image.Resampling.BOX)) > 0
            entry["outline"] = outline_path(area)
            entry["outline_box"] = f"0 0 {2 * area.shape[1]} {2 * area.shape[0]}"
        self._images[number] = entry

    def finish(self, measures: Mapping, curves: Curves = NO_CURVES, *, threshold: float | None = None) -> Path:
        """Write the page and return its path.

        Args:
            measures: as `Evaluation.measures` returns them; those that are missing are shown with the reason.
            curves: as `Evaluation.curves` returns them.
            threshold: that of the decisions, with which the page starts; None or infinity if there are none.
        """
        limit = measures.get("au_pro_limit", 0.3)
        images = [self._images[number] for number in sorted(self._images)]
        content = {
            "measures": measures,
            "threshold": threshold if threshold is not None and np.isfinite(threshold) else None,
            "curves": {
                "image_roc": curve_path(curves.image_roc),
                "pixel_roc": curve_path(curves.pixel_roc),
                "pro": curve_path(curves.pro, limit),
            },
            "images": sorted(images, key=lambda image: -image["score"]),
        }
        self._save_cover()
        # A "<" in a name must not end the script element with the data.
        data = json.dumps(content, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
        _write_page(self.path, "index.html", title=html.escape(self.category), script=_template("page.js"), data=data)
        return self.path

    def _save_cover(self) -> None:
        """The most anomalous image with its map beside it, for the page over categories."""
        path = self.path.with_name("page") / "cover.jpg"
        ranks = {number: (bool(image["label"]), image["score"]) for number, image in self._images.items()}
        if not ranks:
            return
        number = max(sorted(ranks), key=ranks.get)
        small = Image.open(self.picture_of(number, "_small"))
        heat = Image.open(self.picture_of(number, "_map")).convert("RGBA").resize(small.size)
        grey = small.convert("L").convert("RGBA")
        cover = Image.new("RGB", (2 * small.width, small.height))
        cover.paste(small)
        cover.paste(Image.alpha_composite(grey, heat).convert("RGB"), (small.width, 0))
        write_atomically(path, encoded(cover, "JPEG", quality=85))


def outline_path(mask: np.ndarray) -> str:
    """Trace the borders of a mask's regions as an SVG path.

    Args:
        mask: (H, W), nonzero inside.

    Returns:
        The path in units of half a pixel, for the box "0 0 2W 2H". It runs through the middles of the pixels' edges,
        which cuts the corners of staircases.
    """
    inside = np.pad(np.asarray(mask) != 0, 1)
    path = []
    for line in contour_generator(z=inside.astype(float)).lines(0.5):  # closed: the first point comes again at the end
        points = np.rint(2 * line[:-1] - 1).astype(int)
        steps = np.roll(points, -1, axis=0) - points
        points = points[(steps != np.roll(steps, 1, axis=0)).any(axis=1)]  # the corners
        way = " ".join(f"{x} {y}" for x, y in np.diff(points, axis=0).tolist())
        path.append(f"M{points[0, 0]} {points[0, 1]}l{way}z")
    return "".join(path)


def curve_path(curve: Curve | None, limit: float = 1.0, points: int = 400) -> str | None:
    """Draw a rising curve as an SVG path over a square of CURVE_UNITS, up to x = `limit`.

    Args:
        curve: (x, y), x from 0 to 1, y in [0, 1]; None gives None.
        limit: in (0, 1]; the curve is interpolated there.
        points: about how many corners to keep.
    """
    if curve is None:
        return None
    x, y = curve
    end = np.searchsorted(x, limit, side="right")
    x, y = np.append(x[:end], limit), np.append(y[:end], np.interp(limit, x, y))
    x, y = figures.thin(x, y, limit, points)
    across, up = CURVE_UNITS * x / limit, CURVE_UNITS * (1 - y)
    return "M" + "L".join(f"{a:.0f} {b:.0f}" for a, b in zip(across, up, strict=True))


# Of the summary: heading, and what it means. What others published stands beside our own.
SUMMARY_COLUMNS = {
    "category": ("Category", ""),
    "image_au_roc": ("Image\nAU-ROC", "how often a defective image scores above a good one"),
    "efficientad_s_image_au_roc": ("EfficientAD\nsmall\nimage AU-ROC", "the same of EfficientAD, small"),
    "efficientad_m_image_au_roc": ("EfficientAD\nmedium\nimage AU-ROC", "the same of EfficientAD, medium"),
    "image_f1": ("Image\nF1", "F1 of images at the detector's own threshold"),
    "pixel_au_roc": ("Pixel\nAU-ROC", "how often a defect's pixel scores above a good one"),
    "pixel_f1": ("Pixel\nF1", "F1 of pixels at the detector's own threshold"),
    "au_pro": ("AU-PRO", "area under the per-region overlap up to a false positive rate of 0.3, divided by it"),
    "paper_p65": ("Paper\np = 65\nAU-PRO", "the same of the paper with one receptive field of 65 pixels"),
    "paper_multiscale": ("Paper\n3 scales\nAU-PRO", "the same of the paper with 17, 33 and 65 pixels together"),
    "efficientad_s_au_pro": ("EfficientAD\nsmall\nAU-PRO", "the same of EfficientAD, small"),
    "efficientad_m_au_pro": ("EfficientAD\nmedium\nAU-PRO", "the same of EfficientAD, medium"),
    "au_spro_0.05": ("AU-sPRO\n0.05", "the same for regions that saturate, up to a false positive rate of 0.05"),
    "aupimo": ("AUPIMO", "recall of each defect where next to no pixel of good images is a false positive"),
    "seconds": ("Time", "training and test"),
}


def write_summary_page(path: Path, rows: Sequence[Mapping]) -> Path:
    """Write the page of all categories; it links to the pages of those whose folder is beside it.

    Args:
        path: of the page.
        rows: a mapping for each category, in the order to show: `category`; `status`, "done" or "failed"; `error`;
            and as numbers or None, or not at all, the other keys of SUMMARY_COLUMNS. Other keys are left alone. A last
            row whose category is "mean" becomes the table's foot.

    Returns:
        The path.
    """
    path = Path(path)
    rows = list(rows)
    mean = rows.pop() if rows and rows[-1]["category"] == "mean" else None
    columns = [key for key in SUMMARY_COLUMNS if any(row.get(key) is not None for row in rows)]
    differences = [_differences(row) for row in rows]
    # Over the categories that have both, and not the difference of two means over different ones.
    known = {key: [row[key] for row in differences if key in row] for key in BESIDE}
    of_mean = {key: sum(values) / len(values) for key, values in known.items() if values}
    failed = sum(row.get("status") == "failed" for row in rows)
    count = f"{len(rows)} {'category' if len(rows) == 1 else 'categories'}"
    cells = [_summary_row(row, columns, found, path.parent) for row, found in zip(rows, differences, strict=True)]
    _write_page(
        path,
        "summary.html",
        script=_template("summary.js"),
        count=f"{count}, {failed} failed" if failed else count,
        head="".join(map(_heading, columns)),
        body="\n".join(cells),
        foot=_summary_row(mean, columns, of_mean, None) if mean else "",
        sources=html.escape(" ".join(f"{name}: {source}." for name, source in SOURCES.items())),
        hidden="" if BESIDE.keys() & set(columns) else "hidden",
    )
    return path


def _differences(row: Mapping) -> dict[str, float]:
    """Ours less what was published, where there are both."""
    pairs = {key: (row.get(measure), row.get(key)) for key, measure in BESIDE.items()}
    return {key: ours - theirs for key, (ours, theirs) in pairs.items() if None not in (ours, theirs)}


def _heading(key: str) -> str:
    heading, meaning = SUMMARY_COLUMNS[key]
    return (
        f'<th scope="col" role="columnheader" aria-sort="none" data-key="{key}">'
        f'<button type="button" title="{html.escape(meaning)}">{heading}</button></th>'
    )


def _summary_row(row: Mapping, columns: Sequence[str], differences: Mapping[str, float], folder: Path | None) -> str:
    cells = [f'<th scope="row" role="rowheader">{_category_cell(row, folder)}</th>']
    failed = row.get("status") == "failed"
    if failed:
        error = html.escape(f"failed: {row.get('error') or 'unknown reason'}")
        cells.append(f'<td role="cell" class="error" colspan="{len(columns) - 1}">{error}</td>')
    else:
        for key in columns[1:]:
            ours_less_theirs = f"<small>{differences[key]:+.3f}</small>".replace("-", "−") if key in differences else ""
            cell = f"{shown(key, row.get(key))}{ours_less_theirs}"
            cells.append(f'<td role="cell" data-heading="{SUMMARY_COLUMNS[key][0]}">{cell}</td>')
    values = {key: None if failed and key != "category" else row.get(key) for key in columns}
    return f'<tr role="row" data-values="{html.escape(json.dumps(values))}">{"".join(cells)}</tr>'


def _category_cell(row: Mapping, folder: Path | None) -> str:
    category = str(row["category"])
    name = f"<span>{html.escape(category)}</span>"
    if folder is None or row.get("status") == "failed" or not (folder / category / "index.html").exists():
        return name
    pictures = (file for file in ("page/cover.jpg", "examples.png") if (folder / category / file).exists())
    file = next(pictures, None)
    picture = f'<img src="{_url(category, file)}" alt="" loading="lazy">' if file else ""
    return f'<a href="{_url(category, "index.html")}">{picture}{name}</a>'


def shown(key: str, value: float | None) -> str:
    """What stands in the summary for a value of a column."""
    if value is None:
        return "–"
    return _duration(round(value)) if key == "seconds" else f"{value:.3f}"


def _duration(seconds: int) -> str:
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def _url(category: str, file: str) -> str:
    # "./" prevents a colon in a name from being read as a scheme.
    return f"./{quote(os.fsencode(category))}/{file}"


def _template(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _write_page(path: Path, template: str, **parts: str) -> None:
    write_atomically(path, Template(_template(template)).substitute(parts, style=_template("page.css")))
