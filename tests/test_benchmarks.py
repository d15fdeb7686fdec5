import importlib
import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import anomaly_map
import dense_extraction
import latency
import measuring
import memory
import numpy as np
import one_class
import published
import pytest
import scaling
import seen_before
import synthetic_category
import teacher_neighbours
import torch
from PIL import Image

import mvtec_dataset
from AnomalyDataset import AnomalyDataset
from AnomalyNet import PATCH_SIZES, AnomalyNet
from FDFEAnomalyNet import FDFEAnomalyNet
from student_teacher.detection.AnomalyDetector import AnomalyDetector, Scale
from student_teacher.runtime import checkpoints
from student_teacher.runtime.errors import UserError
from student_teacher.training import backbone_students, losses

QUICK = ["--image-size", "12", "--patch-size", "17", "--repeat", "1", "--device", "cpu"]
PRODUCT = ["--matrix-size", "64"]


def run(script, output, *options):
    script.main([*QUICK, *options, "--output", str(output)])
    return json.loads(output.read_text())


@pytest.mark.parametrize("size", ((9, 14), (21, 16), (1, 3), (19, 23)))
@pytest.mark.parametrize("patch_size", PATCH_SIZES)
def test_the_published_way_gives_the_same_descriptors(patch_size, size):
    torch.manual_seed(patch_size)
    published.require_same_descriptors(AnomalyNet(patch_size), torch.randn(2, 3, *size))


def test_the_check_of_descriptors_sees_one_pixel(monkeypatch):
    right = published.MultiPoolingNet.forward

    def wrong(self, images):
        descriptors = right(self, images).clone()
        descriptors[-1, :, -1, -1] *= 1.01
        return descriptors

    monkeypatch.setattr(published.MultiPoolingNet, "forward", wrong)
    with pytest.raises(AssertionError, match="differ"):
        published.require_same_descriptors(AnomalyNet(17), torch.randn(1, 3, 9, 7))


@pytest.mark.parametrize("patch_size", PATCH_SIZES)
def test_the_published_way_gives_the_same_maps(patch_size):
    torch.manual_seed(patch_size)
    nets = [AnomalyNet(patch_size) for _ in range(3)]
    scale = Scale(nets[0], nets[1:], torch.randn(512), torch.rand(512) + 0.5).eval()
    images = torch.randint(256, (2, 3, 11, 14), dtype=torch.uint8)
    published.require_same_maps(published.PublishedDetector(scale), AnomalyDetector([scale]), images)


def test_the_published_way_gives_the_same_gradients():
    torch.manual_seed(0)
    teacher, student = AnomalyNet(33).requires_grad_(False), AnomalyNet(33)
    images = torch.randn(1, 3, 9, 12)
    theirs = published.MultiPoolingNet(student)
    losses.regression(theirs(images), teacher_descriptors := FDFEAnomalyNet(teacher)(images)).backward()
    losses.regression(FDFEAnomalyNet(student)(images), teacher_descriptors).backward()
    for found, expected in zip(theirs.net.parameters(), student.parameters(), strict=True):
        assert ((found.grad - expected.grad).norm() / expected.grad.norm()).item() < 1e-4


def test_dense_extraction_counts_every_multiplication(tmp_path):
    options = [*PRODUCT, "--image-size", "6", "--stride", "1", "--precision", "float32"]
    report = run(dense_extraction, tmp_path / "figures.json", *options)
    (row,) = report["rows"]
    # Each layer's side, channels and kernel, for 6 + 16 pixels along each side.
    layers = ((17, 3, 128, 6), (13, 128, 256, 5), (9, 256, 256, 5), (6, 256, 128, 4), (6, 128, 512, 1))
    expected = sum(2 * side**2 * before * after * kernel**2 for side, before, after, kernel in layers)
    assert row["tflop"] == pytest.approx(expected / 1e12)
    assert row["tflop_per_second"] == pytest.approx(row["tflop"] / row["seconds"])
    assert row["times_every_patch"] > 0
    assert report["product_tflop_per_second"]["float32"] > 0
    seconds = {baseline["way"]: baseline["seconds"] for baseline in report["baselines"]}
    assert row["times_published"] == pytest.approx(seconds["published"] / row["seconds"])
    (sampled,) = (baseline for baseline in report["baselines"] if baseline["way"] == "every patch")
    assert sampled["seconds"] == pytest.approx(6 * sampled["extrapolated_from_seconds"][0])


def test_dense_extraction_says_what_is_extrapolated(tmp_path, capsys):
    report = run(dense_extraction, tmp_path / "figures.json", *PRODUCT, "--stride", "4", "8", "--precision", "float32")
    assert [row["stride"] for row in report["rows"]] == [4, 8]
    assert "extrapolated from 1 of 12 rows" in capsys.readouterr().out


def test_anomaly_map_measures_time_and_memory(tmp_path, capsys):
    options = [*PRODUCT, "--stride", "4", "--memory", "40", "--students", "2", "--precision", "float32"]
    report = run(anomaly_map, tmp_path / "a" / "figures.json", *options)
    assert [row["stride"] for row in report["rows"]] == [4] * len(report["rows"])
    assert all(row["seconds"] > 0 and row["times_published"] > 0 for row in report["rows"])
    assert {row["way"] for row in report["memory"]} == {"ours"}
    descriptors = 10 * 10 * 512 * 4  # bytes of one network's, at every 4th of 40 x 40 pixels
    assert all(descriptors < row["peak_bytes"] < 2**28 for row in report["memory"])
    assert "to published" in capsys.readouterr().out


def test_students_training_counts_visits(tmp_path):
    # By the folder: src has a script of the same name.
    script = importlib.import_module("benchmarks.students_training")
    options = ["--stride", "4", "--batch-size", "2", "--students", "2", "--precision", "float32"]
    report = run(script, tmp_path / "figures.json", *options)
    (row,), (baseline,) = report["rows"], report["baselines"]
    assert row["visits_per_second"] == pytest.approx(2 / row["seconds"])
    assert baseline["visits_per_second"] == pytest.approx(1 / baseline["seconds"])
    assert row["times_published"] == pytest.approx(row["visits_per_second"] / baseline["visits_per_second"])


def test_metrics_benchmark_agrees_with_the_plain_way(tmp_path):
    # By the folder: src has a module of the same name.
    script = importlib.import_module("benchmarks.metrics")
    output = tmp_path / "figures.json"
    assert script.main(["--maps", "4", "--size", "48", "--repeats", "2", "--output", str(output)]) == 0
    assert len(json.loads(output.read_text())["timings"]) == 5


def test_neighbours_of_a_teacher_see_what_is_new(tmp_path):
    random = np.random.default_rng(0)
    spot = np.zeros((64, 64), np.uint8)
    spot[20:44, 20:44] = 255
    for folder, number in (("train/good", 4), ("test/good", 2), ("test/spot", 2), ("ground_truth/spot", 2)):
        for index in range(number):
            pixels = random.integers(100, 140, (64, 64, 3), dtype=np.uint8)
            pixels[spot > 0] = (250, 20, 20) if folder == "test/spot" else pixels[spot > 0]
            picture = Image.fromarray(spot if folder.startswith("ground") else pixels)
            name = f"{index}_mask.png" if folder.startswith("ground") else f"{index}.png"
            (tmp_path / "knit" / folder).mkdir(parents=True, exist_ok=True)
            picture.save(tmp_path / "knit" / folder / name)
    mvtec_dataset.prepare(tmp_path / "knit")
    torch.manual_seed(0)
    checkpoints.save(tmp_path / "t.pt", "teacher", "knit", {"patch_size": 17, "net": AnomalyNet(17).state_dict()})
    options = ["--data", str(tmp_path), "--image-size", "64", "--backbone", "resnet18", "--backbone-weights", "random"]
    output = tmp_path / "figures.json"
    teacher_neighbours.main(["knit", "--teacher", str(tmp_path / "t.pt"), *options, "--output", str(output)])
    rows = json.loads(output.read_text())["rows"]
    assert list(rows) == [str(tmp_path / "t.pt"), "resnet18"]
    for row in rows.values():
        assert row["image_au_roc_maximum"] == 1
        assert row["au_pro"] > 0.5


def test_a_ring_brings_each_gradient_round_twice():
    assert scaling.ring_seconds(1, 100, 1.0) == 0
    assert scaling.ring_seconds(8, 800, 100.0) == pytest.approx(14)


def test_works_take_turns_and_the_first_does_not_count():
    calls = []
    works = {name: lambda name=name: calls.append(name) for name in "ab"}
    timings = measuring.interleaved(works, repeat=3, fewer={"b": 1})
    assert calls == ["a", "b", "a", "b", "a", "a"]
    assert [len(timings[name].turns) for name in "ab"] == [3, 1]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says how much memory a process holds")
def test_memory_of_a_process_and_of_a_command_that_fails(tmp_path, monkeypatch):
    holding = "block = b'1' * 100_000_000; print(flush=True); input()"  # not ours, which frees memory, too
    with subprocess.Popen([sys.executable, "-c", holding], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert 1e8 < memory.held(process.pid, "RssAnon") < 1.5e8
        assert memory.held(process.pid, "VmHWM") >= memory.held(process.pid, "RssAnon")
        process.communicate(b"\n")
    monkeypatch.setattr(memory, "ROOT", tmp_path)
    (tmp_path / "broken.py").write_text("raise SystemExit('no such luck')")
    with pytest.raises(UserError, match="no such luck"):
        memory.cost_of("a stage", "broken.py")


def test_the_category_of_the_memory_benchmark_is_complete(tmp_path):
    memory.write_category(tmp_path / "carpet", 12, 48, np.random.default_rng(0))
    mvtec_dataset.main(["carpet", "--data", str(tmp_path)])
    dataset = AnomalyDataset(tmp_path / "carpet", label=1)
    assert len(dataset) == 5 and all(np.any(sample["mask"]) for sample in dataset)


def test_a_table_lines_up():
    expected = "| way  |   ms |\n|------|-----:|\n| ours |  1.5 |\n| all  | 20.0 |"
    assert measuring.table(("way", "ms"), (("ours", "1.5"), ("all", "20.0"))) == expected
    assert [measuring.milliseconds(value) for value in (0.0001234, 0.01234, 12.34)] == ["0.123", "12.3", "12,340"]


def test_a_synthetic_category_has_validation_images_with_and_without_defects(tmp_path):
    random = np.random.default_rng(0)
    folder = tmp_path / "knit" / "train" / "good"
    folder.mkdir(parents=True)
    for number in range(12):
        pixels = random.integers(90, 160, (40, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    mvtec_dataset.main(["knit", "--data", str(tmp_path)])
    synthetic_category.main(["knit", "--data", str(tmp_path)])
    mvtec_dataset.main(["knit_synthetic", "--data", str(tmp_path)])
    made = tmp_path / "knit_synthetic"
    good = sorted((made / "test" / "good").iterdir())
    assert len(good) + len(list((made / "train" / "good").iterdir())) == 12
    for kind in synthetic_category.KINDS:
        for path in good:
            before, after = (np.asarray(Image.open(made / "test" / k / path.name), int) for k in ("good", kind))
            mask = np.asarray(Image.open(made / "ground_truth" / kind / f"{path.stem}_mask.png")) > 0
            changed = np.abs(after - before).max(2)
            assert 0 < mask.mean() < 0.6, kind
            assert changed[mask].mean() > 5 * changed[~mask].mean(), kind
    with pytest.raises(UserError, match="already"):
        synthetic_category.main(["knit", "--data", str(tmp_path)])


def test_no_photograph_of_an_unseen_part_is_trained_on(tmp_path):
    """Ten parts, three photographs of each: validation takes whole parts, a quarter of the images at most."""
    random = np.random.default_rng(0)
    folder = tmp_path / "knit" / "train" / "good"
    folder.mkdir(parents=True)
    for part in range(10):
        picture = Image.fromarray(random.integers(0, 256, (26, 26), dtype=np.uint8)).resize((104, 104))
        for shot in range(3):
            picture.crop((4 * shot, 4, 4 * shot + 96, 100)).save(folder / f"{part}_{shot}.png")
    mvtec_dataset.main(["knit", "--data", str(tmp_path)])
    synthetic_category.main(["knit", "--data", str(tmp_path), "--unseen"])
    learned = {int(path.stem) // 3 for path in (tmp_path / "knit_unseen" / "train" / "good").iterdir()}
    good = list((tmp_path / "knit_unseen" / "test" / "good").iterdir())
    assert 3 * len(learned) + len(good) == 30
    assert len(good) % 3 == 0 < len(good)


def test_parts_seen_before_are_known_by_their_thumbnails(tmp_path):
    """Good test images show the training parts, slightly shifted; the defective ones show other parts."""
    random = np.random.default_rng(0)
    parts = random.integers(0, 256, (6, 26, 26), dtype=np.uint8)
    for number, part in enumerate(parts):
        picture = Image.fromarray(part).resize((104, 104))
        folders = ("train/good", "test/good") if number < 4 else ("test/hole",)
        for left, folder in zip((0, 8), folders, strict=False):
            (tmp_path / "knit" / folder).mkdir(parents=True, exist_ok=True)
            picture.crop((left, 4, left + 96, 100)).save(tmp_path / "knit" / folder / f"{number}.png")
    masks = tmp_path / "knit" / "ground_truth" / "hole"
    masks.mkdir(parents=True)
    for number in (4, 5):
        Image.fromarray(np.full((96, 96), 255, np.uint8)).save(masks / f"{number}_mask.png")
    mvtec_dataset.main(["knit", "--data", str(tmp_path)])
    seen_before.main(["knit", "--data", str(tmp_path), "--output", str(tmp_path / "seen.json")])
    rows = {row["kind"]: row for row in json.loads((tmp_path / "seen.json").read_text())["rows"]}
    assert rows["good"]["seen_before"] == 1
    assert rows["hole"]["seen_before"] == 0
    assert rows["all"]["image_au_roc"] == rows["hole"]["image_au_roc"] == 1


def test_latency_times_ours_and_what_is_installed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(backbone_students, "LOCAL_STEPS", 2)
    monkeypatch.setattr(backbone_students, "COARSE_STEPS", 2)
    options = ["--images", "4", "--image-size", "128", "--rival-size", "64", "--picture-size", "96", "--repeat", "2"]

    def report():
        latency.main([*options, "--output", str(tmp_path / "figures.json")])
        return json.loads((tmp_path / "figures.json").read_text())

    def missing(args):
        raise ImportError("No module named 'anomalib'")

    monkeypatch.setattr(latency, "rivals", missing)
    rows = report()["rows"]
    assert {row["name"] for row in rows} <= {"ours", "ours, ONNX Runtime"}
    assert "PatchCore are left out, anomalib is not installed" in capsys.readouterr().out

    seen = []

    class Rival(torch.nn.Module):
        def forward(self, images):
            seen.append(images.shape)
            return Namespace(anomaly_map=images[:, :1], pred_score=images.amax())

    monkeypatch.setattr(latency, "rivals", lambda args: {"rival": (Rival(), lambda image: image / 255)})
    found = report()
    assert set(seen) == {(1, 3, 64, 64)}
    ours = [row for row in found["rows"] if row["name"] == "ours"][-1]
    assert ours["times_ours"] == 1
    for row in found["rows"]:
        assert row["times_ours"] == pytest.approx(row["seconds"] / ours["seconds"])
    assert {row["side"] for row in found["rows"]} == {64, 128}
    turns = {step["step"]: np.array(step["turns"]) for step in found["steps"]}
    assert np.allclose(turns.pop("all"), sum(turns.values()))
    assert all((values > 0).all() for values in turns.values())


def test_patchcore_keeps_a_fraction_of_all_patches():
    args = latency.parse_arguments(["--images", "209", "--rival-size", "256", "--bank", "0.1"])
    assert latency.bank_size(args) == 21_402


def write_mnist(folder, seed=0):
    """Bars on a dark ground in MNIST's format: those of class 0 lie, those of class 1 stand."""
    random = np.random.default_rng(seed)
    for name, number in (("train", 10), ("t10k", 6)):
        pixels = random.integers(0, 40, (2 * number, 28, 28), dtype=np.uint8)
        classes = np.arange(2 * number, dtype=np.uint8) % 2
        for image, stands in zip(pixels, classes, strict=True):
            (image.T if stands else image)[random.integers(10, 14) :][:6] = 230
        for kind, values in (("images", pixels), ("labels", classes)):
            path = folder / "MNIST" / "raw" / f"{name}-{kind}-idx{values.ndim}-ubyte"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(np.array([0x800 + values.ndim, *values.shape], ">i4").tobytes() + values.tobytes())


@pytest.mark.slow
def test_one_class_goes_on_after_a_stop(tmp_path, monkeypatch):
    monkeypatch.setattr(backbone_students, "LOCAL_STEPS", 2)
    monkeypatch.setattr(backbone_students, "COARSE_STEPS", 2)
    write_mnist(tmp_path)
    output = tmp_path / "figures.json"
    options = ["--dataset", "mnist", "--data", str(tmp_path), "--steps", "3", "--students", "2", "--images", "8"]
    options += ["--device", "cpu", "--output", str(output), "--classes", "0", "1"]
    measure, measured = one_class.measure, []

    def stopped(good, *others):
        if 1 in good.classes:
            raise KeyboardInterrupt
        return measure(good, *others)

    monkeypatch.setattr(one_class, "measure", stopped)
    with pytest.raises(KeyboardInterrupt):
        one_class.main(options)
    assert not output.exists()
    monkeypatch.setattr(one_class, "measure", lambda good, *rest: measured.append(good) or measure(good, *rest))
    one_class.main(options)
    report = json.loads(output.read_text())
    assert [np.unique(good.classes).tolist() for good in measured] == [[1]]
    assert not list(tmp_path.glob(".*"))
    for row in report["rows"].values():
        assert row["images"] == 8
        assert row["nearest"] == row["default, mean"] == row["patch students"] == 1
    assert report["mean"] == dict.fromkeys(one_class.METHODS, pytest.approx(1, abs=0.2))


def test_an_image_of_the_patch_size_has_one_descriptor():
    torch.manual_seed(0)
    net, side = AnomalyNet(one_class.PATCH_SIZE).eval(), one_class.PATCH_SIZE
    images = torch.randn(3, 3, side, side)
    found = one_class.WholeImage(net)(images)
    assert found.shape[2:] == (1, 1)
    assert torch.allclose(found.flatten(1), net(images), atol=1e-5)


@pytest.mark.parametrize("name", one_class.STORED)
def test_one_class_says_what_to_download(tmp_path, name):
    with pytest.raises(UserError, match=rf"{tmp_path}.*not complete: download .*http"):
        one_class.main(["--dataset", name, "--data", str(tmp_path), "--output", str(tmp_path / "figures.json")])
    assert list(tmp_path.iterdir()) == []


def test_digits_are_split_in_halves():
    pytest.importorskip("sklearn", reason="needs requirements-dev.txt")
    train, test = one_class.digits()
    assert len(train.pixels) + len(test.pixels) == 1797
    assert train.pixels.shape[1:] == (8, 8)
    assert train.pixels.max() == 255
    assert set(train.classes) == set(test.classes) == set(range(10))
