"""The pictures open, keep their sizes and colours, and clip no text."""

import warnings

import matplotlib
import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from PIL import Image, ImageDraw

from student_teacher.evaluation.Evaluation import Evaluation
from student_teacher.reports import figures, fonts


def make_example(shape=(60, 80), seed=0, score=3.0, title="crack/000"):
    rng = np.random.default_rng(seed)
    mask = np.zeros(shape, np.uint8)
    mask[10:20, 30:50] = 255
    image = rng.integers(60, 200, (*shape, 3)).astype(np.uint8)
    return figures.Example(image, mask, (rng.random(shape) + 3 * (mask > 0)).astype(np.float32), score, title)


def assert_no_text_is_clipped(figure):
    """Every text, and the box round all that an axis draws (its labels beyond the view are not drawn)."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    width, height = figure.canvas.get_width_height()
    boxes = {text.get_text(): text.get_window_extent(renderer) for text in figure.texts if text.get_text()}
    for axes in figure.axes:
        boxes[axes.get_title() or "axes"] = axes.get_tightbbox(renderer)
        boxes.update({text.get_text(): text.get_window_extent(renderer) for text in axes.texts})
    for legend in figure.legends:
        boxes["legend"] = legend.get_window_extent(renderer)
    assert boxes
    for name, box in boxes.items():
        inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
        assert inside, f"{name!r} at {box.extents} leaves the figure of {width} x {height}"


@pytest.fixture
def written(monkeypatch):
    """What Pillow writes on pictures: the words and their box."""
    found, text = [], ImageDraw.ImageDraw.text

    def noted(draw, place, words, fill, font, anchor):
        found.append((words, draw.textbbox(place, words, font, anchor)))
        text(draw, place, words, fill, font, anchor)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", noted)
    return found


def assert_words_are_apart_and_within(written, size):
    assert written
    for index, (words, (left, top, right, bottom)) in enumerate(written):
        assert left >= 0 and top >= 0 and right <= size[0] and bottom <= size[1], f"{words!r} leaves the picture"
        for others, box in written[index + 1 :]:
            apart = left >= box[2] or right <= box[0] or top >= box[3] or bottom <= box[1]
            assert apart, f"{words!r} lies over {others!r}"


@pytest.fixture
def curves():
    rng = np.random.default_rng(0)
    kinds = ["good"] * 6 + ["crack"] * 5 + ["a_kind_of_defect_with_a_long_name"] * 5
    labels = np.array([kind != "good" for kind in kinds])
    masks = np.zeros((16, 24, 24), np.uint8)
    masks[6:, 4:9, 5:12] = 1
    maps = rng.standard_normal((16, 24, 24)) + 2 * masks
    evaluation = Evaluation(maps, masks, maps.max((1, 2)), labels, kinds=kinds)
    return {
        "measures": evaluation.measures(),
        "scores": {kind: maps.max((1, 2))[np.array(kinds) == kind] for kind in dict.fromkeys(kinds)},
        "curves": evaluation.curves(),
    }


def test_overlay_covers_the_image_where_the_map_is_high():
    image = np.full((40, 50, 3), 128, np.uint8)
    ramp = np.linspace(0, 1, 50, dtype=np.float32)[None].repeat(40, 0)
    result = figures.overlay(image, ramp, 0, 1)
    assert result.shape == (40, 50, 3) and result.dtype == np.uint8
    change = np.abs(result[0].astype(int) - 128).max(axis=1)
    assert change[0] < 40 and change[-1] > 100
    # Beyond the scale: the colour of its end.
    assert np.array_equal(figures.overlay(image, ramp * 9 - 4, 0, 1)[:, [0, -1]], result[:, [0, -1]])


def test_overlay_gives_one_value_one_colour_whatever_else_is_in_the_map():
    image = np.full((8, 8), 100, np.uint8)
    first, second = np.zeros((8, 8)), np.full((8, 8), 40.0)
    first[3, 3] = second[5, 5] = 1.7
    one, two = figures.overlay(image, first, 0, 5), figures.overlay(image, second, 0, 5)
    assert np.array_equal(one[3, 3], two[5, 5])


def test_overlay_takes_grey_images_and_maps_of_another_size():
    image = np.random.default_rng(0).integers(0, 255, (30, 20)).astype(np.uint8)
    scores = np.random.default_rng(1).random((15, 10))
    as_colour = figures.overlay(image[..., None].repeat(3, 2), scores, 0, 1)
    assert np.array_equal(figures.overlay(image, scores, 0, 1), as_colour)
    assert np.array_equal(figures.overlay(image[..., None], scores, 0, 1), as_colour)


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="colour scale"):
        figures.overlay(np.zeros((4, 4), np.uint8), np.zeros((4, 4)), 1, 1)
    with pytest.raises(ValueError, match="uint8"):
        figures.overlay(np.zeros((4, 4)), np.zeros((4, 4)), 0, 1)


def test_colour_scale_spans_the_maps_and_is_never_empty():
    vmin, vmax = figures.colour_scale([np.arange(25.0).reshape(5, 5) * factor for factor in (1, 1, 1, 2)])
    assert vmin == 12 and 24 < vmax <= 48
    vmin, vmax = figures.colour_scale([np.zeros((4, 4))])
    assert vmin < vmax


@pytest.mark.parametrize("size", [1, 2, 5])
def test_outline_runs_round_a_region_of_any_size_and_leaves_it_visible(size):
    image, mask = np.full((30, 30), 90, np.uint8), np.zeros((30, 30), np.uint8)
    mask[10 : 10 + size, 10 : 10 + size] = 1
    result = figures.outline(image, mask, width=2)
    drawn = (result == figures.OUTLINE).all(axis=2)
    assert drawn.sum() == (size + 4) ** 2 - size**2
    assert (result[mask != 0] == 90).all()
    assert np.array_equal(figures.outline(image, mask * 0), image[..., None].repeat(3, 2))


@pytest.mark.parametrize("shape", [(60, 80), (200, 40), (20, 300), (64, 64)])
@pytest.mark.parametrize("with_mask", [True, False])
def test_result_figure_clips_and_overlaps_no_text(tmp_path, written, shape, with_mask):
    rng = np.random.default_rng(0)
    mask = np.zeros(shape, np.uint8) if with_mask else None
    title = "a_category_of_things/a_kind_of_defect_with_a_long_name/000_a_long_name"
    image, anomaly_map = rng.integers(0, 255, (*shape, 3)).astype(np.uint8), rng.random(shape)
    example = figures.Example(image, mask, anomaly_map, -0.000123456, title)
    drawn = figures.result_figure(example, -0.00123, 123456.0)
    assert_words_are_apart_and_within(written, drawn.size)
    assert next(words for words, _ in written if "…" in words).startswith("a_category")
    figures.save_picture(drawn, tmp_path / "figures" / "result.jpg", figures.DPI)
    with Image.open(tmp_path / "figures" / "result.jpg") as picture:
        assert (picture.mode, picture.size) == ("RGB", drawn.size)
        assert picture.width == figures.COLUMN_WIDTH * figures.DPI
        assert picture.info["dpi"] == (figures.DPI, figures.DPI)


def test_a_title_of_any_characters_is_one_line(written):
    figures.result_figure(make_example(title="crack/a\nb\udcff漢"), 0, 4)
    assert "crack/a?b?漢" in [words for words, _ in written]


def test_one_value_has_one_colour_in_two_result_figures():
    image = np.full((50, 50, 3), 128, np.uint8)
    second_map = np.full((50, 50), 2.0)
    second_map[:5] = 60
    expected = figures.overlay(image[:1, :1], np.full((1, 1), 2.0), 0, 4)[0, 0]
    for anomaly_map in (np.full((50, 50), 2.0), second_map):
        drawn = np.asarray(figures.result_figure(figures.Example(image, None, anomaly_map, 2.0, "title"), 0, 4))
        assert np.array_equal(drawn[len(drawn) * 2 // 3, drawn.shape[1] * 6 // 10], expected)


@pytest.mark.parametrize("shape", [(60, 80), (200, 40), (20, 300)])
def test_result_figure_shows_image_truth_and_map_side_by_side(shape):
    image, mask = np.full((*shape, 3), 128, np.uint8), np.zeros(shape, np.uint8)
    mask[shape[0] // 4 : shape[0] // 2, shape[1] // 4 : shape[1] // 2] = 1
    drawn = figures.result_figure(figures.Example(image, mask, np.full(shape, 9.0), 1.0, ""), 0, 4)
    pixels = np.asarray(drawn).astype(int)
    hottest = figures.overlay(image[:1, :1], np.full((1, 1), 9.0), 0, 4)[0, 0]
    colours = (128, 128, 128), figures.OUTLINE, hottest
    grey, line, hot = (np.nonzero(np.abs(pixels - colour).max(2) < 3)[1] for colour in colours)
    assert len(hot) == pytest.approx((len(grey) + len(line)) / 2, rel=0.02)
    assert grey.min() < line.min() < line.max() < hot.min()
    assert 0 < len(line) < len(grey) / 10


def test_pictures_are_the_same_bytes_whatever_the_user_s_style(tmp_path):
    with matplotlib.rc_context({"font.size": 30, "font.family": "serif"}):
        figures._font.cache_clear()
        figures.save_picture(figures.result_figure(make_example(), 0, 4), tmp_path / "one.jpg", figures.DPI)
    figures.save_picture(figures.result_figure(make_example(), 0, 4), tmp_path / "two.jpg", figures.DPI)
    assert (tmp_path / "one.jpg").read_bytes() == (tmp_path / "two.jpg").read_bytes()


@pytest.mark.parametrize("name", ["curves.svg", "curves.v2"])
def test_curves_are_written_as_png_and_svg(tmp_path, curves, name):
    figures.save_curves_figure(tmp_path / name, **curves)
    stem = name.removesuffix(".png").removesuffix(".svg")
    assert {path.name for path in tmp_path.iterdir()} == {f"{stem}.png", f"{stem}.svg"}
    with Image.open(tmp_path / f"{stem}.png") as picture:
        assert picture.width == figures.COLUMN_WIDTH * figures.DPI
        assert not {"Software", "Creation Time"} & set(picture.info)
    assert "<dc:date>" not in (tmp_path / f"{stem}.svg").read_text()


def test_curves_are_the_same_bytes_twice(tmp_path, curves):
    for folder in ("one", "two"):
        figures.save_curves_figure(tmp_path / folder / "curves", **curves)
    for suffix in ("png", "svg"):
        assert (tmp_path / f"one/curves.{suffix}").read_bytes() == (tmp_path / f"two/curves.{suffix}").read_bytes()


@pytest.fixture
def font(tmp_path, monkeypatch):
    """A machine with a font that has the character 木, as a box of its own, and a to z."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0)), pen.lineTo((0, 900)), pen.lineTo((900, 900)), pen.lineTo((900, 0)), pen.closePath()
    builder = FontBuilder(1000, isTTF=True)
    names = [".notdef", "wood", *"abcdefghijklmnopqrstuvwxyz"]
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord("木"): "wood"} | {ord(name): name for name in names[2:]})
    builder.setupGlyf(dict.fromkeys(names, TTGlyphPen(None).glyph()) | {"wood": pen.glyph()})
    builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": "Noto Sans CJK JP", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "font.ttf")
    entries = list(font_manager.fontManager.ttflist)
    monkeypatch.setattr(font_manager.fontManager, "ttflist", entries)
    font_manager.fontManager.addfont(tmp_path / "font.ttf")
    fonts.families.cache_clear()
    yield tmp_path / "font.ttf"
    monkeypatch.undo()
    fonts.families.cache_clear()


def pixels_of(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("L")).astype(int)


def test_names_that_our_font_lacks_are_written_in_one_of_the_machine(tmp_path, curves, font):
    curves["scores"] = {kind.replace("crack", "木木木"): scores for kind, scores in curves["scores"].items()}
    figures.save_curves_figure(tmp_path / "with.png", **curves)
    title = figures.result_figure(make_example(title="木木木"), 0, 4)
    own = font_manager.findfont("DejaVu Sans")
    assert [str(fonts.file_for(words, own)) for words in ("木 ü", "ü", "Ж", "木")] == [own, own, own, str(font)]
    font_manager.fontManager.ttflist.pop()  # now a machine without it
    fonts.families.cache_clear()
    figures.save_curves_figure(tmp_path / "without.png", **curves)
    found, lacking = pixels_of(tmp_path / "with.png"), pixels_of(tmp_path / "without.png")
    assert (found != lacking).any()
    assert found.sum() < lacking.sum()  # filled boxes instead of empty ones
    assert np.asarray(title).sum() < np.asarray(figures.result_figure(make_example(title="木木木"), 0, 4)).sum()


def test_other_names_are_written_in_our_own_font(tmp_path, curves, font):
    figures.save_curves_figure(tmp_path / "with.png", **curves)
    title = figures.result_figure(make_example(title="crack ü …"), 0, 4)
    font_manager.fontManager.ttflist.pop()
    fonts.families.cache_clear()
    figures.save_curves_figure(tmp_path / "without.png", **curves)
    for suffix in ("png", "svg"):
        assert (tmp_path / f"with.{suffix}").read_bytes() == (tmp_path / f"without.{suffix}").read_bytes()
    assert title == figures.result_figure(make_example(title="crack ü …"), 0, 4)


@pytest.mark.parametrize("kind", ["木目", "caf\udce9", "$\\frac$", "a_$b_$"])
def test_no_name_stops_the_curves_or_fills_the_screen(tmp_path, curves, kind, monkeypatch, capfd):
    monkeypatch.setattr(fonts, "families", tuple)
    curves["scores"] = {each.replace("crack", kind): scores for each, scores in curves["scores"].items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures.save_curves_figure(tmp_path / "curves.png", **curves)
        figures.result_figure(make_example(title=f"{kind}/000"), 0, 4)
    assert capfd.readouterr().err == ""


def test_curves_figure_clips_no_text(curves):
    with matplotlib.rc_context(figures.STYLE):
        assert_no_text_is_clipped(figures._curves_figure(**curves))


def test_curves_figure_of_good_images_alone_says_why_there_are_no_curves(curves):
    maps = np.random.default_rng(0).random((6, 8, 8))
    evaluation = Evaluation(maps, None, maps.max((1, 2)), np.zeros(6), kinds=["good"] * 6)
    with matplotlib.rc_context(figures.STYLE):
        figure = figures._curves_figure(evaluation.measures(), {"good": maps.max((1, 2))}, evaluation.curves())
        assert_no_text_is_clipped(figure)
    said = [" ".join(text.get_text().split()) for axes in figure.axes for text in axes.texts]
    assert said == ["there are no anomalous test images"] * 2


def test_thinned_curves_keep_their_ends_and_shape():
    rng = np.random.default_rng(0)
    x, y = (np.concatenate(([0], np.sort(rng.random(50_000)), [1])) for _ in range(2))
    thin_x, thin_y = figures.thin(x, y)
    assert len(thin_x) <= 502
    assert (thin_x[0], thin_y[0], thin_x[-1], thin_y[-1]) == (0, 0, 1, 1)
    assert np.abs(np.interp(x, thin_x, thin_y) - y).max() < 0.01


@pytest.mark.parametrize("count", [1, 2, 5])
def test_contact_sheet_clips_no_text_and_fits_its_rows(written, count):
    shapes = [(60, 80), (120, 60), (30, 90), (60, 60), (60, 80)]
    rows = [make_example(shapes[index], index, title=f"a_long_kind_of_defect/{index:03}") for index in range(count)]
    rows[0] = rows[0]._replace(mask=None)
    sheet = figures.contact_sheet(rows, 0, 4)
    assert_words_are_apart_and_within(written, sheet.size)
    assert len(written) == 2 * count + 3 * min(count, 2)
    assert sheet.width == figures.COLUMN_WIDTH * figures.SHEET_DPI * min(count, 2)


def test_contact_sheet_needs_an_example():
    with pytest.raises(ValueError, match="at least one"):
        figures.contact_sheet([], 0, 1)


@pytest.mark.parametrize("count", [1, 3, 3000])
def test_training_curve(tmp_path, count):
    steps = np.arange(1, count + 1)
    losses = {"distillation": 3 / steps, "metric learning": 1 / steps, "compactness": np.full(count, np.nan)}
    figures.save_training_curve(tmp_path / "training.png", steps, losses)
    with Image.open(tmp_path / "training.png") as picture:
        assert picture.width == figures.COLUMN_WIDTH * figures.DPI
    assert (tmp_path / "training.svg").stat().st_size < 300_000
    with matplotlib.rc_context(figures.STYLE):
        figure = figures._training_figure(steps, losses)
        assert_no_text_is_clipped(figure)
    assert figure.axes[0].get_yscale() == ("log" if count > 10 else "linear")


def test_training_curve_of_losses_that_reach_zero_is_linear():
    figure = figures._training_figure([1, 2, 3], {"loss": [1.0, 0.1, 0.0]})
    assert figure.axes[0].get_yscale() == "linear"
