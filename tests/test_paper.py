"""--paper: its settings, and that the stages follow them."""

import csv
import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_stages import CATEGORY, prepared_category
from torch import nn

import anomaly_detection
import students_training
import teacher_training
from AnomalyDataset import AnomalyDataset
from AnomalyNet import PATCH_SIZES, AnomalyNet
from ExtendedAnomalyNet import ExtendedAnomalyNet
from FDFEAnomalyNet import FDFEAnomalyNet
from student_teacher.detection.Detector import load_detector
from student_teacher.images import category, preprocessing
from student_teacher.runtime import checkpoints
from student_teacher.runtime.errors import UserError
from student_teacher.teachers import backbone_weights
from student_teacher.training import loop, optimiser, paper, patch_students

pytestmark = pytest.mark.slow
SIZE = (12, 14)  # of images, small: every patch of them is visited
TEACHER_GIVEN = ["--patch-size", "17", "--steps", "3", "--batch-size", "4", "--backbone-weights", "random"]
STUDENTS_GIVEN = ["--patch-size", "17", "--epochs", "2", "--image-size", *map(str, SIZE)]


def test_the_list():
    assert paper.TEACHER.values == {
        "distillation": "patches",
        "patch_size": (65,),
        "descriptor_size": 128,
        "backbone": "resnet18",
        "backbone_weights": "imagenet",
        "backbone_size": None,
        "square_zoom": True,
        "literal_losses": True,
        "distillation_weight": 1,
        "metric_weight": 0,
        "compactness_weight": 1,
        "optimiser": "adam",
        "learning_rate": 2e-4,
        "weight_decay": 1e-5,
        "schedule": "constant",
        "batch_size": 64,
        "steps": 50_000,
        "image_size": (None,),
        "precision": "float32",
        "saved_in": "float32",
    }
    assert paper.STUDENTS.values == {
        "teacher": "taught with --paper",
        "patch_size": (65,),
        "students": 3,
        "image_size": (256,),
        "stride": 1,
        "whole_images": True,
        "padding": "zeros",
        "batch_normalisation": False,
        "literal_losses": True,
        "optimiser": "adam",
        "learning_rate": 1e-4,
        "weight_decay": 1e-5,
        "schedule": "constant",
        "batch_size": 1,
        "epochs": 100,
        "all_descriptors": True,
        "validation": True,
        "normalisation": "image",
        "image_score": "maximum",
        "precision": "float32",
    }
    assert paper.DETECTION.values == {
        "stride": 1,
        "normalisation": "image",
        "image_score": "maximum",
        "precision": "float32",
    }


STAGES = [
    (teacher_training, paper.TEACHER),
    (students_training, paper.STUDENTS),
    (anomaly_detection, paper.DETECTION),
]


@pytest.mark.parametrize(("stage", "published"), STAGES)
def test_the_flag_sets_the_list_and_prints_it(stage, published, capsys):
    args = stage.parse_arguments(["carpet", "--paper"])
    assert {name: getattr(args, name) for name in published.values} == published.values
    published.show(args)
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) <= 8
    for name in published.values:
        assert name.replace("_", " ") in " ".join(shown.split())
    assert "as given" not in shown
    plain = stage.parse_arguments(["carpet"])
    assert published.identity(plain) == {}
    published.show(plain)
    assert capsys.readouterr().out == ""


def test_other_options_override_it_and_are_printed(capsys):
    args = students_training.parse_arguments(["carpet", "--epochs", "3", "--paper", "--patch-size", "17", "33", "65"])
    assert (args.epochs, args.patch_size, args.batch_size) == (3, (17, 33, 65), 1)
    paper.STUDENTS.show(args)
    shown = " ".join(capsys.readouterr().out.split())
    assert "as given: epochs 3 (published: 100)" in shown
    assert "patch size 17 33 65" in shown.split("not as published")[0]  # the paper's several scales


@pytest.mark.parametrize(
    ("stage", "given"),
    [
        (teacher_training, ["--distillation", "dense"]),
        (teacher_training, ["--optimiser", "muon"]),
        (students_training, ["--optimiser", "muon"]),
        (students_training, ["--teacher", "backbone"]),
    ],
)
def test_what_contradicts_it_is_refused(stage, given):
    with pytest.raises(UserError, match=f"{' '.join(given)} contradicts --paper"):
        stage.parse_arguments(["carpet", "--paper", *given])


# The networks of the paper


@pytest.mark.parametrize("patch_size", PATCH_SIZES)
def test_descriptors_of_128_are_the_last_convolution_s(patch_size):
    torch.manual_seed(0)
    net, decoding = AnomalyNet(patch_size, descriptor_size=128), AnomalyNet(patch_size)
    for layer, other in zip(net.layers, decoding.layers, strict=False):
        assert type(layer) is type(other)
        assert [p.shape for p in layer.parameters()] == [p.shape for p in other.parameters()]
    assert len(net.layers) == len(decoding.layers) - 2  # neither the activation nor the decoding layer behind it
    patches = torch.randn(5, 3, patch_size, patch_size)
    with torch.no_grad():
        descriptors = net(patches)
        assert descriptors.shape == (5, 128)
        mean, std = torch.randn(128), torch.rand(128) + 0.5
        normalised = net.with_normalised_descriptors(mean, std)(patches)
        projection = torch.randn(7, 128)
        projected = net.projected(projection)(patches)
    torch.testing.assert_close(normalised, (descriptors - mean) / std, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(projected, descriptors @ projection.T, rtol=1e-4, atol=1e-4)


# All stages, once


class Watched:
    """What the stages did, recorded while they ran."""

    def __init__(self):
        self.adam, self.nets, self.dense, self.square = [], [], [], []


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepared_category(tmp_path_factory.mktemp("data"))


class Place:
    def __init__(self, root: Path, data: Path):
        self.data, self.model, self.results = data, root / "model", root / "results"
        self.folders = ["--data", str(data), "--model", str(self.model)]

    def teach(self, *options):
        pictures = ["--images", str(self.data / CATEGORY / "train")]
        teacher_training.main(["pretrained", *self.folders, "--paper", *pictures, *TEACHER_GIVEN, *options])

    def train(self, *options):
        students_training.main([CATEGORY, *self.folders, *STUDENTS_GIVEN, *options])

    def detect(self, *options, results=None):
        anomaly_detection.main([CATEGORY, *self.folders, "--results", str(results or self.results), *options])

    @property
    def detector(self):
        return self.model / CATEGORY / "detector.pt"


def watch(patched, watched: Watched) -> None:
    """Record every step of Adam, every patch network and how it is made dense; nothing else may happen."""
    step, make, dense = torch.optim.Adam.step, AnomalyNet.__init__, FDFEAnomalyNet.__init__
    distillation = teacher_training.PatchDistillation

    def stepping(adam, *args, **kwargs):
        watched.adam += [
            (group["lr"], group["weight_decay"], group["decoupled_weight_decay"]) for group in adam.param_groups
        ]
        return step(adam, *args, **kwargs)

    def making(net, *args, **kwargs):
        make(net, *args, **kwargs)
        watched.nets.append(net)

    def made_dense(net, inner, stride=1, patch_size=None, padding="zeros"):
        dense(net, inner, stride, patch_size, padding)
        watched.dense.append((stride, padding))

    def distilling(*args, square, **kwargs):
        watched.square.append((args[2], square))
        return distillation(*args, square=square, **kwargs)

    patched.setattr(torch.optim.Adam, "step", stepping)
    patched.setattr(optimiser.Muon, "step", None)
    patched.setattr(AnomalyNet, "__init__", making)
    patched.setattr(FDFEAnomalyNet, "__init__", made_dense)
    patched.setattr(teacher_training, "PatchDistillation", distilling)
    patched.setattr(patch_students, "part", None)  # of an image: a step sees the whole
    patched.setattr(backbone_weights, "adapted_backbone", None)


@pytest.fixture(scope="module")
def done(tmp_path_factory, data):
    """The stages with --paper, and what was noted of stages 2 and 3."""
    place = Place(tmp_path_factory.mktemp("done"), data)
    place.teaching, place.training = Watched(), Watched()
    for watched, stage in ((place.teaching, place.teach), (place.training, lambda: place.train("--paper"))):
        with pytest.MonkeyPatch.context() as patched:
            watch(patched, watched)
            stage()
    place.detect("--paper")
    return place


def test_the_teacher_is_taught_as_published(done):
    assert done.teaching.adam == [(2e-4, 1e-5, False)] * 3  # 3 steps at a constant rate; plain L2, not AdamW's
    assert done.teaching.square == [(17, True)]  # the backbone sees patches as they are
    assert not [layer for net in done.teaching.nets for layer in net.modules() if isinstance(layer, nn.BatchNorm2d)]
    content = checkpoints.load(done.model / "pretrained" / "teacher_17.pt", "teacher")
    state = content["net"]
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert list(state.values())[-1].shape == (128,)
    assert content["paper"] == [
        "backbone weights random (published: imagenet)",
        "batch size 4 (published: 64)",
        "steps 3 (published: 50000)",
    ]
    assert content["settings"]["weights"] == {"distillation": 1, "metric": 0, "compactness": 1}


def test_students_learn_as_published(done, data):
    learned, _ = category.validation_split(10, 0)
    assert done.training.adam == [(1e-4, 1e-5, False)] * (2 * len(learned))  # 2 epochs, an image a step
    assert set(done.training.dense) == {(1, "zeros")}
    assert not [layer for net in done.training.nets for layer in net.modules() if isinstance(layer, nn.BatchNorm2d)]
    scale = load_detector(done.detector).networks.scales[0]
    assert len(scale.students) == 3
    weights = [student.layers[0].weight for student in scale.students]
    assert not torch.equal(weights[0], weights[1])


def visited(net: AnomalyNet, images: torch.Tensor) -> torch.Tensor:
    """Descriptors (N,C,H,W) of uint8 images, patch by patch, zeros around the images; float64."""
    with torch.no_grad():
        return ExtendedAnomalyNet(net.double(), padding="zeros")(preprocessing.normalise(images).double())


def by_hand(scale, images: torch.Tensor, learned: torch.Tensor, validation: torch.Tensor) -> torch.Tensor:
    """Section 3.2 word by word: descriptors, equations (8) to (11)."""
    described = visited(scale.teacher, learned).transpose(0, 1).flatten(1)
    mean, std = described.mean(1), described.std(1, correction=0)

    def error_and_variance(pixels):
        target = (visited(scale.teacher, pixels) - mean[:, None, None]) / std[:, None, None]
        students = torch.stack([visited(student, pixels) for student in scale.students])
        mixture = students.mean(0)
        error = (mixture - target).square().sum(1)
        return error, students.square().sum(2).mean(0) - mixture.square().sum(1)

    return sum(
        (found - reference.mean()) / reference.std(correction=0)
        for found, reference in zip(error_and_variance(images), error_and_variance(validation), strict=True)
    )


def test_the_map_is_the_paper_s_and_the_score_its_maximum(done, data):
    transform = preprocessing.image_transform(SIZE)
    good = AnomalyDataset(data / CATEGORY, transform, type="train", label=0)
    learned, validation = (
        torch.stack([good[index]["image"] for index in part]) for part in category.validation_split(len(good), 0)
    )
    detector = load_detector(done.detector, device_name="cpu", precision="float32")
    path = data / CATEGORY / "test" / "spot" / "000.png"
    picture = Image.open(path).convert("RGB").resize(SIZE[::-1])
    found = detector(picture)
    scale = load_detector(done.detector, device_name="cpu").networks.scales[0]
    expected = by_hand(scale, preprocessing.to_tensor(picture)[None], learned, validation)[0].numpy()
    assert np.abs(found.anomaly_map - expected).max() <= 1e-3 * np.ptp(expected)
    assert found.score == pytest.approx(expected.max(), rel=1e-3)
    assert found.p_value == (1 + int((detector.calibration.scores("maximum") >= found.score).sum())) / 3


def rows(results):
    with (results / CATEGORY / "scores.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_detector_is_the_paper_s_without_the_flag_too(done, tmp_path, capsys):
    done.detect("--precision", "float32", results=tmp_path)
    assert "not trained as published: image size 12 14 (published: 256), epochs 2 (published: 100)" in " ".join(
        capsys.readouterr().out.split()
    )
    assert rows(tmp_path) == rows(done.results)
    assert (tmp_path / CATEGORY / "metrics.json").read_text() == (done.results / CATEGORY / "metrics.json").read_text()
    assert json.loads((tmp_path / CATEGORY / "metrics.json").read_text())["pixel_au_roc"] > 0.5
    assert all(row["p_value"] for row in rows(tmp_path))


def test_another_image_score_is_used_on_request(done, tmp_path):
    done.detect("--paper", "--image-score", "mean", results=tmp_path)
    detector = load_detector(done.detector, precision="float32")
    picture = Image.open(done.data / CATEGORY / "test" / "good" / "000.png").convert("RGB")
    assert float(rows(tmp_path)[0]["image_score"]) == pytest.approx(detector.predict(picture, "mean")[1], rel=1e-5)
    assert rows(tmp_path) != rows(done.results)
    assert load_detector(done.detector, normalisation="place").calibration is None


def test_run_again_nothing_is_trained_again_and_without_the_flag_it_is_another_model(done, capsys):
    before = done.detector.stat().st_mtime_ns
    done.teach()
    done.train("--paper")
    assert done.detector.stat().st_mtime_ns == before
    assert capsys.readouterr().out.count("trained already") == 2
    same = [
        "--optimiser",
        "adam",
        "--learning-rate",
        "1e-4",
        "--batch-size",
        "1",
        "--stride",
        "1",
        "--precision",
        "float32",
    ]
    with pytest.raises(UserError, match=r"students_17\.pt was trained with --paper True, not None.*--restart"):
        done.train("--teacher", "patches", *same)
    with pytest.raises(UserError, match=r"students_17\.pt was trained with students 3, not 2"):
        done.train("--paper", "--students", "2")


class StoppedTraining(loop.Training):
    """Gets Ctrl-C in its second step."""

    def report(self, loss, **parts):
        super().report(loss, **parts)
        if self.step == 1:
            signal.raise_signal(signal.SIGINT)


def test_a_stopped_training_goes_on_to_the_same_numbers(done, tmp_path, monkeypatch):
    place = Place(tmp_path, done.data)
    for stage, name in (
        (place.teach, "pretrained/teacher_17.pt"),
        (lambda: place.train("--paper"), f"{CATEGORY}/students_17.pt"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(loop, "Training", StoppedTraining)
            with pytest.raises(KeyboardInterrupt):
                stage()
        assert not (place.model / name).exists()
        stage()
    found, expected = (checkpoints.load(p.detector, "detector")["scales"][0]["state"] for p in (place, done))
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_teacher_trained_otherwise_is_used_on_request(data, tmp_path, monkeypatch):
    monkeypatch.setattr(patch_students, "ROOT", tmp_path / "nowhere")
    place = Place(tmp_path, data)
    teacher_training.main([CATEGORY, *place.folders, "--distillation", "patches", *TEACHER_GIVEN])
    with pytest.raises(
        UserError, match=r"no teacher of 17 pixels was trained as in the paper: run teacher_training\.py"
    ):
        place.train("--paper")
    place.train("--paper", "--teacher", "patches", "--epochs", "0.2", "--students", "1")
    detector = load_detector(place.detector)
    assert detector.paper[0] == "teacher patches (published: taught with --paper)"
    assert detector.networks.scales[0].teacher.descriptor_size == 512
    assert detector.image_score == "maximum"


def test_a_detector_trained_otherwise_is_refused(done, tmp_path):
    place = Place(tmp_path, done.data)
    place.teach()
    place.train("--teacher", "patches", "--epochs", "0.2", "--students", "1")
    with pytest.raises(
        UserError, match=r"detector\.pt was not trained with --paper: run students_training\.py knit --p"
    ):
        place.detect("--paper")
    detector = load_detector(place.detector)
    assert detector.paper is None
    assert detector.image_score == "top"


def test_pictures_of_the_category_do_not_stand_for_imagenet(data, tmp_path):
    with pytest.raises(UserError, match="--paper: the paper trains teachers on ImageNet"):
        teacher_training.main([CATEGORY, *Place(tmp_path, data).folders, "--paper", *TEACHER_GIVEN])
