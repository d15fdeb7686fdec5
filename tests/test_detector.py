import csv
import json
import re
import shutil
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import anomaly_detection
from AnomalyNet import AnomalyNet
from student_teacher.detection import regions, scoring
from student_teacher.detection.AnomalyDetector import AnomalyDetector, Maps, Scale, scale_to_checkpoint
from student_teacher.detection.Detector import VERSION, Calibration, Detector, at_own_size, load_detector
from student_teacher.detection.regions import AnomalousRegion, regions_above
from student_teacher.reports import inspection
from student_teacher.reports.inspection import files_in
from student_teacher.runtime import checkpoints
from student_teacher.runtime.errors import UserError
from student_teacher.runtime.paths import ROOT

CATEGORY = "knit"
SIZE = (24, 20)


def good_maps(number, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(number, *SIZE, generator=random) + torch.randn(number, 1, 1, generator=random)


def calibration_of(maps, scored=None):
    """A Calibration on maps (N,H,W), one image after another."""
    return Calibration(
        [Maps(*pair) for pair in zip(maps.split(1), (maps if scored is None else scored).split(1), strict=True)]
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """model/CATEGORY/detector.pt, of random weights, calibrated on 19 random images."""
    torch.manual_seed(0)
    nets = [AnomalyNet(17) for _ in range(3)]
    scale = Scale(nets[0], nets[1:], torch.zeros(512), torch.ones(512))
    networks = AnomalyDetector([scale], 4)
    random = np.random.default_rng(0)
    images = torch.from_numpy(random.integers(0, 256, (19, 3, *SIZE), dtype=np.uint8))
    content = {
        "detector_version": VERSION,
        "image_size": list(SIZE),
        "stride": 4,
        "scales": [scale_to_checkpoint(scale)],
        "calibration": calibration_of(networks(images)).state_dict(),
    }
    path = tmp_path_factory.mktemp("model") / CATEGORY / "detector.pt"
    checkpoints.save(path, "detector", CATEGORY, content)
    return path.parent.parent


def test_an_image_goes_in_and_map_score_p_value_and_decision_come_out(folder, tmp_path):
    detector = load_detector(folder / CATEGORY / "detector.pt")
    pixels = np.random.default_rng(1).integers(0, 256, (50, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "new.png")
    found = [detector(image) for image in (tmp_path / "new.png", str(tmp_path / "new.png"), pixels)]
    found.append(detector(Image.fromarray(pixels), false_alarm_rate=0.999))
    for result in found:
        assert result.anomaly_map.shape == (50, 40)
        assert result.anomaly_map.dtype == np.float32
        assert np.array_equal(result.anomaly_map, found[0].anomaly_map)
        assert (result.score, result.p_value) == (found[0].score, found[0].p_value)
    assert found[0].anomalous == (found[0].p_value <= 0.05)
    assert found[-1].anomalous == (found[0].p_value <= 0.999)
    assert detector(pixels[:, :, 0]).anomaly_map.shape == (50, 40)  # a grey one


def test_the_example_in_the_readme_runs(folder, tmp_path, capsys, monkeypatch):
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (50, 40, 3), dtype=np.uint8)).save(
        tmp_path / "photograph.png"
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model" / "NAME").mkdir(parents=True)
    (tmp_path / "model" / "NAME" / "detector.pt").write_bytes((folder / CATEGORY / "detector.pt").read_bytes())
    example = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(textwrap.dedent(example), {})
    assert "(50, 40)" in capsys.readouterr().out


def test_p_values_are_conformal():
    """(1 + number of calibration scores at least as high) / (n + 1), whatever the image score."""
    maps = good_maps(19)
    calibration = calibration_of(maps)
    for image_score in scoring.IMAGE_SCORES:
        scores = scoring.image_scores(maps, image_score)
        ranks = sorted(calibration.p_value(score, image_score) for score in scores.double().tolist())
        assert ranks == pytest.approx([(number + 2) / 20 for number in range(19)])
        assert calibration.p_value(1e9, image_score) == 1 / 20 == calibration.smallest_rate
        assert calibration.p_value(-1e9, image_score) == 1


@pytest.mark.parametrize("rate", (0.05, 0.1, 0.33, 0.5))
def test_the_threshold_is_where_p_values_reach_the_rate(rate):
    calibration = calibration_of(good_maps(19))
    threshold = calibration.threshold(rate, "top")
    below = np.nextafter(threshold, -np.inf)
    assert calibration.p_value(threshold, "top") <= rate < calibration.p_value(below, "top")


def test_too_few_images_can_not_guarantee_a_small_rate():
    calibration = calibration_of(good_maps(19))
    assert calibration.threshold(0.04, "top") == np.inf


@pytest.mark.slow
def test_good_images_are_flagged_at_the_requested_rate():
    flagged = []
    for split in range(60):
        calibration = calibration_of(good_maps(39, seed=2 + 2 * split))
        scores = scoring.image_scores(good_maps(50, seed=3 + 2 * split), "top")
        flagged += [calibration.p_value(score, "top") <= 0.1 for score in scores.double().tolist()]
    assert np.mean(flagged) == pytest.approx(0.1, abs=0.02)


def test_a_fraction_of_good_pixels_is_above_the_pixel_threshold():
    maps = good_maps(19)
    threshold = calibration_of(maps).pixel_threshold(0.01)
    assert (maps > threshold).float().mean().item() == pytest.approx(0.01, abs=1e-3)


def test_scored_maps_give_the_scores_and_anomaly_maps_the_pixel_threshold():
    maps = good_maps(19)
    calibration = calibration_of(maps, scored=5 * maps)
    assert calibration.scores("maximum").max() == 5 * maps.max()
    assert calibration.pixel_threshold(0.01) == calibration_of(maps).pixel_threshold(0.01)


def test_without_the_settings_of_calibration_there_are_no_p_values(folder):
    path = folder / CATEGORY / "detector.pt"
    pixels = np.random.default_rng(1).integers(0, 256, (30, 30, 3), dtype=np.uint8)
    for options in ({"size": (30, 30)}, {"size": None}, {"normalisation": "image"}):
        result = load_detector(path, **options)(pixels)
        assert result.p_value is None
        assert result.anomalous is None
    with pytest.raises(UserError, match="not 65"):
        load_detector(path, [65])


def test_the_detector_computes_every_image_score(folder):
    detector = load_detector(folder / CATEGORY / "detector.pt")
    pixels = np.random.default_rng(1).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    anomaly_map = torch.from_numpy(detector(pixels).anomaly_map)[None]
    for image_score in scoring.IMAGE_SCORES:
        assert detector(pixels, image_score).score == pytest.approx(
            scoring.image_scores(anomaly_map, image_score).item()
        )


@pytest.fixture
def pictures(tmp_path):
    random = np.random.default_rng(0)
    for name in ("line/a.png", "line/deep/b.jpg", "other/line/a.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (30, 22, 3), dtype=np.uint8)).save(tmp_path / name)
    (tmp_path / "line" / "broken.png").write_bytes(b"no image")
    (tmp_path / "line" / "notes.txt").write_text("not an image")
    return tmp_path


def run(folder, results, *options):
    return anomaly_detection.main([CATEGORY, "--model", str(folder), "--results", str(results), *map(str, options)])


def test_new_images_get_decisions_maps_and_overlays(folder, pictures, tmp_path, capsys):
    assert run(folder, tmp_path / "results", "--input", pictures / "line", pictures / "other" / "line") == 3
    captured = capsys.readouterr()
    assert "broken.png" in captured.err
    assert f"{pictures / 'line'}: passed over 1 file, hidden or not images by name: notes.txt" in captured.err
    output = tmp_path / "results" / CATEGORY / "inspection"
    with (output / "decisions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [
        str(pictures / name) for name in ("line/a.png", "line/deep/b.jpg", "other/line/a.png")
    ]
    detector = load_detector(folder / CATEGORY / "detector.pt")
    for row, name in zip(rows, ("line/a.png", "line/deep/b.jpg", "line/a-2.png"), strict=True):
        expected = detector(row["path"])
        assert float(row["image_score"]) == pytest.approx(expected.score, rel=1e-4)
        assert float(row["p_value"]) == pytest.approx(expected.p_value, rel=1e-4)
        assert int(row["anomalous"]) == expected.anomalous
        assert np.array_equal(np.asarray(Image.open(output / "anomaly_maps" / f"{name}.tiff")), expected.anomaly_map)
        assert Image.open(output / "overlays" / f"{name}.jpg").size == (22, 30)


def test_a_large_photograph_is_read_at_reduced_size_and_gets_a_full_size_map(folder, tmp_path, monkeypatch):
    ramp = np.linspace(0, 255, 2100)[:, None] * np.linspace(0.2, 1, 2060)
    photograph = Image.fromarray(ramp.astype(np.uint8)).convert("RGB")
    path = tmp_path / "large.jpg"
    photograph.save(path, quality=95)
    seen, predict = [], Detector.predict
    monkeypatch.setattr(Detector, "predict", lambda *given: seen.append(given[1].size) or predict(*given))
    found, whole = (load_detector(folder / CATEGORY / "detector.pt")(image) for image in (path, photograph))
    assert run(folder, tmp_path, "--input", path, "--output", tmp_path / "out") == 0
    assert seen == [(258, 263), (2060, 2100), (1030, 1050)]
    assert found.anomaly_map.shape == (2100, 2060)
    assert np.abs(found.anomaly_map - whole.anomaly_map).mean() < 0.1 * whole.anomaly_map.std()
    with Image.open(tmp_path / "out" / "anomaly_maps" / "large.jpg.tiff") as anomaly_map:
        assert anomaly_map.size == (2060, 2100)
    with Image.open(tmp_path / "out" / "overlays" / "large.jpg.jpg") as overlay:
        assert overlay.size == (1004, 1024)


def test_with_readable_images_only_the_status_is_0(folder, pictures, tmp_path):
    assert run(folder, tmp_path, "--input", pictures / "line" / "a.png", "--output", tmp_path / "out") == 0
    assert (tmp_path / "out" / "decisions.csv").exists()


def test_after_a_stop_it_continues_with_the_remaining_images(folder, pictures, tmp_path, monkeypatch):
    seen = []
    predict = Detector.predict

    def stopped(detector, picture, image_score):
        if len(seen) == 1:
            raise KeyboardInterrupt
        seen.append(picture.size)
        return predict(detector, picture, image_score)

    monkeypatch.setattr(Detector, "predict", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path, "--input", pictures / "line", "--output", tmp_path / "out")
    assert not (tmp_path / "out" / "decisions.csv").exists()
    monkeypatch.setattr(Detector, "predict", lambda *given: seen.append(1) or predict(*given))
    run(folder, tmp_path, "--input", pictures / "line", "--output", tmp_path / "out")
    assert len(seen) == 2  # one before the stop, one after it
    run(folder, tmp_path, "--input", pictures / "line", "--output", tmp_path / "again")
    assert len(seen) == 4
    assert (tmp_path / "out" / "decisions.csv").read_text() == (tmp_path / "again" / "decisions.csv").read_text()
    assert not list((tmp_path / "out").glob("*.unfinished"))


@pytest.mark.parametrize(
    "name",
    [
        "anomaly_maps/line/a.png.tiff",
        "overlays/line/a.png.jpg",
        *("page/0000.jpg", "page/0000_small.jpg", "page/0000_map.png"),
    ],
)
def test_what_has_gone_since_a_stop_is_made_again(folder, pictures, tmp_path, monkeypatch, name):
    finish = inspection.ResultPage.finish
    monkeypatch.setattr(inspection.ResultPage, "finish", lambda *_, **__: 1 / 0)
    arguments = ["--input", pictures / "line", "--output", tmp_path]
    with pytest.raises(ZeroDivisionError):
        run(folder, tmp_path, *arguments)
    assert (tmp_path / name).exists()
    (tmp_path / name).unlink()
    monkeypatch.setattr(inspection.ResultPage, "finish", finish)
    run(folder, tmp_path, *arguments)
    assert (tmp_path / name).exists()


def test_a_rate_that_can_t_be_guaranteed_is_named(folder, pictures, tmp_path, capsys):
    run(folder, tmp_path, "--input", pictures / "line" / "a.png", "--false-alarm-rate", "0.01")
    assert "below 0.05, the smallest" in capsys.readouterr().out


def test_missing_paths_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        files_in([tmp_path / "missing"], tmp_path / "out")
    with pytest.raises(UserError, match="no images"):
        files_in([tmp_path], tmp_path / "out")


def test_its_own_output_and_hidden_files_are_skipped(folder, pictures, tmp_path):
    line = pictures / "line"
    (line / ".trash").mkdir()
    shutil.copy(line / "a.png", line / ".trash")
    for _ in range(2):
        run(folder, tmp_path, "--input", line, "--output", line / "out")
        assert len((line / "out" / "decisions.csv").read_text().splitlines()) == 1 + 2
    run(folder, tmp_path, "--input", line, "--output", pictures)  # its input is in there
    assert len((pictures / "decisions.csv").read_text().splitlines()) > 1 + 2


def test_each_page_is_looked_at(folder, tmp_path):
    random = np.random.default_rng(0)
    pages = [Image.fromarray(random.integers(0, 256, (30, 22), dtype=np.uint8)) for _ in range(3)]
    path = tmp_path / "stack.tif"
    pages[0].save(path, save_all=True, append_images=pages[1:])
    assert run(folder, tmp_path, "--input", path, "--output", tmp_path / "out") == 0
    with (tmp_path / "out" / "decisions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [f"{path}#{number}" for number in (1, 2, 3)]
    detector = load_detector(folder / CATEGORY / "detector.pt")
    for row, page in zip(rows, pages, strict=True):
        assert float(row["image_score"]) == pytest.approx(detector(page).score, rel=1e-4)
    assert run(folder, tmp_path, "--input", f"{path}#2", "--output", tmp_path / "one") == 0
    assert len((tmp_path / "one" / "decisions.csv").read_text().splitlines()) == 1 + 1
    with pytest.raises(UserError, match=r"stack\.tif: has 3 pages; name one"):
        detector(path)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["index.html", "page/0001.jpg", "decisions.csv", "overlays/line/a.png.jpg"])
def test_what_others_have_put_there_is_neither_replaced_nor_removed(folder, pictures, tmp_path, name):
    line = pictures / "line"
    (line / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(line / "a.png", line / name)
    before = contents(pictures)
    told = "(.*: there already, and not written by| would be replaced)"
    with pytest.raises(UserError, match=re.escape(str(line / name)) + told):
        run(folder, tmp_path, "--input", line, "--output", line)
    assert contents(pictures) == before
    (line / name).unlink()
    (line / "page").mkdir(exist_ok=True)
    shutil.copy(line / "a.png", line / "page" / "0700.jpg")  # a name like ours, in a folder like ours
    for _ in range(2):
        assert run(folder, tmp_path, "--input", line, "--output", line) == 3
        assert len((line / "decisions.csv").read_text().splitlines()) == 1 + 3  # it is looked at, and stays
        assert (line / "page" / "0700.jpg").read_bytes() == (line / "a.png").read_bytes()


def test_results_of_another_input_are_replaced_when_asked_alone(folder, pictures, tmp_path):
    line, other, out = pictures / "line", pictures / "other", tmp_path / "out"
    run(folder, tmp_path, "--input", line, "--output", out)
    before = contents(out)
    with pytest.raises(UserError, match=rf"holds the results of --input {line}: .*--overwrite"):
        run(folder, tmp_path, "--input", other, "--output", out)
    assert contents(out) == before
    run(folder, tmp_path, "--input", other, "--output", out, "--overwrite")
    run(folder, tmp_path, "--input", other, "--output", tmp_path / "fresh")
    assert {path.relative_to(out) for path in contents(out)} == {
        path.relative_to(tmp_path / "fresh") for path in contents(tmp_path / "fresh")
    }


def test_an_input_is_never_replaced(folder, pictures, tmp_path):
    name = pictures / "page" / "0000.jpg"
    name.parent.mkdir()
    shutil.copy(pictures / "line" / "a.png", name)
    with pytest.raises(UserError, match=r"0000\.jpg would be replaced by a result of it"):
        run(folder, tmp_path, "--input", pictures, "--output", pictures, "--overwrite")


def test_results_of_images_that_have_gone_are_removed(folder, pictures, tmp_path):
    run(folder, tmp_path, "--input", pictures / "line", "--output", tmp_path / "out")
    (pictures / "line" / "deep" / "b.jpg").unlink()
    run(folder, tmp_path, "--input", pictures / "line", "--output", tmp_path / "out")
    names = {path.relative_to(tmp_path / "out").as_posix() for path in contents(tmp_path / "out")}
    page = {"index.html", "page/cover.jpg", "page/0000.jpg", "page/0000_small.jpg", "page/0000_map.png"}
    ours = {"anomaly_maps/line/a.png.tiff", "overlays/line/a.png.jpg"}
    ours |= {"decisions.csv", "regions.csv", ".student_teacher.json"}
    assert names == page | ours


def test_inspected_images_have_a_page_that_starts_from_the_decisions(folder, pictures, tmp_path):
    run(folder, tmp_path, "--input", pictures / "line", "--output", tmp_path / "out", "--false-alarm-rate", "0.9")
    page = (tmp_path / "out" / "index.html").read_text()
    content = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])
    with (tmp_path / "out" / "decisions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [image["name"] for image in content["images"]] == [
        Path(row["path"]).name for row in sorted(rows, key=lambda row: -float(row["image_score"]))
    ]
    assert {image["label"] for image in content["images"]} == {None}
    for row in rows:
        assert (float(row["image_score"]) >= content["threshold"]) == (row["anomalous"] == "1")
    run(folder, tmp_path, "--input", pictures / "line", "--output", tmp_path / "out", "--false-alarm-rate", "0.01")
    assert '"threshold": null' in (tmp_path / "out" / "index.html").read_text()


@pytest.mark.parametrize("mode", ["I;16", "RGBA", "F", "P", "L"])
def test_a_picture_is_seen_as_its_file_is(folder, tmp_path, mode):
    ramp = np.linspace(0, 1, SIZE[0] * SIZE[1], dtype=np.float32).reshape(SIZE)
    picture = {
        "I;16": lambda: Image.fromarray((65535 * ramp).astype(np.uint16)),
        "F": lambda: Image.fromarray(ramp),
        "RGBA": lambda: Image.fromarray((255 * np.dstack([ramp, ramp, ramp, 1 - ramp])).astype(np.uint8)),
        "P": lambda: Image.fromarray((255 * ramp).astype(np.uint8)).convert("P"),
        "L": lambda: Image.fromarray((255 * ramp).astype(np.uint8)),
    }[mode]()
    picture.save(tmp_path / "picture.tiff")
    detector = load_detector(folder / CATEGORY / "detector.pt")
    detector.value_range = (0, 1) if mode == "F" else None
    assert np.array_equal(detector(picture).anomaly_map, detector(tmp_path / "picture.tiff").anomaly_map)
    assert np.array_equal(detector(Image.open(tmp_path / "picture.tiff")).anomaly_map, detector(picture).anomaly_map)


def test_regions_are_connected_and_have_box_area_scores_and_centre():
    anomaly_map = np.zeros((12, 20), np.float32)
    anomaly_map[2:5, 4:6] = 3  # 3 x 2 pixels
    anomaly_map[5, 6] = 4  # touches a corner: the same region
    anomaly_map[10, 0] = 7
    anomaly_map[0, 19] = 1.9
    assert regions_above(anomaly_map, 2) == [
        AnomalousRegion(0, 10, 1, 1, area=1, peak=7, mean=7, centre_x=0, centre_y=10),
        AnomalousRegion(4, 2, 3, 4, area=7, peak=4, mean=22 / 7, centre_x=33 / 7, centre_y=23 / 7),
    ]
    assert regions_above(anomaly_map, 8) == []


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_regions_of_a_large_map_are_found_in_bands_as_in_the_whole(monkeypatch, rows):
    rng = np.random.default_rng(0)
    for share in (0.05, 0.4, 0.6, 1.0):
        anomaly_map = rng.random((19, 23)).astype(np.float32)
        anomaly_map[5] = 0  # nothing in this row
        threshold = np.quantile(anomaly_map, 1 - share)
        whole = regions_above(anomaly_map, threshold)
        with monkeypatch.context() as patched:
            patched.setattr(regions, "BAND", 23 * rows)
            found = regions_above(anomaly_map, threshold)
        assert [region._replace(mean=0) for region in found] == [region._replace(mean=0) for region in whole] != []
        assert [region.mean for region in found] == pytest.approx([region.mean for region in whole], rel=1e-12)


def test_regions_csv_has_the_regions_that_python_gives_also_after_a_stop(folder, pictures, tmp_path, monkeypatch):
    detector = load_detector(folder / CATEGORY / "detector.pt")
    middle = float(np.median(detector(pictures / "line" / "a.png").anomaly_map))
    monkeypatch.setattr(Calibration, "pixel_threshold", lambda *_: middle)
    options = ("--input", pictures / "line", "--output")
    seen, predict = [], Detector.predict

    def stopped(*given):
        if len(seen) == 1:
            raise KeyboardInterrupt
        seen.append(given)
        return predict(*given)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Detector, "predict", stopped)
        run(folder, tmp_path, *options, tmp_path / "stopped")
    for output in (tmp_path / "stopped", tmp_path / "out"):
        run(folder, tmp_path, *options, output)
    assert (tmp_path / "stopped" / "regions.csv").read_text() == (tmp_path / "out" / "regions.csv").read_text()
    expected = []
    for name in ("a.png", "deep/b.jpg"):
        found = detector(pictures / "line" / name)
        assert found.regions == regions_above(found.anomaly_map, middle)
        expected += [[str(pictures / "line" / name), *region.cells()] for region in found.regions]
    with (tmp_path / "out" / "regions.csv").open() as file:
        assert list(csv.reader(file))[1:] == expected != []
    with (tmp_path / "out" / "decisions.csv").open() as file:
        pixels = sum(int(row["anomalous_pixels"]) for row in csv.DictReader(file))
    assert pixels == sum(int(row[5]) for row in expected)


def save_copy(folder, tmp_path):
    """A detector.pt of its own, to be changed."""
    path = tmp_path / "own" / CATEGORY / "detector.pt"
    path.parent.mkdir(parents=True)
    shutil.copy(folder / CATEGORY / "detector.pt", path)
    return path


def test_a_threshold_of_ones_own_decides_and_is_kept(folder, pictures, tmp_path, capsys):
    path, line = save_copy(folder, tmp_path), pictures / "line"
    scores = {name: load_detector(path)(line / name).score for name in ("a.png", "deep/b.jpg")}
    between = sum(scores.values()) / 2
    before = checkpoints.load(path, "detector")
    for options in (("--threshold", between, "--save-threshold"), ()):  # then it holds without an option
        run(path.parent.parent, tmp_path, "--input", line, "--output", tmp_path / "out", *options)
        with (tmp_path / "out" / "decisions.csv").open() as file:
            rows = {str(Path(row["path"]).relative_to(line)): row["anomalous"] for row in csv.DictReader(file)}
        assert rows == {name: str(int(score >= between)) for name, score in scores.items()}
        assert "by a threshold of your own" in capsys.readouterr().out
    after = checkpoints.load(path, "detector")
    assert after.pop("threshold") == (between, False)
    assert repr(after) == repr(before)
    detector = load_detector(path)
    assert [detector(line / name).anomalous for name in scores] == [score >= between for score in scores.values()]
    assert detector(line / "a.png", threshold=-1e9).anomalous
    assert not detector(line / "a.png", false_alarm_rate=0.01).anomalous  # too few images for this rate
    assert detector.decisions("mean").false_alarm_rate == 0.05  # it is a threshold for another score
    run(path.parent.parent, tmp_path, "--input", line, "--threshold", "none", "--save-threshold")
    assert load_detector(path).saved_threshold is None


def test_thresholds_that_contradict_are_refused(folder, pictures, tmp_path):
    for options, told in (
        (("--threshold", "3", "--false-alarm-rate", "0.05"), "contradicts"),
        (("--save-threshold",), "needs --threshold"),
        (("--threshold", "best-f1"), "run without --input"),
        (("--threshold", "3", "--save-threshold", "--image-score", "mean"), "settings of training"),
    ):
        with pytest.raises(UserError, match=told):
            run(folder, tmp_path, "--input", pictures / "line", *options)
    with pytest.raises(SystemExit) as ended:
        run(folder, tmp_path, "--threshold", "nan")
    assert ended.value.code == 2


def test_without_calibration_a_threshold_of_ones_own_still_decides(folder, pictures, tmp_path):
    run(folder, tmp_path, "--input", pictures / "line", "--image-size", "30", "--threshold", "-9999")
    with (tmp_path / CATEGORY / "inspection" / "decisions.csv").open() as file:
        assert [(row["anomalous"], row["p_value"]) for row in csv.DictReader(file)] == [("1", ""), ("1", "")]


@pytest.mark.parametrize("kinds", [(), ("maps",), ("overlays",), ("page",), ("maps", "overlays", "page")])
def test_what_is_saved_can_be_chosen(folder, pictures, tmp_path, kinds):
    for output, options in (("all", ()), ("out", ("--save", *kinds))):
        run(folder, tmp_path, "--input", pictures / "line" / "a.png", "--output", tmp_path / output, *options)
    places = {"anomaly_maps": "maps", "overlays": "overlays", "index.html": "page", "page": "page"}
    everything = {path.relative_to(tmp_path / "all"): content for path, content in contents(tmp_path / "all").items()}
    found = {path.relative_to(tmp_path / "out"): content for path, content in contents(tmp_path / "out").items()}
    wanted = {path for path in everything if places.get(path.parts[0], "") in ("", *kinds)}
    assert found.keys() == wanted
    for path in wanted - {Path(".student_teacher.json")}:
        assert found[path] == everything[path]
    with pytest.raises(UserError, match="--save figures is for the test images"):
        run(folder, tmp_path, "--input", pictures, "--save", "figures")
    run(folder, tmp_path, "--input", pictures / "line" / "a.png", "--output", tmp_path / "all", "--save")
    assert {path.name for path in contents(tmp_path / "all")} == {
        "decisions.csv",
        "regions.csv",
        ".student_teacher.json",
    }


def test_a_batch_gives_what_each_image_gives(folder, tmp_path):
    detector = load_detector(folder / CATEGORY / "detector.pt")
    pixels = [np.random.default_rng(seed).integers(0, 256, (50, 40 + seed, 3), dtype=np.uint8) for seed in range(3)]
    Image.fromarray(pixels[0]).save(tmp_path / "new.png")
    found = detector.batch([tmp_path / "new.png", *pixels[1:]], threshold=0.5)
    for result, image in zip(found, pixels, strict=True):
        expected = detector(image, threshold=0.5)
        assert np.array_equal(result.anomaly_map, expected.anomaly_map)
        assert result[1:] == expected[1:]
    assert detector.batch([]) == []


def test_a_map_at_its_own_size_is_as_pillow_resizes_it():
    anomaly_map = good_maps(1)[0]
    for size in ((70, 90), (24, 20), (7, 11)):
        resized = Image.fromarray(anomaly_map.numpy()).resize(size[::-1], Image.Resampling.BILINEAR)
        assert np.allclose(at_own_size(anomaly_map, size), np.asarray(resized), atol=1e-4)
