"""The pictures: results, curves, contact sheets and training curves.

Sized in inches for one column of a two-column paper, with type of 7 to 8 points, and drawn at 400 dots an inch, so that
the same files fill a page on a screen. Colours are those of Okabe and Ito, which colour-blind readers tell apart, and
maps are drawn in inferno, which is perceptually uniform. The same input gives the same bytes.
"""

import textwrap
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from PIL import Image
from scipy import ndimage

DPI = 400
SHEET_DPI = 240
COLUMN_WIDTH = 3.5  # inches
TYPE_SIZE = 7.5  # points
BLUE, VERMILLION, GREEN, ORANGE, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#666666"
OUTLINE = np.array([0, 220, 255], dtype=np.uint8)  # cyan: rare in materials, and not in inferno

# No fonts and styles of the user's own, no date and no random identifiers: the same bytes anywhere.
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
}

MAP_COLOURS = (matplotlib.colormaps["inferno"](np.linspace(0, 1, 256))[:, :3] * 255).astype(np.float32)
# Where the map is low the image shows through; where it is high the map covers it.
MAP_OPACITY = 0.95 - 0.75 * np.linspace(1, 0, 256, dtype=np.float32)[:, None] ** 2


class Example(NamedTuple):
    """One test image for a contact sheet: image (H, W[, 3]) uint8, mask (H, W) or None, map, score and title."""

    image: np.ndarray
    mask: np.ndarray | None
    anomaly_map: np.ndarray
    score: float
    title: str


def colour_scale(anomaly_maps: Sequence[np.ndarray]) -> tuple[float, float]:
    """Choose one colour scale for all maps of a category.

    Returns:
        vmin, vmax: from the median pixel, which is what good texture scores, to the value that the maxima of three
        maps in four stay below, so that extreme defects do not darken all the others.
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
    if not vmin < vmax:
        raise ValueError(f"the colour scale runs from {vmin} to {vmax}: the second must be the higher")
    grey = np.asarray(Image.fromarray(_rgb(image)).convert("L"), dtype=np.float32)[..., None]
    scores = np.asarray(anomaly_map, dtype=np.float32)
    if scores.shape != grey.shape[:2]:
        scores = _resize(scores, grey.shape[:2])
    level = ((scores - vmin) * (255 / (vmax - vmin))).clip(0, 255).round().astype(np.uint8)
    opacity = MAP_OPACITY[level]
    return (grey * (1 - opacity) + (MAP_COLOURS * MAP_OPACITY)[level]).round().astype(np.uint8)


def outline(image: np.ndarray, mask: np.ndarray, width: int = 3) -> np.ndarray:
    """Draw a line round the mask's regions, just outside of them.

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


class ResultFigure:
    """The picture of one test image: image, ground truth and anomaly map, on one colour scale for a category.

    Made once for a category and used for every image: Matplotlib sets the type, the panels' pixels are put in place
    directly, which takes a fraction of the time of a figure made anew.
    """

    MARGIN, GAP, BAR_WIDTH = 0.05, 0.05, 0.09  # inches
    LABEL_HEIGHT, TITLE_HEIGHT = 0.17, 0.2
    MIN_HEIGHT, MAX_HEIGHT = 0.7, 2.4  # of a panel; images beyond it get margins

    def __init__(self, vmin: float, vmax: float):
        """Take the ends of the colour scale, vmin below vmax; `colour_scale` proposes them."""
        self.vmin, self.vmax = vmin, vmax
        with matplotlib.rc_context(STYLE):
            self.figure = Figure(dpi=DPI)
            self.canvas = FigureCanvasAgg(self.figure)
            self.title = self.figure.text(0, 0, "", va="baseline", ha="left", weight="bold", parse_math=False)
            self.score = self.figure.text(0, 0, "", va="baseline", ha="right", parse_math=False)
            self.labels = [self.figure.text(0, 0, "", va="baseline", ha="center") for _ in range(3)]
            self.ticks = [
                self.figure.text(0, 0, text, va=va, ha="left", fontsize=TYPE_SIZE - 0.5)
                for text, va in zip(_tick_texts(vmin, vmax), ("bottom", "center", "top"), strict=True)
            ]
            self.tick_room = self.GAP + max(tick.get_window_extent().width for tick in self.ticks) / DPI

    def draw(
        self, image: np.ndarray, mask: np.ndarray | None, anomaly_map: np.ndarray, score: float, title: str = ""
    ) -> np.ndarray:
        """Draw one result.

        Args:
            image: (H, W), (H, W, 1) or (H, W, 3) uint8.
            mask: (H, W), nonzero on defects; None leaves the ground truth out.
            anomaly_map: (h, w) of any size; it is stretched over the image.
            score: the image's anomaly score.
            title: shortened in its middle if it is too long for one line.

        Returns:
            (height, width, 3) uint8.
        """
        image = _rgb(image)
        panels = 2 if mask is None else 3
        bar = self.GAP + self.BAR_WIDTH + self.tick_room
        width = (COLUMN_WIDTH - 2 * self.MARGIN - bar - (panels - 1) * self.GAP) / panels
        height = float(np.clip(width * image.shape[0] / image.shape[1], self.MIN_HEIGHT, self.MAX_HEIGHT))
        total = round((self.TITLE_HEIGHT + height + self.LABEL_HEIGHT) * DPI) / DPI
        lefts = [self.MARGIN + index * (width + self.GAP) for index in range(panels)]
        with matplotlib.rc_context(STYLE):
            self._place_text(lefts, width, height, total, score, title, mask)
            self.canvas.draw()
        picture = np.array(self.canvas.buffer_rgba())[..., :3]
        shape = _fit(image.shape[:2], (round(height * DPI), round(width * DPI)))
        shown = _resize(image, shape)
        contents = [
            shown,
            overlay(shown, _resize(np.asarray(anomaly_map, dtype=np.float32), shape), self.vmin, self.vmax),
        ]
        if mask is not None:
            contents.insert(1, outline(shown, _resize_mask(mask, shape)))
        top, rows = round(self.TITLE_HEIGHT * DPI), round(height * DPI)
        for left, content in zip(lefts, contents, strict=True):
            _paste(picture, content, top, round(left * DPI), rows, round(width * DPI))
        ramp = np.linspace(self.vmax, self.vmin, rows, dtype=np.float32)[:, None].repeat(round(self.BAR_WIDTH * DPI), 1)
        # Over a middle grey, so that the bar shows the colours that the map has.
        scale = overlay(np.full(ramp.shape, 128, dtype=np.uint8), ramp, self.vmin, self.vmax)
        _paste(picture, scale, top, round((lefts[-1] + width + self.GAP) * DPI), *ramp.shape)
        return picture

    def save(
        self,
        path: Path,
        image: np.ndarray,
        mask: np.ndarray | None,
        anomaly_map: np.ndarray,
        score: float,
        title: str = "",
    ) -> None:
        """Draw one result, as `draw` does, and write it as a PNG."""
        # Level 2 takes half the time of level 4 for a tenth more bytes.
        _write_png(path, self.draw(image, mask, anomaly_map, score, title), DPI, compress_level=2)

    def _place_text(
        self,
        lefts: list[float],
        width: float,
        height: float,
        total: float,
        score: float,
        title: str,
        mask: np.ndarray | None,
    ) -> None:
        self.figure.set_size_inches(COLUMN_WIDTH, total)
        right = lefts[-1] + width

        def put(text: Text, x: float, y: float) -> None:
            text.set_position((x / COLUMN_WIDTH, y / total))

        baseline = total - self.TITLE_HEIGHT + 0.06
        put(self.score, right, baseline)
        self.score.set_text(f"score {score:.3g}")
        put(self.title, lefts[0], baseline)
        room = (right - lefts[0] - 0.1) * DPI - self.score.get_window_extent().width
        _shorten(self.title, title, room)
        names = ["image", "anomaly map"]
        if mask is not None:
            names.insert(1, "ground truth" if np.any(mask) else "empty mask")
        for index, label in enumerate(self.labels):
            label.set_text(names[index] if index < len(names) else "")
            if index < len(names):
                put(label, lefts[index] + width / 2, 0.05)
        for tick, level in zip(self.ticks, (0, 0.5, 1), strict=True):
            put(tick, right + 2 * self.GAP + self.BAR_WIDTH, self.LABEL_HEIGHT + level * height)


def save_curves_figure(
    path: Path,
    measures: Mapping,
    scores: np.ndarray,
    labels: np.ndarray,
    kinds: Sequence[str],
    image_roc: tuple[np.ndarray, np.ndarray] | None = None,
    pixel_roc: tuple[np.ndarray, np.ndarray] | None = None,
    pro: tuple[np.ndarray, np.ndarray] | None = None,
) -> None:
    """Write the ROC curves, the PRO curve and the scores of good and anomalous images, as PNG and as SVG.

    Args:
        path: of the two files, with or without one of their suffixes.
        measures: as `metrics.Evaluation.measures` returns them.
        scores: (N,) image scores.
        labels: (N,) zero for good, anything else for anomalous.
        kinds: (N,) the kind of defect; good images stand in one row whatever it says.
        image_roc, pixel_roc: (fpr, tpr); None where there is none.
        pro: (fpr, pro); None where there is none.
    """
    with matplotlib.rc_context(STYLE):
        _save_both(_curves_figure(measures, scores, labels, kinds, image_roc, pixel_roc, pro), path)


def save_training_curve(path: Path, steps: Sequence[float], losses: Mapping[str, Sequence[float]]) -> None:
    """Write losses against steps, as PNG and as SVG; the axis of losses is logarithmic where they span a decade.

    Args:
        path: of the two files, with or without one of their suffixes.
        steps: (T,) ascending.
        losses: (T,) for each name; NaN where it was not recorded. Long ones are drawn pale under a running mean.
    """
    with matplotlib.rc_context(STYLE):
        _save_both(_training_figure(steps, losses), path)


def save_contact_sheet(path: Path, rows: Sequence[Example], vmin: float, vmax: float, columns: int = 2) -> None:
    """Write many results on one sheet, as a PNG of twice a column's width.

    Args:
        path: of the file.
        rows: the examples, in reading order; each takes three panels: image, ground truth, anomaly map.
        vmin, vmax: the ends of the colour scale.
        columns: how many examples stand side by side.

    Raises:
        ValueError: there are no examples.
    """
    _write_png(path, _contact_sheet(rows, vmin, vmax, columns)[1], SHEET_DPI, compress_level=6)


def _contact_sheet(rows: Sequence[Example], vmin: float, vmax: float, columns: int) -> tuple[Figure, np.ndarray]:
    if not rows:
        raise ValueError("a contact sheet needs at least one example")
    columns = min(columns, len(rows))
    gap, wide_gap, margin, title_height, head_height = 0.04, 0.16, 0.05, 0.2, 0.2
    sheet_width = COLUMN_WIDTH * columns
    width = (sheet_width - 2 * margin - (columns - 1) * wide_gap - 2 * columns * gap) / (3 * columns)
    ratios = [len(row.image) / np.shape(row.image)[1] for row in rows]
    height = width * float(np.clip(np.median(ratios), 0.4, 1.6))
    lines = -(-len(rows) // columns)
    total = round((head_height + lines * (title_height + height) + margin) * SHEET_DPI) / SHEET_DPI
    panel = round(height * SHEET_DPI), round(width * SHEET_DPI)

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(sheet_width, total), dpi=SHEET_DPI)
        canvas = FigureCanvasAgg(figure)
        corners = []  # of each example: left and top in inches
        for index, row in enumerate(rows):
            line, column = divmod(index, columns)
            left = margin + column * (3 * width + 2 * gap + wide_gap)
            top = head_height + line * (title_height + height) + title_height
            corners.append((left, top))
            baseline = 1 - (top - 0.05) / total
            right = (left + 3 * width + 2 * gap) / sheet_width
            score = figure.text(right, baseline, f"score {row.score:.3g}", ha="right", parse_math=False)
            title = figure.text(left / sheet_width, baseline, "", weight="bold", parse_math=False)
            _shorten(title, row.title, (3 * width - 0.1) * SHEET_DPI - score.get_window_extent().width)
            if line == 0:
                for position, name in enumerate(("image", "ground truth", "anomaly map")):
                    x = left + position * (width + gap) + width / 2
                    figure.text(x / sheet_width, 1 - 0.14 / total, name, ha="center", color=GREY)
        canvas.draw()
    picture = np.array(canvas.buffer_rgba())[..., :3]
    for row, (left, top) in zip(rows, corners, strict=True):
        shape = _fit(np.shape(row.image)[:2], panel)
        shown = _resize(_rgb(row.image), shape)
        truth = (
            np.full((*shape, 3), 235, np.uint8)
            if row.mask is None
            else outline(shown, _resize_mask(row.mask, shape), 2)
        )
        scores = _resize(np.asarray(row.anomaly_map, dtype=np.float32), shape)
        for position, content in enumerate((shown, truth, overlay(shown, scores, vmin, vmax))):
            x = round((left + position * (width + gap)) * SHEET_DPI)
            _paste(picture, content, round(top * SHEET_DPI), x, shape[0], panel[1])
    return figure, picture


def _curves_figure(
    measures: Mapping,
    scores: np.ndarray,
    labels: np.ndarray,
    kinds: Sequence[str],
    image_roc: tuple[np.ndarray, np.ndarray] | None,
    pixel_roc: tuple[np.ndarray, np.ndarray] | None,
    pro: tuple[np.ndarray, np.ndarray] | None,
) -> Figure:
    anomalous = np.asarray(labels) != 0
    groups = {"good": np.asarray(scores)[~anomalous]}
    for kind in sorted({str(kind) for kind, bad in zip(kinds, anomalous, strict=True) if bad}):
        groups[kind] = np.asarray(scores)[anomalous & (np.asarray(kinds) == kind)]
    strip_height = 0.2 * len(groups) + 0.6
    figure = Figure(figsize=(COLUMN_WIDTH, 1.9 + strip_height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, height_ratios=(1.9, strip_height))

    axes = figure.add_subplot(grid[0, 0])
    for curve, name, colour in ((image_roc, "image", BLUE), (pixel_roc, "pixel", VERMILLION)):
        if curve is not None:
            value = measures[f"{name}_au_roc"]
            axes.plot(*thin(*curve), color=colour, label=f"{name} {value:.3f}", clip_on=False, zorder=6)
    axes.set(xlabel="false positive rate", ylabel="true positive rate", xlim=(0, 1), ylim=(0, 1), title="ROC")
    if image_roc is None and pixel_roc is None:
        _say(axes, measures.get("missing", {}).get("image_au_roc", "no curve"))
    else:
        axes.plot((0, 1), (0, 1), color=GREY, linewidth=0.6, linestyle=(0, (4, 3)))
        # On white, for the diagonal runs behind it; the curves run before it.
        legend = {"frameon": True, "framealpha": 1, "edgecolor": "none", "borderaxespad": 0.3}
        axes.legend(loc="lower right", title="AU-ROC", title_fontsize=TYPE_SIZE - 0.5, **legend)

    axes = figure.add_subplot(grid[0, 1])
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

    axes = figure.add_subplot(grid[1, :])
    for row, (kind, values) in enumerate(groups.items()):
        # Spread by a sequence that fills the row evenly, not at random: the same picture each time.
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
    return figure


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
    # Any pixel that a defect touches, or else one of a few pixels would be lost on the way down.
    inside = Image.fromarray((np.asarray(mask) != 0).astype(np.float32))
    return np.asarray(inside.resize(shape[::-1], Image.Resampling.BOX)) > 0


def _fit(shape: tuple[int, int], room: tuple[int, int]) -> tuple[int, int]:
    scale = min(room[0] / shape[0], room[1] / shape[1])
    return max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))


def _paste(picture: np.ndarray, content: np.ndarray, top: int, left: int, height: int, width: int) -> None:
    top += (height - content.shape[0]) // 2
    left += (width - content.shape[1]) // 2
    picture[top : top + content.shape[0], left : left + content.shape[1]] = content


def _shorten(text: Text, words: str, room: float) -> None:
    """Set the text, with its middle left out as far as needed to fit into `room` pixels."""
    text.set_text(words)
    keep = len(words)
    while text.get_window_extent().width > room and keep > 2:
        keep = min(keep - 1, int(keep * room / text.get_window_extent().width) + 1)
        text.set_text(f"{words[: keep // 2]}…{words[len(words) - (keep - keep // 2) :]}")


def _cut(name: str, length: int = 18) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"


def _tick_texts(vmin: float, vmax: float) -> list[str]:
    values = vmin, (vmin + vmax) / 2, vmax
    return [f"{value:.2g}" for value in values]


def thin(x: np.ndarray, y: np.ndarray, span: float = 1.0, points: int = 500) -> tuple[np.ndarray, np.ndarray]:
    """Leave out corners of a rising curve (N,), (N,) that lie closer together than a line is wide.

    x runs over `span`, y from 0 to 1; about `points` corners stay.
    """
    way = np.cumsum(np.abs(np.diff(x, prepend=x[0])) / span + np.abs(np.diff(y, prepend=y[0])))
    kept = np.unique(np.append(np.searchsorted(way, np.linspace(0, way[-1], points)), len(x) - 1).clip(0, len(x) - 1))
    return x[kept], y[kept]


def _running_mean(x: np.ndarray, y: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    kernel = np.ones(width) / width
    return np.convolve(x, kernel, mode="valid"), np.convolve(y, kernel, mode="valid")


def _say(axes: Axes, words: str) -> None:
    axes.text(0.5, 0.5, textwrap.fill(words, 17), transform=axes.transAxes, ha="center", va="center", color=GREY)


def _write_png(path: Path, picture: np.ndarray, dpi: int, compress_level: int) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path, format="PNG", compress_level=compress_level, dpi=(dpi, dpi))


def _save_both(figure: Figure, path: Path) -> None:
    path = Path(path)
    if path.suffix.lower() in {".png", ".svg"}:
        path = path.with_suffix("")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path.with_name(f"{path.name}.png"), metadata={"Software": None})
    figure.savefig(path.with_name(f"{path.name}.svg"), metadata={"Date": None, "Creator": None})
