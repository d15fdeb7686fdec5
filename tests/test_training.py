import signal
from argparse import ArgumentParser
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import pytest
import torch
from torch import nn
from torchvision.models import ResNet18_Weights, resnet18

import teacher_training
from AnomalyResnet18 import AnomalyResnet18
from student_teacher.images import category
from student_teacher.runtime import checkpoints, command_line, device
from student_teacher.runtime.errors import UserError
from student_teacher.runtime.settings import Stage
from student_teacher.teachers import backbone_weights, backbones
from student_teacher.training import loop
from student_teacher.training.loop import Model, Training, learning_rate, shuffled_batches

# training: learning rate


@pytest.mark.parametrize("steps", [1, 2, 7, 100, 10_000])
def test_the_learning_rate_rises_to_its_peak_and_falls_towards_0(steps):
    rates = [learning_rate(step, steps, 0.4) for step in range(steps)]
    top = rates.index(max(rates))
    assert all(a < b for a, b in pairwise(rates[: top + 1]))
    assert all(a > b for a, b in pairwise(rates[top:]))
    assert min(rates) > 0
    assert max(rates) <= 0.4
    if steps >= 100:
        assert top == 0.05 * steps
        assert max(rates) == pytest.approx(0.4)
        assert rates[-1] < 0.001


def test_the_learning_rate_is_linear_then_half_a_cosine():
    assert [learning_rate(step, 100, 1.2, warm_up=0.05) for step in range(6)] == pytest.approx(
        [0.2, 0.4, 0.6, 0.8, 1, 1.2]
    )
    quarter, half = (learning_rate(step, 110, 1, warm_up=0.1) for step in (11 + 33, 11 + 66))
    assert (quarter, half) == pytest.approx((0.75, 0.25))


def test_all_groups_of_an_optimiser_take_the_learning_rate():
    layers = nn.Linear(2, 2), nn.Linear(2, 2)
    adam = torch.optim.Adam([{"params": layers[0].parameters()}, {"params": layers[1].parameters(), "lr": 3.0}], 1.0)
    loop.set_learning_rate(adam, 0.5)
    assert [group["lr"] for group in adam.param_groups] == [0.5, 0.5]


# training: the loop

SETTINGS = {"seed": 0, "batch_size": 4}


class Job:
    """A small training that depends on the optimiser's state."""

    def __init__(self, path, settings=SETTINGS, steps=6, category="carpet"):
        torch.manual_seed(0)
        self.net = nn.Linear(3, 1)
        self.adam = torch.optim.Adam(self.net.parameters(), 0.1)
        parts = {"net": self.net, "adam": self.adam}
        self.training = Training(Model(path, "net", category, settings), "net training", parts, steps)
        self.visited = []

    def run(self, after=lambda step: None):
        for step in self.training:
            self.visited.append(step)
            inputs = torch.randn(8, 3, generator=device.generator(step))
            loss = (self.net(inputs) - inputs[:, :1]).square().mean()
            self.adam.zero_grad()
            loss.backward()
            self.adam.step()
            self.training.report(loss.item(), part=1.0)
            after(step)
        return self

    def run_stopped(self, at, number=signal.SIGINT):
        with pytest.raises(KeyboardInterrupt):
            self.run(lambda step: step == at and signal.raise_signal(number))
        return self


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_training_goes_on_as_if_it_had_not_been(tmp_path, number):
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    whole = Job(tmp_path / "whole.pt").run()
    stopped = Job(tmp_path / "net.pt").run_stopped(2, number)
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    resumed = Job(tmp_path / "net.pt").run()
    assert (stopped.visited, resumed.visited) == ([0, 1, 2], [3, 4, 5])
    assert torch.equal(resumed.net.weight, whole.net.weight)
    assert resumed.training.history == whole.training.history
    steps, curves = resumed.training.curve("loss")
    assert steps == [1, 2, 3, 4, 5, 6]
    assert curves == {"loss": [loss for _, loss in whole.training.history]}


def test_a_second_signal_stops_a_training_at_once(tmp_path):
    job = Job(tmp_path / "net.pt")

    def twice(step):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("went on")

    with pytest.raises(KeyboardInterrupt):
        job.run(twice)
    assert not loop.checkpoint_of(tmp_path / "net.pt").exists()


def test_a_checkpoint_is_written_now_and_then_and_removed_at_the_end(tmp_path, monkeypatch):
    checkpoint = loop.checkpoint_of(tmp_path / "net.pt")
    clock = iter(range(0, 10**6, 25))  # seconds: a minute has passed after every third step
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    found = []
    job = Job(tmp_path / "net.pt", steps=8)
    job.run(lambda step: found.append(checkpoints.load(checkpoint, "net training")["step"] if step > 2 else 0))
    assert found == [0, 0, 0, 3, 3, 3, 6, 6]
    job.training.finish()
    assert not checkpoint.exists()
    job.training.finish()  # a training too short for a checkpoint has none to remove


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"seed": 0, "batch_size": 8}, "batch size 4, not 8"),
        ({"seed": 0}, "batch size 4, not None"),
        (SETTINGS | {"new": 1}, "new None, not 1"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused_unless_restarted(tmp_path, changed, said):
    path = tmp_path / "net.pt"
    Job(path).run_stopped(2)
    before = loop.checkpoint_of(path).read_bytes()
    with pytest.raises(UserError, match=rf"net\.checkpoint\.pt was trained with {said}: .*--restart"):
        Job(path, changed)
    assert loop.checkpoint_of(path).read_bytes() == before
    loop.forget([path])
    assert Job(path, changed).run().visited == [0, 1, 2, 3, 4, 5]


def test_a_checkpoint_of_another_category_is_refused(tmp_path):
    Job(tmp_path / "net.pt").run_stopped(0)
    with pytest.raises(UserError, match="category carpet, not wood"):
        Job(tmp_path / "net.pt", category="wood")


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_not_a_number_ends_the_training_with_advice(tmp_path, loss):
    net_training = Training(Model(tmp_path / "net.pt", "net", "carpet", SETTINGS), "net training", {}, 5)
    with pytest.raises(UserError, match=rf"the loss is {loss} at step 3: lower --learning-rate"):
        for step in net_training:
            net_training.report(loss if step == 2 else 0.5)
    assert net_training.history == [(1, 0.5), (2, 0.5)]


def test_a_finished_model_is_not_trained_again(tmp_path, capsys):
    path = tmp_path / "net.pt"
    ask = path, "net", "carpet", SETTINGS
    assert not Model(*ask).is_trained()
    checkpoints.save(path, "net", "carpet", {"settings": SETTINGS})
    assert Model(*ask).is_trained()
    assert f"{path} is trained already" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"net\.pt was trained with seed 0, not 1"):
        Model(path, "net", "carpet", SETTINGS | {"seed": 1}).is_trained()
    with pytest.raises(UserError, match="kind net, not other"):
        Model(path, "other", "carpet", SETTINGS).is_trained()


def test_a_kill_between_model_and_curve_leaves_nothing_out(tmp_path, monkeypatch):
    path = tmp_path / "net.pt"
    model = Model(path, "net", "carpet", SETTINGS)
    training = Training(Model(path, "net", "carpet", SETTINGS), "net training", {}, 2)
    for step in training:
        training.report(1.0 / (step + 1))
    training.save()
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(training, "finish", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        model.save({}, training)
    curve = {path.with_name(f"net_training.{ending}") for ending in ("csv", "png", "svg")}
    assert set(tmp_path.iterdir()) == curve | {path, loop.checkpoint_of(path)}
    assert model.is_trained()
    assert set(tmp_path.iterdir()) == curve | {path}
    path.unlink()
    for file in curve:
        file.unlink()
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(loop.checkpoints, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        model.save({}, training)
    assert set(tmp_path.iterdir()) == curve  # and is not trained


def test_forgotten_models_are_trained_again(tmp_path):
    paths = [tmp_path / name for name in ("net.pt", "other.pt")]
    for path in paths:
        checkpoints.save(path, "net", "carpet", {"settings": SETTINGS})
        Job(path).run_stopped(1)
    loop.forget(paths)
    assert not any(tmp_path.iterdir())
    assert not Model(paths[1], "net", "carpet", SETTINGS).is_trained()


# stages


@pytest.mark.parametrize(("number", "left_out"), [(2, 1), (10, 2), (30, 7), (80, 20), (762, 76)])
def test_validation_images_are_not_trained_on(number, left_out):
    learned, kept = category.validation_split(number, seed=0)
    assert len(kept) == left_out
    assert sorted(learned + kept) == list(range(number))
    assert (learned, kept) == category.validation_split(number, seed=0)
    assert learned == sorted(learned)
    assert number == 2 or kept != category.validation_split(number, seed=1)[1]


def read_size(*texts, kind=Stage):
    return kind.parse("", ["carpet", *(["--image-size", *texts] if texts else [])]).size


def test_image_size_is_one_number_two_or_native():
    assert read_size() == (256, 256)
    assert read_size("128") == (128, 128)
    assert read_size("8", "300") == (8, 300)
    assert read_size("native") is None
    assert read_size(kind=teacher_training.Settings) is None
    assert Stage(category="carpet", image_size=(48, 48)).identity()["image_size"] == [48]


@pytest.mark.parametrize("text", ["7", "0", "-64", "64.5", "big", "", "Native", "9" * 5000])
def test_a_bad_image_size_is_refused(text, capsys):
    with pytest.raises(SystemExit) as error:
        read_size("64", text)
    assert error.value.code == 2
    assert "--image-size" in capsys.readouterr().err


@pytest.mark.parametrize("texts", [("64", "64", "64"), ("native", "64"), ("64", "native"), ("native", "native")])
def test_several_image_sizes_that_do_not_fit_are_refused(texts):
    with pytest.raises(UserError, match="--image-size takes one number, or height and width, or the word native"):
        read_size(*texts)


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (command_line.positive, {"1": 1, "20": 20}, ("0", "-1", "1.5", "x", "")),
        (command_line.positive_real, {"1e-3": 0.001, "2": 2.0}, ("0", "-1", "nan", "inf", "x")),
        (command_line.not_negative, {"0": 0.0, "0.5": 0.5}, ("-0.1", "nan", "inf", "x")),
    ],
)
def test_numbers_out_of_range_are_refused(kind, good, bad, capsys):
    parser = ArgumentParser()
    parser.add_argument("--x", type=kind)
    assert {text: parser.parse_args([f"--x={text}"]).x for text in good} == good
    for text in bad:
        with pytest.raises(SystemExit):
            parser.parse_args([f"--x={text}"])
        assert f"{text}: must be a" in capsys.readouterr().err


def test_every_pass_visits_every_image_once_in_an_order_of_its_own():
    indices = [3, 5, 7, 11, 13, 17, 19]
    batches = shuffled_batches(indices, 3, 4, seed=0)
    assert [len(batch) for batch in batches] == [3, 3, 1] * 4
    passes = [[*a, *b, *c] for a, b, c in zip(*[iter(batches)] * 3, strict=True)]
    assert all(sorted(order) == indices for order in passes)
    assert len(set(map(tuple, passes))) == 4
    assert shuffled_batches(indices, 3, 2, seed=0) == batches[:6]
    assert shuffled_batches(indices, 3, 1.7, seed=0) == batches[:5]
    assert shuffled_batches(indices, 3, 0.01, seed=0) == batches[:1]
    assert shuffled_batches(indices, 3, 4, seed=1) != batches


def test_the_digest_tells_other_images_apart_wherever_they_lie(tmp_path):
    def files(folder, **sizes):
        paths = [tmp_path / folder / name for name in sizes]
        for path, size in zip(paths, sizes.values(), strict=True):
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"x" * size)
        return category.digest_of(paths)

    digest = files("a", one=3, two=4)
    assert digest == files("b", one=3, two=4)
    assert len({digest, files("c", one=3, two=5), files("d", one=3, zwei=4), files("e", one=3)}) == 4


def test_other_images_are_told_by_what_came_and_went(tmp_path):
    files = {"a.png": "1", "b.png": "2"}
    settings = {"images": "x", "image_files": files, "seed": 0}
    loop.require_same_settings(tmp_path, {"images": "x", "seed": 0}, settings)  # an older model names no files
    with pytest.raises(UserError, match=r"other images \(1 came: b\.png; 1 changed: a\.png\): add --restart"):
        loop.require_same_settings(tmp_path, settings | {"image_files": {"a.png": "3"}, "images": "y"}, settings)
    with pytest.raises(UserError, match="other images or another value range: add --restart"):
        loop.require_same_settings(tmp_path, settings | {"images": "x (0, 4095)"}, settings)


def test_pictures_in_a_folder_and_below_are_found_sorted(tmp_path):
    for name in ("b.PNG", "a/c.jpg", "a/.hidden.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert category.pictures_in(tmp_path) == [tmp_path / "a/c.jpg", tmp_path / "b.PNG"]


# device


@pytest.mark.parametrize("name", ["nonsense", "", "cpu:x", "cuda:999"])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(UserError, match=f"--device {name} is not available"):
        device.choose(name)


@pytest.mark.parametrize("name", ["mps", "mps:0", "xpu", "hpu", "meta"])
def test_other_kinds_of_devices_are_refused_where_they_are_there_too(name, monkeypatch):
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: torch.ones(1))  # as on a machine that has one
    with pytest.raises(UserError, match=f"--device {name} is not available here: only CPUs and GPUs"):
        device.choose(name)


def test_auto_takes_a_gpu_where_there_is_one(monkeypatch):
    assert device.choose("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.choose("auto") == torch.device("cpu")


@pytest.mark.parametrize(
    ("precision", "faster", "expected"),
    [
        ("float32", True, torch.float32),
        ("bfloat16", False, torch.bfloat16),
        ("auto", True, torch.bfloat16),
        ("auto", False, torch.float32),
    ],
)
def test_networks_compute_in_the_precision_asked_for(monkeypatch, precision, faster, expected):
    monkeypatch.setattr(device, "computes_bfloat16_faster", lambda _: faster)
    net = nn.Linear(2, 2)
    with device.autocast(torch.device("cpu"), precision):
        assert net(torch.ones(1, 2)).dtype == expected
    assert net.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("found", "faster", "layout"),
    [
        ({"amx_bf16": True, "avx512_bf16": True, "avx512_f": True, "cpu_name": "Intel Xeon"}, True, "channels_last"),
        ({"amx_bf16": False, "avx512_bf16": True, "avx512_f": True, "cpu_name": "Intel Xeon"}, False, "channels_last"),
        ({"avx512_bf16": True, "avx512_f": True, "cpu_name": "AMD EPYC 9R14"}, True, "channels_last"),
        ({"avx512_bf16": True, "avx512_f": True}, True, "channels_last"),
        ({"avx512_f": False, "avx2": True, "cpu_name": "AMD EPYC 7R13"}, False, "contiguous_format"),
        ({}, False, "contiguous_format"),
    ],
)
def test_auto_takes_precision_and_layout_by_what_the_cpu_computes_fast(monkeypatch, found, faster, layout):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    assert device.computes_bfloat16_faster(torch.device("cpu")) == faster
    assert device.memory_format(torch.device("cpu")) == getattr(torch, layout)


def test_seeds_differ_wherever_their_parts_do_and_are_the_same_everywhere():
    parts = [(0,), (1,), (0, 1), (1, 0), (0, "1"), ("0", 1), (0, "order", 1), (0, "patch", 1), (-1,), (10, 1), (1, 101)]
    seeds = [device.seed_of(*each) for each in parts]
    assert len(set(seeds)) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert device.seed_of(0, "order", 1) == 1332101017241992705  # else no checkpoint could go on
    draws = [torch.rand(3, generator=device.generator(*each)) for each in ((0, "a"), (0, "a"), (0, "b"))]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


# AnomalyResnet18, backbones, backbone_weights


@pytest.fixture(scope="module")
def torchvisions():
    torch.manual_seed(1)
    return resnet18(num_classes=7).eval()


def test_features_are_torchvisions_pooled_ones(torchvisions):
    net = AnomalyResnet18().eval()
    head = net.head.weight.clone()
    net.load_torchvision(torchvisions.state_dict())
    images = torch.randn(2, 3, 40, 33, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        features = net.features(images)
        assert features.shape == (2, 512)
        torch.testing.assert_close(torchvisions.fc(features), torchvisions(images))
        assert net(images).shape == (2, 2)
        torch.testing.assert_close(net(images), net.head(features))
    assert torch.equal(net.head.weight, head)  # theirs tells other classes


def test_patches_are_brought_to_the_backbones_size_in_one_range():
    class Seen(backbones.Backbone):
        def pooled(self, pictures):
            self.pictures = pictures
            return pictures.mean((2, 3))

    net = Seen()
    patches = torch.linspace(-2, 1, 17).expand(2, 3, 17, 17).clone().requires_grad_()
    assert not net.of_patches(patches, 17).requires_grad
    assert torch.equal(net.pictures, patches)
    net.of_patches(patches, 64)
    assert net.pictures.shape == (2, 3, 64, 64)
    torch.testing.assert_close(net.pictures[..., 31:33, :].mean((2, 3)), patches.mean((2, 3)))
    assert (net.pictures.min(), net.pictures.max()) == (-2, 1)
    assert (net.pictures.diff(dim=3) >= 0).all()


def spoiled(state, name):
    state = dict(state)
    if name == "missing":
        del state["layer4.1.bn2.weight"]
    elif name == "more":
        state["layer5.weight"] = torch.zeros(1)
    else:
        state["conv1.weight"] = torch.zeros(64, 1, 7, 7)
    return state


@pytest.mark.parametrize("name", ["missing", "more", "shape"])
def test_other_state_dicts_are_refused(torchvisions, tmp_path, name):
    state = spoiled(torchvisions.state_dict(), name)
    with pytest.raises(RuntimeError):
        AnomalyResnet18().load_torchvision(state)
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"weights\.pth is not a state dict of torchvision's resnet18"):
        backbone_weights.load(str(tmp_path / "weights.pth"))


def test_weights_come_from_a_file_or_are_random(torchvisions, tmp_path):
    torch.save(torchvisions.state_dict(), tmp_path / "weights.pth")
    state = backbone_weights.load(str(tmp_path / "weights.pth"))
    assert torch.equal(state["conv1.weight"], torchvisions.conv1.weight)
    assert backbone_weights.load("random") is None


@pytest.mark.parametrize("content", [b"", b"hello world\n", b"<!DOCTYPE html>", b"\x80\x02.", b"\x80\x02]q\x00X\x05"])
def test_files_that_are_not_weights_are_refused(tmp_path, content):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is not a state dict"):
        backbone_weights.load(str(path))


def test_a_mistyped_source_and_a_folder_are_refused(tmp_path):
    for source in (str(tmp_path / "imagnet"), str(tmp_path)):
        with pytest.raises(UserError, match="give imagenet, random or a file"):
            backbone_weights.load(source)


def test_without_a_network_the_ways_out_are_named(monkeypatch):
    def unreachable(*_, **__):
        raise URLError("no route")

    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", unreachable)
    with pytest.raises(UserError, match=r"\(no route\).*--backbone-weights FILE.*--backbone-weights random"):
        backbone_weights.load("imagenet")


def test_the_checkpoint_lies_beside_the_model():
    assert loop.checkpoint_of(Path("model/carpet/teacher_17.pt")) == Path("model/carpet/teacher_17.checkpoint.pt")
