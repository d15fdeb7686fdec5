import json
import re
import shutil
import time
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from student_teacher.evaluation.Evaluation import Evaluation
from student_teacher.reports import figures
from student_teacher.reports.published import BESIDE
from student_teacher.reports.result_page import (
    MAP_SIDE,
    ResultPage,
    curve_path,
    outline_path,
    page_files,
    write_summary_page,
)

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
OUTCOMES = ("hit", "miss", "alarm", "pass")
AWKWARD = [
    "with space.png",
    "a\"quote' .png",
    "</script><b>&amp;.png",
    "größe 漢字.png",
    "50%23 #1?.png",
    "$data ${title} {{data}} <!--.png",
    "broken\udcff.png",
]


def make_page(folder, labels, scores, kinds, names=None, side=24, masked=True):
    """A page of small images, with a square in the middle of the defective ones."""
    labels, scores = list(labels), np.asarray(scores, dtype=float)
    rng = np.random.default_rng(0)
    mask = np.zeros((side, side), dtype=bool)
    mask[side // 3 : side // 2, side // 3 : side // 2] = True
    maps = [rng.random((side, side)).astype(np.float32) + bool(label) * mask for label in labels]
    masks = [mask if label else None for label in labels] if masked else None
    page = ResultPage(folder, folder.name)
    names = names or [f"{index:03d}.png" for index in range(len(labels))]
    for index, label in enumerate(labels):
        image = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
        page.save_image(index, Image.fromarray(image))
        page.save_map(index, maps[index], 0.5, 2)
        mask = masks[index] if masks else None
        page.add(index, names[index], kinds[index], label=label, score=scores[index], mask=mask)
    known = np.array([bool(label) for label in labels])
    evaluation = Evaluation(maps, masks, scores, known, kinds=kinds)
    each = zip(kinds, names, evaluation.aupimo_of_images(), strict=True)
    of_images = {f"test/{kind}/{name}": value for kind, name, value in each if value is not None}
    measures = evaluation.measures() | {"aupimo_of_images": of_images}
    return page.finish(measures, evaluation.curves()), measures


def save_pictures(page, number, size, anomaly_map=None):
    """Of a black image of a size (width, height), and of a map."""
    page.save_image(number, Image.new("RGB", size))
    page.save_map(number, np.zeros(size[::-1]) if anomaly_map is None else anomaly_map, 0, 1)


def data_of(page: Path) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.S)[1])


def many(count=300):
    """Labels, scores with ties, and kinds."""
    rng = np.random.default_rng(1)
    labels = rng.random(count) < 0.6
    scores = np.round(rng.normal(3, 1, count) + 1.5 * labels, 2)
    kinds = np.where(labels, rng.choice(["crack", "hole"], count), "good").tolist()
    return labels.astype(int), scores, kinds


def expected_counts(labels, scores, threshold):
    labels, flagged = np.asarray(labels) != 0, np.asarray(scores) >= threshold
    return {
        "hit": int((labels & flagged).sum()),
        "miss": int((labels & ~flagged).sum()),
        "alarm": int((~labels & flagged).sum()),
        "pass": int((~labels & ~flagged).sum()),
    }


# ---- Without a browser


def test_page_and_pictures_are_written(tmp_path):
    page, measures = make_page(tmp_path / "tile", [1, 0, 1], [3, 1, 2], ["crack", "good", "crack"])
    data = data_of(page)
    assert [image["score"] for image in data["images"]] == [3, 2, 1]
    assert data["measures"] == measures
    for image in data["images"]:
        for end in (".jpg", "_small.jpg", "_map.png"):
            with Image.open(page.parent / "page" / f"{image['file']}{end}") as picture:
                assert picture.size == (24, 24)
    assert (page.parent / "page" / "cover.jpg").exists()
    assert "outline" in data["images"][0]
    assert "outline" not in data["images"][2]


def test_pages_name_nothing_outside_their_folder(tmp_path):
    page, _ = make_page(tmp_path / "tile", [1, 0], [3, 1], ["crack", "good"])
    summary = write_summary_page(tmp_path / "summary.html", [{"category": "tile", "status": "done"}])
    for path in (page, summary):
        addresses = set(re.findall(r"(?:https?:)?//[a-z][\w.-]*\.\w+", path.read_text()))
        assert addresses <= {"http://www.w3.org"}  # the name of SVG, never fetched
        assert not re.search(r"\b(fetch|XMLHttpRequest|import)\b\s*\(|@import|url\(", path.read_text())
        assert not re.search(r'(src|href)="(/|file:)', path.read_text())


def test_a_page_s_files_are_known_and_those_of_others_stay(tmp_path):
    page, _ = make_page(tmp_path / "tile", [1, 0, 0], [3, 1, 2], ["crack", "good", "good"])
    assert sorted(page_files(page.parent, range(3))) == sorted(path for path in page.parent.rglob("*.*"))
    own = page.parent / "page" / "0004.jpg"
    own.write_text("mine")
    started = ResultPage(page.parent, "tile")
    assert not page.exists()
    save_pictures(started, 5, (4, 4))
    started.add(5, "a.png", "good", label=0, score=1.0)
    started.finish({})
    assert own.read_text() == "mine"


def test_large_images_are_made_smaller_and_maps_stretch(tmp_path):
    page = ResultPage(tmp_path, "large")
    mask = np.zeros((1500, 3000), dtype=bool)
    mask[700, 2000] = True  # one pixel must not be lost
    save_pictures(page, 0, (3000, 1500), np.ones((750, 1500), np.float32))
    page.add(0, "a.png", "dot", label=1, score=1.0, mask=mask)
    sizes = {path.name: Image.open(path).size for path in (tmp_path / "page").iterdir()}
    assert sizes["0000.jpg"] == (1024, 512)
    assert sizes["0000_small.jpg"] == (320, 160)
    assert sizes["0000_map.png"] == (512, 256)
    image = data_of(page.finish({}))["images"][0]
    assert image["outline_box"] == f"0 0 {2 * MAP_SIDE} {MAP_SIDE}"
    assert image["outline"].count("M") == 1


def test_the_map_is_transparent_where_it_is_low(tmp_path):
    ResultPage(tmp_path, "map").save_map(0, np.array([[-1, 0], [1, 9]], np.float32), 0, 1)
    red, _, _, opacity = Image.open(tmp_path / "page" / "0000_map.png").convert("RGBA").split()
    red, opacity = np.asarray(red, dtype=int), np.asarray(opacity)
    assert (opacity[0] < 60).all()
    assert (opacity[1] > 230).all()
    assert (red[1] > red[0] + 200).all()


def inside_path(path, shape):
    """Fill a path by the even-odd rule at the middles of pixels."""
    filled = np.zeros(shape, dtype=bool)
    rows, columns = 2 * np.arange(shape[0])[:, None] + 1 + 1e-3, 2 * np.arange(shape[1]) + 1 + 2e-3
    for start, way in re.findall(r"M(\S+ \S+)l([^z]*)z", path):
        steps = np.array([start, *re.findall(r"\S+ \S+", way)])
        points = np.cumsum([list(map(int, step.split())) for step in steps], axis=0)
        for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0), strict=True):
            if y0 != y1:
                crosses = (y0 > rows) != (y1 > rows)
                filled ^= crosses & (columns < x0 + (rows - y0) * (x1 - x0) / (y1 - y0))
    return filled


@pytest.mark.parametrize("seed", range(4))
def test_the_outline_encloses_the_mask(seed):
    mask = np.random.default_rng(seed).random((9, 13)) < 0.4
    assert (inside_path(outline_path(mask), mask.shape) == mask).all()
    assert outline_path(np.zeros((3, 3))) == ""


def test_the_outline_of_a_rectangle_is_short():
    mask = np.zeros((50, 60))
    mask[10:30, 5:50] = 255
    assert outline_path(mask).count(" ") == 14  # eight points: corners are cut


def test_the_curve_ends_at_its_limit():
    path = curve_path((np.array([0, 0, 0.5, 1]), np.array([0, 0.4, 0.8, 1])), limit=0.25)
    corners = [list(map(int, corner.split())) for corner in path[1:].split("L")]
    assert corners[0] == [0, 1000]
    assert [0, 600] in corners
    assert corners[-1] == [1000, 400]
    assert curve_path(None) is None


def test_wrong_values_are_named(tmp_path):
    with pytest.raises(ValueError, match="colour scale"):
        ResultPage(tmp_path, "tile").save_map(0, np.zeros((4, 4)), 1, 1)
    with pytest.raises(ValueError, match="score of a"):
        ResultPage(tmp_path, "tile").add(0, "a.png", "good", label=0, score=float("nan"))


def test_the_cover_is_the_defect_of_the_highest_score_beside_its_map(tmp_path):
    page = ResultPage(tmp_path, "tile")
    for number, (label, score, grey) in enumerate(((0, 9, 10), (1, 2, 60), (1, 3, 160), (1, 1, 220))):
        page.save_image(number, Image.new("RGB", (30, 20), (grey,) * 3))
        page.save_map(number, np.full((5, 5), 7.0), 0, 4)
        page.add(number, f"{number}.png", "kind", label=label, score=score)
    page.finish({})
    cover = np.asarray(Image.open(tmp_path / "page" / "cover.jpg"), dtype=int)
    assert cover.shape == (20, 60, 3)
    assert abs(cover[:, :28] - 160).max() < 6
    expected = figures.overlay(np.full((1, 1), 160, np.uint8), np.full((1, 1), 7.0), 0, 4)[0, 0].astype(int)
    assert abs(cover[:, 34:] - expected).max() < 12


def test_a_category_named_mean_is_no_mean(tmp_path):
    rows = [{"category": "mean", "status": "done", "au_pro": 0.5}, {"category": "mean", "au_pro": 0.5}]
    text = write_summary_page(tmp_path / "summary.html", rows).read_text()
    assert text.count("<tr ") == 3
    assert "1 category" in text


# ---- In a browser


@pytest.fixture(scope="module")
def browser():
    if not (CHROMIUM and DRIVER):
        pytest.skip("chromium and chromedriver are not installed")
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    flags = ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "window-size=1280,900")
    offline = ("disable-background-networking", "disable-component-update", "disable-sync", "no-first-run")
    for flag in (*flags, *offline):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    complaints = complaints_of(driver)
    driver.quit()
    assert complaints == []


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    labels, scores, kinds = many()
    page, measures = make_page(tmp_path_factory.mktemp("results") / "tiles", labels, scores, kinds, side=64)
    return page, measures, labels, scores, kinds


def complaints_of(browser):
    return [entry for entry in browser.get_log("browser") if entry["level"] in {"SEVERE", "WARNING"}]


def visit(browser, page, width=1280, height=900):
    assert complaints_of(browser) == []  # of what was done on the page before
    screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    browser.get(page.as_uri())
    assert complaints_of(browser) == []


def press(browser, *keys):
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(browser).send_keys(*keys).perform()


def number(browser, script, *arguments):
    return browser.execute_script(f"return {script}", *arguments)


def shown_counts(browser):
    return {name: int(number(browser, f"document.getElementById('count-{name}').textContent")) for name in OUTCOMES}


def shown_cards(browser):
    """Score, kind and outcome of each card that is not filtered out, as the data and the card have them."""
    return browser.execute_script(
        "return cards.flatMap(({item}, i) => item.checkVisibility() ? "
        "[[images[i].score, images[i].kind, item.dataset.outcome, item.querySelector('.score').textContent]] : [])"
    )


def choose(browser, outcome):
    browser.execute_script("document.querySelector(`#outcomes [value=${arguments[0]}]`).click()", outcome)


def slide(browser, place):
    browser.execute_script(
        "const slider = document.getElementById('threshold'); slider.value = arguments[0];"
        "slider.dispatchEvent(new Event('input', {bubbles: true}))",
        place,
    )


def test_starts_at_the_best_f1(browser, tiles):
    page, measures, labels, scores, _ = tiles
    visit(browser, page)
    counts = shown_counts(browser)
    assert counts == expected_counts(labels, scores, measures["image_best_f1_threshold"])
    f1 = 2 * counts["hit"] / (2 * counts["hit"] + counts["miss"] + counts["alarm"])
    assert f1 == pytest.approx(measures["image_best_f1"])
    text = browser.find_element("id", "measures").text
    for name in ("image_au_roc", "au_pro", "aupimo", "pixel_au_roc", "image_average_precision", "image_best_f1"):
        assert f"{measures[name]:.3f}" in text
    assert text.count("good images set no threshold") == 2  # of F1 for images and for pixels
    assert "AU-sPRO" not in text
    assert len(browser.find_elements("css selector", ".curve")) == 3


def test_shows_the_aupimo_of_an_image_with_a_defect_alone(browser, tiles):
    page, measures, labels, _, kinds = tiles
    visit(browser, page)
    for label in (0, 1):
        index = int(np.flatnonzero(np.asarray(labels) == label)[0])
        of_image = measures["aupimo_of_images"].get(f"test/{kinds[index]}/{index:03d}.png")
        browser.execute_script("view(images.findIndex(({name}) => name === arguments[0]))", f"{index:03d}.png")
        facts = browser.find_element("id", "viewer-facts").text
        assert (f"AUPIMO {of_image:.3f}" in facts) if label else ("AUPIMO" not in facts)
        press(browser, "\ue00c")  # Escape


def test_slider_recounts(browser, tiles):
    page, _, labels, scores, _ = tiles
    visit(browser, page)
    seen = set()
    for place in (0, 0.2, 0.41, 0.5, 0.66, 0.9, 1):
        slide(browser, place)
        threshold = number(browser, "threshold")
        counts = shown_counts(browser)
        assert counts == expected_counts(labels, scores, threshold)
        seen.add(tuple(counts.values()))
        outcomes = [outcome for _, _, outcome, _ in shown_cards(browser)]
        assert {name: outcomes.count(name) for name in OUTCOMES} == counts
        line = number(browser, "document.querySelector('.line').getBoundingClientRect().x + 1")
        box = number(browser, "document.querySelector('#threshold').getBoundingClientRect().toJSON()")
        assert line == pytest.approx(box["x"] + 11 + place * (box["width"] - 22), abs=1)  # over the knob
    assert len(seen) == 7
    assert expected_counts(labels, scores, number(browser, "scoreAt(1)"))["hit"] == 0
    browser.find_element("id", "best").click()
    assert number(browser, "threshold") == tiles[1]["image_best_f1_threshold"]


def test_keys_move_the_threshold_from_score_to_score(browser, tiles):
    from selenium.webdriver.common.keys import Keys

    page, measures, labels, scores, _ = tiles
    visit(browser, page)
    browser.find_element("id", "threshold").send_keys(Keys.ARROW_RIGHT)
    above = min(score for score in scores if score > measures["image_best_f1_threshold"])
    assert number(browser, "threshold") == above
    assert shown_counts(browser) == expected_counts(labels, scores, above)  # ties at the threshold are flagged
    browser.find_element("id", "threshold").send_keys(Keys.END)
    assert shown_counts(browser) == expected_counts(labels, scores, np.inf)
    time.sleep(0.6)
    assert "0 hits" in browser.find_element("id", "live").get_attribute("textContent")


def test_filters_and_order(browser, tiles):
    page, _, labels, scores, kinds = tiles
    visit(browser, page)
    wanted = {
        "all": set(OUTCOMES),
        "right": {"hit", "pass"},
        "wrong": {"miss", "alarm"},
        "alarm": {"alarm"},
        "miss": {"miss"},
    }
    for threshold_place in (None, 0.45):
        if threshold_place:
            slide(browser, threshold_place)  # with a filter on, cards come and go as the slider moves
        threshold = number(browser, "threshold")
        for name, outcomes in wanted.items():
            choose(browser, name)
            cards = shown_cards(browser)
            counts = expected_counts(labels, scores, threshold)
            assert len(cards) == sum(counts[outcome] for outcome in outcomes)
            assert {outcome for _, _, outcome, _ in cards} <= outcomes
            assert [card[0] for card in cards] == sorted((card[0] for card in cards), reverse=True)
            assert all(float(text) == pytest.approx(score, rel=0.01) for score, _, _, text in cards)
            shown = number(browser, "document.querySelector('#outcomes :checked + .count').textContent")
            assert int(shown) == len(cards)
    slide(browser, 0.6)
    threshold = number(browser, "threshold")
    assert len(shown_cards(browser)) == expected_counts(labels, scores, threshold)["miss"]
    browser.execute_script(
        "const kind = document.getElementById('kind');"
        "kind.value = [...kind.options].find(option => option.text === 'crack').value;"
        "kind.dispatchEvent(new Event('change'))"
    )
    cracks = [score for score, kind in zip(scores, kinds, strict=True) if kind == "crack" and score < threshold]
    assert sorted(card[0] for card in shown_cards(browser)) == sorted(cracks)
    choose(browser, "alarm")
    assert shown_cards(browser) == []
    assert browser.find_element("id", "empty").is_displayed()


def test_images_load_lazily_and_the_slider_is_quick(browser, tiles):
    visit(browser, tiles[0])
    time.sleep(0.5)
    loaded = number(browser, "[...document.querySelectorAll('#gallery .image')].filter(i => i.naturalWidth).length")
    assert 0 < loaded < 150
    took = browser.execute_script(
        "const slider = document.getElementById('threshold'), start = performance.now();"
        "for (let i = 0; i < 50; i++) { slider.value = (i * 0.37) % 1; slider.dispatchEvent(new Event('input'));"
        "document.body.offsetHeight; } return (performance.now() - start) / 50"
    )
    assert took < 100  # milliseconds for a jump over a third of the cards, with layout, on a slow machine


def test_dialog(browser, tiles):
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    def name():
        return browser.find_element("id", "viewer-name").text

    def is_open():
        return number(browser, "document.getElementById('viewer').open")

    visit(browser, tiles[0])
    choose(browser, "wrong")
    titles = number(browser, "cards.flatMap((c, i) => c.item.hidden ? [] : [`${images[i].kind} / ${images[i].name}`])")
    browser.find_elements("css selector", "#gallery li:not([hidden]) .card")[0].click()
    assert is_open()
    assert name() == titles[0]
    press(browser, Keys.ARROW_LEFT)
    assert name() == titles[0]
    press(browser, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert name() == titles[2]
    browser.find_element("id", "previous").click()
    assert name() == titles[1]
    assert number(browser, "document.querySelector('.stage .image').decode().then(() => true)")
    opacity = "Number(getComputedStyle(document.querySelector('.stage .map')).opacity)"
    before = number(browser, opacity)
    browser.find_element("id", "fader").send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert number(browser, opacity) == pytest.approx(before + 0.02)
    assert name() == titles[1]  # there the arrows are the fader's
    browser.find_element("id", "mask").click()
    assert not number(browser, "document.querySelector('.stage .outline')?.checkVisibility() ?? false")
    press(browser, Keys.ESCAPE)
    assert not is_open()
    # The focus goes to the card that was viewed last, once the browser has reported the closing; from there it goes
    # on by keys.
    focused = "cards.findIndex(c => c.item.contains(document.activeElement)) === shownIndices()[1]"
    WebDriverWait(browser, 10).until(lambda _: number(browser, focused))
    press(browser, Keys.ARROW_RIGHT, Keys.ENTER)
    assert is_open()
    assert name() == titles[2]
    browser.find_element("id", "close").click()
    assert not is_open()


def test_every_control_is_reached_by_tab(browser, tiles):
    from selenium.webdriver.common.keys import Keys

    visit(browser, tiles[0])
    reached = []
    for _ in range(12):
        press(browser, Keys.TAB)
        reached.append(number(browser, "document.activeElement.id || document.activeElement.className"))
        ring = "getComputedStyle(document.activeElement.closest('#outcomes label') ?? document.activeElement)"
        assert number(browser, f"{ring}.outlineStyle") == "solid"
    assert "skip" in reached
    assert {"threshold", "kind", "maps", "outlines", "card"} <= set(reached)
    names = "[...document.querySelectorAll('button, input, select')].filter(e => !(e.textContent.trim() || e.ariaLabel "
    assert number(browser, names + "|| e.labels?.length)).length") == 0


@pytest.mark.parametrize("width", [360, 700, 1000, 1280])
def test_nothing_scrolls_sideways(browser, tiles, tmp_path, width):
    published = dict.fromkeys(BESIDE, 0.9)
    rows = [summary_row("tiles"), summary_row("metal_nut", **published), summary_row("x" * 60, au_pro=0.1)]
    summary = write_summary_page(tmp_path / "summary.html", [*rows, summary_row("mean", **published)])
    for page in (tiles[0], summary):
        visit(browser, page, width, 740)
        assert number(browser, "document.documentElement.scrollWidth") <= width
    visit(browser, tiles[0], width, 740)
    browser.find_elements("css selector", ".card")[0].click()
    for control in ("close", "previous", "next", "fader", "mask"):
        box = browser.find_element("id", control).rect
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
        assert 0 <= number(browser, f"document.getElementById('{control}').getBoundingClientRect().bottom") <= 740


def test_awkward_names(browser, tmp_path):
    folder = tmp_path / "50% <b>&#1 größe's"
    labels = [1, 0] * 3 + [1]
    kinds = ["good" if label == 0 else AWKWARD[2][:-4].replace("/", "") for label in labels]
    page, _ = make_page(folder, labels, range(7, 0, -1), kinds, AWKWARD)
    visit(browser, page)
    names = [element.get_attribute("textContent") for element in browser.find_elements("css selector", "li .name")]
    assert names[:-1] == AWKWARD[:-1]
    assert names[-1].startswith("broken")
    assert browser.find_element("tag name", "h1").text == folder.name
    assert browser.find_elements("tag name", "b") == []
    time.sleep(0.3)
    broken = "[...document.querySelectorAll('#gallery img')].filter(i => !i.naturalWidth).length"
    assert number(browser, broken) == 0
    browser.find_elements("css selector", ".card")[2].click()
    assert AWKWARD[2] in browser.find_element("id", "viewer-name").text


def test_without_defects(browser, tmp_path):
    page, _ = make_page(tmp_path / "good only", [0, 0, 0], [3, 1, 2], ["good"] * 3, masked=False)
    visit(browser, page)
    assert browser.find_element("id", "measures").text.count("no anomalous test images") == 8
    assert "no anomalous" in browser.find_element("id", "no-best").text
    assert browser.find_elements("css selector", ".curve") == []
    assert number(browser, "document.getElementById('count-pass').textContent") == "3"
    assert browser.find_elements("id", "count-hit") == []
    slide(browser, 0)
    assert number(browser, "document.getElementById('count-alarm').textContent") == "3"


def test_without_labels_and_with_one_image(browser, tmp_path):
    page = ResultPage(tmp_path, "new")
    save_pictures(page, 0, (8, 8))
    page.add(0, "a.png", "new", label=None, score=2.0)
    visit(browser, page.finish({}))
    assert browser.find_element("id", "counts").text.split("\n") == ["flagged", "0", "not flagged", "1"]
    slide(browser, 0.4)
    choose(browser, "flagged")
    assert len(shown_cards(browser)) == 1
    assert [label.get_attribute("value") for label in browser.find_elements("name", "outcome")] == [
        "all",
        "flagged",
        "unflagged",
    ]


def summary_row(category, **values):
    row = {"category": category, "status": "done", "error": "", "image_au_roc": 0.9, "pixel_au_roc": 0.95}
    return row | {"au_pro": 0.8, "paper_p65": None, "paper_multiscale": None, "seconds": 3700, "more": "x"} | values


def test_summary(browser, tmp_path):
    awkward = "b #1 100%<&\"'ü"
    for category in ("Zipper", awkward):
        make_page(tmp_path / category, [1, 0], [3, 1], ["crack", "good"])
    rows = [
        summary_row("Zipper", au_pro=0.7, paper_p65=0.8, paper_multiscale=0.6),
        summary_row("failed", status="failed", error="the <disk> is full", au_pro=None),
        summary_row(awkward, au_pro=0.9),
        summary_row("capsule", au_pro=None, seconds=65),
        summary_row("mean", au_pro=0.8, paper_p65=0.857, paper_multiscale=0.914),
    ]
    visit(browser, write_summary_page(tmp_path / "summary.html", rows))

    def order():
        return [element.text for element in browser.find_elements("css selector", "tbody th")]

    def sort(key):
        browser.find_element("css selector", f"[data-key={key}] button").click()
        return browser.find_element("css selector", f"[data-key={key}]").get_attribute("aria-sort")

    assert order() == ["Zipper", "failed", awkward, "capsule"]
    assert sort("au_pro") == "descending"
    assert order() == [awkward, "Zipper", "failed", "capsule"]
    assert sort("au_pro") == "ascending"
    assert order() == ["Zipper", awkward, "failed", "capsule"]
    assert sort("category") == "ascending"
    assert order() == [awkward, "capsule", "failed", "Zipper"]
    text = browser.find_element("id", "summary").text
    assert "failed: the <disk> is full" in text
    shown = browser.find_element("css selector", "tbody tr:last-child").text  # Zipper's
    assert "0.800\n−0.100" in shown
    assert "0.600\n+0.100" in shown
    assert "0.857\n−0.100" in browser.find_element("css selector", "tfoot").text  # not 0.800 - 0.857
    assert "1 h 01 min" in text
    assert "1 min 05 s" in text
    assert browser.find_element("css selector", "tfoot th").text == "mean"
    assert len(browser.find_elements("css selector", "tbody a")) == 2
    assert number(browser, "[...document.images].every(i => i.naturalWidth)")
    browser.find_element("partial link text", "b #1").click()
    assert browser.find_element("tag name", "h1").text == awkward
    assert unquote(browser.current_url).endswith(f"/{awkward}/index.html")
