"""The figures: results, curves, contact sheets and training curves.

They are sized for one column of a two-column paper, with type of 7 to 8 points, at 400 dots per inch, so that the same
files also fill a page on a screen. The colours are those of Okabe and Ito, which colour-blind readers can distinguish;
maps use inferno, which is perceptually uniform. The same input gives the same bytes.

Matplotlib draws the curves. Pillow draws the result of each image: Matplotlib would take longer than the networks.
"""

import io
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from student_teacher.evaluation.metrics import Curves
from student_teacher.images.reading import encoded
from student_teacher.reports import fonts
from student_teacher.runtime.files import write_atomically

DPI = 400
SHEET_DPI = 240
COLUMN_WIDTH = 3.5  # inches
TYPE_SIZE = 7.5  # points
BLUE, VERMILLION, GREEN, ORANGE, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#666666"
HATCH = 160  # grey
OUTLINE = np.array([0, 220, 255], dtype=np.uint8)  # cyan: rare in materials, and not part of inferno

# No styles of the user's, and fonts for what Matplotlib's own lacks only; no date and no random identifiers: the same
# bytes everywhere.
STYLE = {
    **{
        name: value
        for name, value in matplotlib.rcParamsDefault.items()
        if name.split(".")[0]
        in {"axes", "xtick", "ytick", "lines", "font", "text", "legend", "savefig", "svg", "figure"}
    },
    "font.size": TYPE_SIZE,
    "axes.labelsize": TYPE_SIZE,
    "axes.titlesize": TYPE_SIZE,
    "xtick.labelsize": TYPE_SIZE - 0.5,
    "ytick.labelsize": TYPE_SIZE - 0.5,
    "legend.fontsize": TYPE_SIZE - 0.5,
    "legend.frameon": False,
    "legend.handlelength": 1.4,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.2,
    "svg.hashsalt": "anomaly detection",
    "text.parse_math": False,  # a name may have dollar signs in it
}

MAP_COLOURS = (matplotlib.colormaps["inferno"](np.linspace(0, 1, 256))[:, :3] * 255).astype(np.float32)
# Where the map is low the image shows through; where it is high the map covers it.
MAP_OPACITY = 0.95 - 0.75 * np.linspace(1, 0, 256, dtype=np.float32)[:, None] ** 2
_GREYS = np.arange(256, dtype=np.float32)[:, None]
# The colour of each level of the map over each grey: (level * 256 + grey, 3).
OVERLAY = (_GREYS * (1 - MAP_OPACITY[:, None]) + (MAP_COLOURS * MAP_OPACITY)[:, None]).round().astype(np.uint8)
OVERLAY = OVERLAY.reshape(-1, 3)
JPEG = {"quality": 90, "subsampling": 0}


class Example(NamedTuple):
    """One test image for a contact sheet: image (H, W[, 3]) uint8, mask (H, W) or None, map, score and title."""

    image: np.ndarray
    mask: np.ndarray | None
    anomaly_map: np.ndarray
    score: float
    title: str


class Style(NamedTuple):
    """A font and its size."""

    name: str
    points: float


PLAIN, BOLD = Style("DejaVuSans", TYPE_SIZE), Style("DejaVuSans-Bold", TYPE_SIZE)
SMALL = Style("DejaVuSans", TYPE_SIZE - 0.5)


def colour_scale(anomaly_maps: Sequence[np.ndarray]) -> tuple[float, float]:
    """Choose one colour scale for all maps of a category.

    Returns:
        vmin, vmax: the median pixel, typical of good texture, and the value that three quarters of the maps don't
        exceed, so that extreme defects do not darken all other maps.
    """
    vmin = float(np.median([np.median(scores) for scores in anomaly_maps]))
    vmax = float(np.quantile([np.max(scores) for scores in anomaly_maps], 0.75))
    return vmin, max(vmax, vmin + 1e-6 * max(1.0, abs(vmin)))


def overlay(image: np.ndarray, anomaly_map: np.ndarray, vmin: float, vmax: float) -> np.ndarray:
    """Lay a map in inferno over the image in grey.

    Args:
        image: (H, W), (H, W, 1) or (H, W, 3) uint8.
        anomaly_map: (h, w), brought to the image's size bilinearly if it differs.
        vmin, vmax: the ends of the colour scale; values beyond them take the colour of the end.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ValueError: vmin is not below vmax.
    """
    grey = np.asarray(Image.fromarray(_rgb(image)).convert("L"))
    scores = np.asarray(anomaly_map, dtype=np.float32)
    if scores.shape != grey.shape:
        scores = _resize(scores, grey.shape)
    return OVERLAY.take(levels(scores, vmin, vmax).astype(np.uint16) * 256 + grey, axis=0)


def levels(anomaly_map: np.ndarray, vmin: float, vmax: float) -> np.ndarray:
    """A map as indices into the colour table: uint8, 0 at vmin and below, 255 at vmax and above.

    Raises:
        ValueError: vmin is not below vmax.
    """
    if not vmin < vmax:
        raise ValueError(f"the colour scale runs from {vmin} to {vmax}: the second must be higher")
    return ((anomaly_map - vmin) * (255 / (vmax - vmin))).clip(0, 255).round().astype(np.uint8)


def outline(image: np.ndarray, mask: np.ndarray, width: int = 3) -> np.ndarray:
    """Draw a line around the mask's regions, just outside them.

    Args:
        image: (H, W), (H, W, 1) or (H, W, 3) uint8.
        mask: (H, W), nonzero on defects.
        width: of the line in pixels.

    Returns:
        (H, W, 3) uint8.
    """
    inside = np.asarray(mask) != 0
    grown = ndimage.maximum_filter(inside, 2 * width + 1, mode="constant")
    result = _rgb(image).copy()
    result[grown & ~inside] = OUTLINE
    return result


def hatch(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Draw slanting lines over the mask's regions: what is not looked at. Arguments and result as of `outline`."""
    result, period = _rgb(image).copy(), max(4, max(mask.shape) // 64)
    across = np.add.outer(np.arange(mask.shape[0]), np.arange(mask.shape[1])) % period
    result[(np.asarray(mask) != 0) & (across < max(1, period // 4))] = HATCH
    return result


class Sheet:
    """A white picture to write and paste on; positions are in inches from its top left corner."""

    def __init__(self, width: float, height: float, dpi: int):
        self.dpi = dpi
        self.picture = Image.new("RGB", (round(width * dpi), round(height * dpi)), "white")
        self._draw = ImageDraw.Draw(self.picture)

    def write(
        self, words: str, place: tuple[float, float], anchor: str, style: Style, *, colour: str = "black"
    ) -> None:
        """Write a line; `anchor` is Pillow's: which point of the text is at `place`."""
        x, y = (length * self.dpi for length in place)
        self._draw.text((x, y), words, colour, _font_for(words, style, self.dpi), anchor)

    def length(self, words: str, style: Style) -> float:
        """The length of a line of text, in inches."""
        return _font_for(words, style, self.dpi).getlength(words) / self.dpi

    def paste(self, content: np.ndarray, left: float, top: float, room: tuple[int, int]) -> None:
        """Paste (h, w, 3) uint8 into the middle of a box of (H, W) pixels."""
        x = round(left * self.dpi) + (room[1] - content.shape[1]) // 2
        y = round(top * self.dpi) + (room[0] - content.shape[0]) // 2
        self.picture.paste(Image.fromarray(content), (x, y))

    def head(self, example: Example, left: float, right: float, baseline: float) -> None:
        """Write an example's title and its score in one line; a title that is too long is shortened in its middle."""
        score = f"score {example.score:.3g}"
        self.write(score, (right, baseline), "rs", PLAIN)
        words = _printable(example.title)
        room, shown, keep = right - left - 0.1 - self.length(score, PLAIN), words, len(words)
        while self.length(shown, BOLD) > room and keep > 2:
            keep = min(keep - 1, int(keep * room / self.length(shown, BOLD)) + 1)
            shown = f"{words[: keep // 2]}…{words[len(words) - (keep - keep // 2) :]}"
        self.write(shown, (left, baseline), "ls", BOLD)


def result_figure(example: Example, vmin: float, vmax: float) -> Image.Image:
    """Draw one test image: image, ground truth where there is a mask, and anomaly map, on one colour scale.

    Args:
        example: what to draw.
        vmin, vmax: the ends of the colour scale, vmin below vmax; `colour_scale` proposes them.
    """
    margin, gap, bar_width, label_height, title_height = 0.05, 0.05, 0.09, 0.17, 0.2  # inches
    ticks = [f"{value:.2g}" for value in (vmax, (vmin + vmax) / 2, vmin)]
    names = ["image", "anomaly map"]
    if example.mask is not None:
        names.insert(1, "ground truth" if np.any(example.mask) else "empty mask")
    bar = 2 * gap + bar_width + max(_font_for(tick, SMALL, DPI).getlength(tick) for tick in ticks) / DPI
    width = (COLUMN_WIDTH - 2 * margin - bar - (len(names) - 1) * gap) / len(names)
    rows, columns = np.shape(example.image)[:2]
    height = float(np.clip(width * rows / columns, 0.7, 2.4))  # beyond these, images get margins
    sheet = Sheet(COLUMN_WIDTH, title_height + height + label_height, DPI)
    room = round(height * DPI), round(width * DPI)
    for index, (name, content) in enumerate(zip(names, _panels(example, room, vmin, vmax, line=3), strict=True)):
        left = margin + index * (width + gap)
        sheet.paste(content, left, title_height, room)
        sheet.write(name, (left + width / 2, title_height + height + label_height - 0.05), "ms", PLAIN)
    right = left + width
    sheet.head(example, margin, right, title_height - 0.06)
    ramp = np.linspace(vmax, vmin, room[0], dtype=np.float32)[:, None]
    # Over a middle grey, so that the bar shows the same colours as the map.
    scale = overlay(np.full(ramp.shape, 128, dtype=np.uint8), ramp, vmin, vmax).repeat(round(bar_width * DPI), 1)
    sheet.paste(scale, right + gap, title_height, scale.shape[:2])
    for tick, anchor, level in zip(ticks, ("lt", "lm", "lb"), (0, 0.5, 1), strict=True):
        sheet.write(tick, (right + 2 * gap + bar_width, title_height + level * height), anchor, SMALL)
    return sheet.picture


def save_curves_figure(path: Path, measures: Mapping, scores: Mapping[str, np.ndarray], curves: Curves) -> None:
    """Write the ROC curves, the PRO curve and the scores of good and anomalous images, as PNG and as SVG.

    Args:
        path: of the two files, with or without one of their suffixes.
        measures: as `Evaluation.measures` returns them.
        scores: (N,) image scores, of the images of each kind; a row for each, in this order.
        curves: as `Evaluation.curves` returns them.
    """
    with _style():
        _save_both(_curves_figure(measures, scores, curves), path)


def save_training_curve(path: Path, steps: Sequence[float], losses: Mapping[str, Sequence[float]]) -> None:
    """Write losses against steps, as PNG and as SVG; the axis of losses is logarithmic where they span a decade.

    Args:
        path: of the two files, with or without one of their suffixes.
        steps: (T,) ascending.
        losses: (T,) for each name; NaN where it was not recorded. Long curves are drawn pale, with a running mean.
    """
    with _style():
        _save_both(_training_figure(steps, losses), path)


def contact_sheet(rows: Sequence[Example], vmin: float, vmax: float, columns: int = 2) -> Image.Image:
    """Draw many results on one sheet, two columns wide.

    Args:
        rows: the examples, in reading order; each takes three panels: image, ground truth, anomaly map.
        vmin, vmax: the ends of the colour scale.
        columns: how many examples stand side by side.

    Raises:
        ValueError: there are no examples.
    """
    if not rows:
        raise ValueError("a contact sheet needs at least one example")
    columns = min(columns, len(rows))
    gap, wide_gap, margin, title_height, head_height = 0.04, 0.16, 0.05, 0.2, 0.2
    sheet_width = COLUMN_WIDTH * columns
    width = (sheet_width - 2 * margin - (columns - 1) * wide_gap - 2 * columns * gap) / (3 * columns)
    ratios = [len(row.image) / np.shape(row.image)[1] for row in rows]
    height = width * float(np.clip(np.median(ratios), 0.4, 1.6))
    lines = -(-len(rows) // columns)
    sheet = Sheet(sheet_width, head_height + lines * (title_height + height) + margin, SHEET_DPI)
    room = round(height * SHEET_DPI), round(width * SHEET_DPI)
    for index, row in enumerate(rows):
        line, column = divmod(index, columns)
        left = margin + column * (3 * width + 2 * gap + wide_gap)
        top = head_height + line * (title_height + height) + title_height
        sheet.head(row, left, left + 3 * width + 2 * gap, top - 0.05)
        panels = _panels(row, room, vmin, vmax, line=2)
        if row.mask is None:
            panels.insert(1, np.full(panels[0].shape, 235, np.uint8))
        for position, (name, content) in enumerate(zip(("image", "ground truth", "anomaly map"), panels, strict=True)):
            x = left + position * (width + gap)
            sheet.paste(content, x, top, room)
            if line == 0:
                sheet.write(name, (x + width / 2, 0.14), "ms", PLAIN, colour=GREY)
    return sheet.picture


def save_picture(picture: Image.Image, path: Path, dpi: int) -> None:
    """Write a PNG or JPEG, by the suffix; a JPEG has full colour resolution."""
    # Level 2 takes half the time of the default for a tenth more bytes.
    kind, options = ("PNG", {"compress_level": 2}) if path.suffix == ".png" else ("JPEG", JPEG)
    write_atomically(path, encoded(picture, kind, dpi=(dpi, dpi), **options))


def _curves_figure(measures: Mapping, scores: Mapping[str, np.ndarray], curves: Curves) -> Figure:
    strip_height = 0.2 * len(scores) + 0.6
    figure = Figure(figsize=(COLUMN_WIDTH, 1.9 + strip_height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, height_ratios=(1.9, strip_height))
    _draw_roc(figure.add_subplot(grid[0, 0]), measures, curves)
    _draw_pro(figure.add_subplot(grid[0, 1]), measures, curves.pro)
    _draw_scores(figure.add_subplot(grid[1, :]), measures, scores)
    return figure


def _draw_roc(axes, measures, curves):
    for curve, name, colour in ((curves.image_roc, "image", BLUE), (curves.pixel_roc, "pixel", VERMILLION)):
        if curve is not None:
            value = measures[f"{name}_au_roc"]
            axes.plot(*thin(*curve), color=colour, label=f"{name} {value:.3f}", clip_on=False, zorder=6)
    axes.set(xlabel="false positive rate", ylabel="true positive rate", xlim=(0, 1), ylim=(0, 1), title="ROC")
    if curves.image_roc is None and curves.pixel_roc is None:
        _say(axes, measures.get("missing", {}).get("image_au_roc", "no curve"))
    else:
        axes.plot((0, 1), (0, 1), color=GREY, linewidth=0.6, linestyle=(0, (4, 3)))
        # On white, as the diagonal passes behind it; the curves are drawn over it.
        legend = {"frameon": True, "framealpha": 1, "edgecolor": "none", "borderaxespad": 0.3}
        axes.legend(loc="lower right", title="AU-ROC", title_fontsize=TYPE_SIZE - 0.5, **legend)


def _draw_pro(axes, measures, pro):
    limit = measures.get("au_pro_limit", 0.3)
    axes.set(xlabel="false positive rate", ylabel="per-region overlap", xlim=(0, limit), ylim=(0, 1), title="PRO")
    axes.set_xticks(np.linspace(0, limit, 4), [f"{rate:.2g}" for rate in np.linspace(0, limit, 4)])
    if pro is None:
        _say(axes, measures.get("missing", {}).get("au_pro", "no curve"))
    else:
        end = np.searchsorted(pro[0], limit, side="right")
        fpr = np.append(pro[0][:end], limit)
        fpr, overlap_rate = thin(fpr, np.append(pro[1][:end], np.interp(limit, *pro)), span=limit)
        axes.plot(fpr, overlap_rate, color=GREEN, clip_on=False, zorder=3)
        area = f"AU-PRO {measures['au_pro']:.3f}\n(limit {limit:g})"
        axes.fill_between(fpr, overlap_rate, color=GREEN, alpha=0.18, linewidth=0, label=area)
        axes.legend(loc="lower right", borderaxespad=0.2)


def _draw_scores(axes, measures, groups):
    for row, (kind, values) in enumerate(groups.items()):
        # Spread by a sequence that fills the row evenly, instead of at random: the same picture each time.
        offsets = 0.5 * ((np.arange(len(values)) * 0.618034) % 1 - 0.5)
        colour, marker = (BLUE, "o") if kind == "good" else (VERMILLION, "D")
        axes.scatter(values, row + offsets, s=5, color=colour, marker=marker, alpha=0.55, linewidths=0)
    axes.set_yticks(range(len(groups)), [f"{_cut(kind)} ({len(values)})" for kind, values in groups.items()])
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("image score")
    everything = np.concatenate(list(groups.values()))
    if len(everything) and everything.min() > 0 and everything.max() > 50 * everything.min():
        axes.set_xscale("log")
    axes.margins(x=0.03)
    if "image_best_f1" in measures:
        threshold = measures["image_best_f1_threshold"]
        axes.axvline(threshold, color="black", linewidth=0.8, linestyle=(0, (3, 2)), zorder=0)
        axes.set_title(f"best F1 {measures['image_best_f1']:.3f} at the threshold {threshold:.3g}")


def _training_figure(steps: Sequence[float], losses: Mapping[str, Sequence[float]]) -> Figure:
    figure = Figure(figsize=(COLUMN_WIDTH, 2.2), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = np.asarray(steps, dtype=float)
    finite = []
    for (name, values), colour in zip(
        losses.items(), cycle((BLUE, VERMILLION, GREEN, ORANGE, PURPLE, GREY)), strict=False
    ):
        values = np.asarray(values, dtype=float)
        known = np.isfinite(values)
        x, y = steps[known], values[known]
        finite.append(y)
        if len(y) > 100:
            axes.plot(x, y, color=colour, alpha=0.2, linewidth=0.5)
            x, y = _running_mean(x, y, len(y) // 40)
        axes.plot(x, y, color=colour, label=name, marker="o" if len(y) == 1 else None, markersize=3)
    everything = np.concatenate(finite) if finite else np.empty(0)
    if len(everything) and everything.min() > 0 and everything.max() > 10 * everything.min():
        axes.set_yscale("log")
    axes.set(xlabel="step", ylabel="loss")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.margins(x=0.01)
    axes.grid(axis="y", color="0.9", linewidth=0.5)
    if losses:
        # Above the axes, where no curve runs.
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def _rgb(image: np.ndarray) -> np.ndarray:
    image = np.asarray(image)
    if image.dtype != np.uint8:
        raise ValueError(f"an image to draw must be uint8, not {image.dtype}")
    if image.ndim == 2:
        image = image[..., None]
    return np.ascontiguousarray(np.broadcast_to(image, (*image.shape[:2], 3)))


def _resize(array: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(array).resize(shape[::-1], Image.Resampling.BILINEAR))


def _resize_mask(mask: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    # Every pixel that a defect touches: else defects of a few pixels would be lost in the reduction.
    inside = Image.fromarray((np.asarray(mask) != 0).astype(np.float32))
    return np.asarray(inside.resize(shape[::-1], Image.Resampling.BOX)) > 0


def _panels(example: Example, room: tuple[int, int], vmin: float, vmax: float, *, line: int) -> list[np.ndarray]:
    """Image, outlined image if there is a mask, and map, resized to fit into a box of (H, W) pixels."""
    rows, columns = np.shape(example.image)[:2]
    scale = min(room[0] / rows, room[1] / columns)
    shape = max(1, round(rows * scale)), max(1, round(columns * scale))
    shown = _resize(_rgb(example.image), shape)
    found = [shown, overlay(shown, example.anomaly_map, vmin, vmax)]
    if example.mask is not None:
        found.insert(1, outline(shown, _resize_mask(example.mask, shape), line))
    return found


def _font_for(words: str, style: Style, dpi: int) -> ImageFont.FreeTypeFont:
    """Matplotlib's own, as in the curves; one of the machine's for names that it can't write."""
    own = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{style.name}.ttf")
    return _font(own if words.isascii() else fonts.file_for(words, own), style.points * dpi / 72)


@cache
def _font(file: str | Path, size: float) -> ImageFont.FreeTypeFont:
    index = getattr(file, "face_index", 0)  # in a collection of fonts
    return ImageFont.truetype(file, size, index, layout_engine=ImageFont.Layout.BASIC)


@contextmanager
def _style() -> Iterator[None]:
    """STYLE, with the machine's fonts for what Matplotlib's lack; where there is none, boxes and no warnings."""
    with matplotlib.rc_context(STYLE | {"font.family": ["sans-serif", *fonts.families()]}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph .* missing from font")
        yield


def _printable(name: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in name)


def _cut(name: str, length: int = 18) -> str:
    name = _printable(name)
    return name if len(name) <= length else f"{name[: length - 1]}…"


def thin(x: np.ndarray, y: np.ndarray, span: float = 1.0, points: int = 500) -> tuple[np.ndarray, np.ndarray]:
    """Thin a rising curve (N,), (N,): drop points that are closer together than a line's width.

    x runs over `span`, y from 0 to 1; about `points` points are kept.
    """
    way = np.cumsum(np.abs(np.diff(x, prepend=x[0])) / span + np.abs(np.diff(y, prepend=y[0])))
    kept = np.unique(np.append(np.searchsorted(way, np.linspace(0, way[-1], points)), len(x) - 1).clip(0, len(x) - 1))
    return x[kept], y[kept]


def _running_mean(x: np.ndarray, y: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    kernel = np.ones(width) / width
    return np.convolve(x, kernel, mode="valid"), np.convolve(y, kernel, mode="valid")


def _say(axes: Axes, words: str) -> None:
    axes.text(0.5, 0.5, textwrap.fill(words, 17), transform=axes.transAxes, ha="center", va="center", color=GREY)


def _save_both(figure: Figure, path: Path) -> None:
    path = Path(path)
    if path.suffix.lower() in {".png", ".svg"}:
        path = path.with_suffix("")
    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
        content = io.BytesIO()
        figure.savefig(content, format=kind, metadata=metadata)
        write_atomically(path.with_name(f"{path.name}.{kind}"), content.getvalue())
