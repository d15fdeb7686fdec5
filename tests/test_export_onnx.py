"""The ONNX file gives the detector's results, on images of every size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import export_onnx
from AnomalyNet import AnomalyNet
from FDFE import PADDING
from student_teacher import detection
from student_teacher.detection import scoring
from student_teacher.detection.AnomalyDetector import NORMALISATIONS, AnomalyDetector, Maps, Scale, scale_to_checkpoint
from student_teacher.detection.Detector import VERSION, Calibration, load_detector
from student_teacher.detection.score_statistics import ScoreStatistics
from student_teacher.images import ignored
from student_teacher.runtime import checkpoints
from student_teacher.runtime.errors import UserError
from student_teacher.runtime.paths import ROOT
from tests.tiff import tiff_of

onnxruntime = pytest.importorskip("onnxruntime", reason="optional: requirements-onnx.txt")
import onnx_runtime  # noqa: E402

from student_teacher.detection import onnx_graph  # noqa: E402  (imports onnx)

CATEGORY = "knit"
TOLERANCE = 1e-4  # of the map's range


def scale_of(patch_size, students=1, descriptor_size=512, padding=PADDING):
    """A scale with random weights and statistics that differ between places."""
    torch.manual_seed(patch_size)
    nets = [AnomalyNet(patch_size, descriptor_size=descriptor_size) for _ in range(students + 1)]
    mean, std = torch.randn(descriptor_size), torch.rand(descriptor_size) + 0.5
    scale = Scale(nets[0], nets[1:], mean, std, padding=padding).eval()
    statistics = ScoreStatistics()
    statistics.update(1000 + 300 * torch.rand(6, 40, 50), 10 * torch.rand(6, 40, 50))
    scale.calibrate(statistics)
    return scale


def pictures(*size, number=2):
    return torch.randint(256, (number, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def save_detector(model, scales, stride=4, size=(48, 40), **remembered):
    """detector.pt with a calibration on noise; its path."""
    images = pictures(48, 40, number=5)
    found = AnomalyDetector(scales, stride, remembered.get("normalisation", NORMALISATIONS[0])).maps(images)
    content = remembered | {
        "detector_version": VERSION,
        "image_size": size,
        "stride": stride,
        "scales": [scale_to_checkpoint(scale) for scale in scales],
        "calibration": Calibration([Maps(*(maps[2:] for maps in found))]).state_dict(),
    }
    path = model / CATEGORY / "detector.pt"
    checkpoints.save(path, "detector", CATEGORY, content)
    return path


def exported(path, *options):
    """The session of a detector as export_onnx.py writes it."""
    export_onnx.main([CATEGORY, "--model", str(path.parent.parent), *options])
    return onnxruntime.InferenceSession(path.with_suffix(".onnx"), providers=["CPUExecutionProvider"])


def require_same(session, detector, images):
    expected, scored = detector.networks.maps(images)
    maps, scores = session.run(["maps", "scores"], {"images": images.numpy()})
    assert maps.dtype == scores.dtype == np.float32
    assert maps.shape == expected.shape
    assert np.abs(maps - expected.numpy()).max() <= TOLERANCE * (expected.max() - expected.min()).item()
    assert np.allclose(scores, scoring.image_scores(scored, detector.image_score).numpy(), rtol=1e-4)


@pytest.fixture(scope="module")
def two_scales(tmp_path_factory):
    scales = [scale_of(33, students=2), scale_of(65)]
    path = save_detector(tmp_path_factory.mktemp("model"), scales)
    return exported(path), load_detector(path, device_name="cpu", precision="float32")


@pytest.mark.parametrize("size", ((64, 64), (48, 80), (67, 89), (33, 35), (5, 14), (1, 3)))
def test_maps_and_scores_are_the_detectors_at_every_size(two_scales, size):
    require_same(*two_scales, pictures(*size))


def test_the_score_is_the_mean_of_the_highest_hundredth(tmp_path):
    session = exported(save_detector(tmp_path, [scale_of(33)]))
    for size in ((10, 25), (10, 15), (7, 50), (32, 48)):  # 2.5, 1.5, 3.5 and 15.36 pixels are a hundredth
        maps, scores = session.run(["maps", "scores"], {"images": pictures(*size).numpy()})
        assert np.allclose(scores, scoring.image_scores(torch.from_numpy(maps), scoring.TOP).numpy(), rtol=1e-6)


@pytest.mark.parametrize("patch_size", (17, 65))
@pytest.mark.parametrize("stride", (1, 2, 8))
def test_every_stride(tmp_path, patch_size, stride):
    path = save_detector(tmp_path, [scale_of(patch_size)])
    detector = load_detector(path, stride=stride, device_name="cpu", precision="float32")
    require_same(exported(path, "--stride", str(stride)), detector, pictures(23, 18))


@pytest.mark.slow
@pytest.mark.parametrize("students", (1, 3))
def test_the_paper_s_detector(tmp_path, students):
    """Error and variance each with one mean and std, zeros around the image, the maximum as score."""
    scales = [scale_of(size, students, 128, "zeros") for size in (17, 65)]
    path = save_detector(tmp_path, scales, stride=1, normalisation="image", image_score="maximum", paper=[])
    detector, session = load_detector(path, device_name="cpu", precision="float32"), exported(path)
    for size in ((23, 18), (48, 40)):
        require_same(session, detector, pictures(*size))
    good_scores = json.loads(session.get_modelmeta().custom_metadata_map["calibration_scores"])
    assert good_scores == detector.calibration.scores("maximum").tolist() != detector.calibration.scores("top").tolist()


@pytest.mark.parametrize("size", ((48, 40), None))
def test_what_a_decision_needs_is_in_the_file(tmp_path, size):
    path = save_detector(tmp_path, [scale_of(17)], size=size)
    session = exported(path)
    metadata = {name: json.loads(text) for name, text in session.get_modelmeta().custom_metadata_map.items()}
    assert metadata["image_size"] == (list(size) if size else None)
    good_scores = load_detector(path, device_name="cpu").calibration.scores("top")
    assert metadata["calibration_scores"] == good_scores.tolist()


def example_images():
    """By name, pictures of all depths and kinds, in 12 bits where they are deep, and files that are not read alike."""
    noise = np.random.default_rng(0)
    deep = noise.integers(0, 4096, (30, 44), np.uint16)
    colours = noise.integers(0, 256, (30, 44, 4), np.uint8)
    return {
        "deep.png": Image.fromarray(deep),
        "dark.tif": Image.fromarray(deep // 8),
        "clear.png": Image.fromarray(colours),
        "float.tif": Image.fromarray(deep.astype(np.float32)),
        "photograph.webp": Image.fromarray(colours[..., :3]),
    }


@pytest.mark.parametrize("value_range", ([0, 4095], None))
def test_the_example_sees_images_as_the_detector_does_or_names_them(tmp_path, value_range):
    path = save_detector(tmp_path / "model", [scale_of(17)], value_range=value_range)
    exported(path)
    folder = tmp_path / "images"
    folder.mkdir()
    for name, picture in example_images().items():
        picture.save(folder / name)
    (folder / "inverted.tif").write_bytes(tiff_of(np.zeros((5, 5), np.uint16), white_is_zero=True))
    (folder / "colours.tif").write_bytes(tiff_of(np.zeros((5, 5, 3), np.uint16)))
    (folder / "notes.txt").write_text("no image")
    Image.new("L", (5, 5)).save(folder / "pages.tif", save_all=True, append_images=[Image.new("L", (5, 5))])
    command = [sys.executable, ROOT / "examples" / "inspect_folder.py", path.with_suffix(".onnx"), folder]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ, check=False)
    assert done.returncode == 3, done.stderr
    lines = done.stdout.splitlines()
    missed = [Path(line.split(": ")[1]).name for line in lines if line.startswith("not inspected: ")]
    expected = ["notes.txt", "inverted.tif", "pages.tif", "colours.tif" if value_range else "float.tif"]
    assert sorted(missed) == sorted(expected)
    scores = {line.split()[0]: float(line.split()[2]) for line in lines if not line.startswith("not inspected")}
    assert len(scores) == 9 - len(missed)
    detector = load_detector(path, device_name="cpu", precision="float32")
    for name, score in scores.items():
        assert score == pytest.approx(detector(folder / name).score, rel=1e-4, abs=2e-3)


@pytest.mark.parametrize("size", ((48, 40), None))
def test_the_example_gives_the_detector_s_results(tmp_path, size):
    path = save_detector(tmp_path / "model", [scale_of(17)], size=size)
    exported(path)
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 44, 3), np.uint8)).save(folder / "noise.png")
    Image.new("L", (35, 28), 90).save(folder / "plain.jpg")
    (folder / "broken.png").write_bytes(b"no image")
    command = [sys.executable, ROOT / "examples" / "inspect_folder.py", path.with_suffix(".onnx"), folder]
    command += ["--false-alarm-rate", "0.3"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path, env=os.environ)
    assert done.returncode == 3
    detector = load_detector(path, device_name="cpu", precision="float32")
    *lines, broken = done.stdout.splitlines()
    assert broken.startswith(f"not inspected: {folder / 'broken.png'}")
    lines = dict(line.split(maxsplit=1) for line in lines)
    assert list(lines) == ["noise.png", "plain.jpg"]
    for name, line in lines.items():
        expected = detector(folder / name, false_alarm_rate=0.3)
        _, score, _, p_value, decision = line.split()
        assert float(score) == pytest.approx(expected.score, rel=1e-4, abs=2e-3)
        assert float(p_value) == pytest.approx(expected.p_value, abs=6e-4)
        assert decision == ("anomalous" if expected.anomalous else "good")
        found = np.asarray(Image.open(folder / "anomaly_maps" / f"{name}.tiff"))
        assert found.dtype == np.float32
        assert np.abs(found - expected.anomaly_map).max() <= TOLERANCE * np.ptp(expected.anomaly_map)


def test_the_saved_threshold_decides_in_the_example(tmp_path):
    path = save_detector(tmp_path / "model", [scale_of(17)], threshold=(-1e9, False))
    metadata = exported(path).get_modelmeta().custom_metadata_map
    assert json.loads(metadata["threshold"]) == -1e9
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 44, 3), np.uint8)).save(folder / "noise.png")
    command = [sys.executable, ROOT / "examples" / "inspect_folder.py", path.with_suffix(".onnx"), folder]
    for options, decision in (((), "anomalous"), (("--false-alarm-rate", "0.05"), "good")):
        done = subprocess.run([*command, *options], check=True, capture_output=True, text=True, env=os.environ)
        assert done.stdout.split()[-1] == decision


def require_same_as_predicted(session, detector, picture):
    """Map and score of a picture at the networks' size."""
    expected, score = detector.predict(picture)
    (found,), (found_score,) = session.run(None, {"images": np.asarray(picture).transpose(2, 0, 1)[None]})
    assert np.abs(found - expected.numpy()).max() <= TOLERANCE * np.ptp(expected.numpy())
    assert found_score == pytest.approx(score, rel=1e-4)


@pytest.mark.parametrize("size", ((48, 40), None))
@pytest.mark.parametrize("image_score", scoring.IMAGE_SCORES)
def test_regions_are_ignored_as_the_detector_does(tmp_path, size, image_score):
    mask = np.zeros((31, 17), dtype=bool)
    mask[3:11, 5:] = True
    packed = ignored.packed(mask)
    path = save_detector(tmp_path, [scale_of(17)], size=size, ignored=packed, image_score=image_score)
    detector, session = load_detector(path, device_name="cpu", precision="float32"), exported(path)
    for shape in [size] if size else [(48, 40), (33, 62), (31, 17)]:
        pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
        require_same_as_predicted(session, detector, Image.fromarray(pixels))


def test_runtimes_are_timed_on_the_same_maps(tmp_path, capsys):
    save_detector(tmp_path, [scale_of(17)])
    output = tmp_path / "figures.json"
    options = ["--model", str(tmp_path), "--image-size", "12", "15", "--batch-size", "2", "--repeat", "1"]
    onnx_runtime.main([CATEGORY, *options, "--output", str(output)])
    rows = json.loads(output.read_text())["rows"]
    assert [row["precision"] for row in rows] == ["float32", "bfloat16", "float32"]
    assert all(len(row["turns"]) == 1 for row in rows)
    assert "2 x 12 x 15" in capsys.readouterr().out


def test_only_a_calibrated_detector_is_written(tmp_path):
    path = save_detector(tmp_path, [scale_of(17)])
    with pytest.raises(ValueError, match="has no calibration"):
        onnx_graph.model_of(load_detector(path, normalisation="image", device_name="cpu"))


def test_the_file_is_written_to_output(tmp_path, capsys):
    path = save_detector(tmp_path, [scale_of(17)])
    output = tmp_path / "elsewhere" / "carpet.onnx"
    export_onnx.main([CATEGORY, "--model", str(tmp_path), "--output", str(output)])
    assert str(output) in capsys.readouterr().out
    assert list(output.parent.iterdir()) == [output]
    assert not path.with_suffix(".onnx").exists()


def test_without_a_detector_one_line_and_status_2(tmp_path):
    command = [sys.executable, ROOT / "src" / "export_onnx.py", "nonsense", "--model", tmp_path]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ, check=False)
    assert found.returncode == 2
    assert found.stderr.count("\n") == 1
    assert "run students_training.py nonsense" in found.stderr


def test_without_onnx_the_error_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.delattr(detection, "onnx_graph")
    monkeypatch.delitem(sys.modules, onnx_graph.__name__)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match=r"pip install -r requirements-onnx\.txt"):
        export_onnx.main([CATEGORY, "--model", str(tmp_path)])
