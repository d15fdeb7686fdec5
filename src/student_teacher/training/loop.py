"""The training loop that all stages share: progress bar, checkpoints, interruption and resuming."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from student_teacher.images.folders import changes
from student_teacher.reports import figures
from student_teacher.runtime import checkpoints, device, distributed
from student_teacher.runtime.errors import UserError
from student_teacher.runtime.files import make_folder, write_atomically
from student_teacher.runtime.stopping import stops_later

SECONDS_BETWEEN_CHECKPOINTS = 60


class Training:
    """Counts the steps of a training and shows its loss. Saves a checkpoint each minute and at Ctrl-C, to resume from.

        training = Training(model, "students' training", {"students": net, "adam": adam}, steps)
        for step in training:
            ...
            training.report(loss)

    The checkpoint lies beside the model's file. `parts` are saved and restored by their `state_dict` and
    `load_state_dict`. Raises UserError if there is a checkpoint with other `settings`, and names them. `history` is a
    list of (step, loss), for the training curve.
    """

    def __init__(self, model: "Model", kind: str, parts: Mapping[str, Any], steps: int):
        self._path, self._kind, self._category = checkpoint_of(model.path), kind, model.category
        self._settings, self._parts, self.steps = dict(model.settings), parts, steps
        self.step = 0
        self.history: list[tuple[int, float]] = []
        self._losses: list[float] = []
        self._notes: dict[str, str] = {}
        if self._path.exists():
            content = checkpoints.load(self._path, kind, category=model.category)
            require_same_settings(self._path, content["settings"], self._settings)
            try:
                for name, part in parts.items():
                    part.load_state_dict(content["parts"][name])
            except checkpoints.BROKEN as error:
                raise UserError(f"{self._path} was written by another version: add --restart to train again") from error
            self.step = content["step"]
            self.history = [tuple(entry) for entry in content["history"]]
        if len(set(distributed.gathered(self.step))) > 1:
            raise UserError(f"{self._path} is not the same for all processes: all machines need the same model folder")

    def __iter__(self) -> Iterator[int]:
        saved = time.monotonic()
        bar = tqdm(total=self.steps, initial=self.step, desc=self._kind, unit=" steps", dynamic_ncols=True)
        with stops_later() as stopped, bar:
            self._bar = bar
            while self.step < self.steps:
                yield self.step
                self.step += 1
                bar.update()
                due = time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS
                stop_now, due = distributed.any_of(stopped(), due)
                if stop_now or due:
                    self.save()
                    saved = time.monotonic()
                if stop_now:
                    raise KeyboardInterrupt

    def note(self, **figures: float) -> None:
        """Show figures beside the loss until they are replaced."""
        self._notes |= {name: f"{value:.4g}" for name, value in figures.items()}

    def report(self, loss: float, **parts: float) -> None:
        """Show the loss of this step, smoothed, and its parts. Raises UserError if it is not finite."""
        if not math.isfinite(loss):
            raise UserError(f"the loss is {loss} at step {self.step + 1}: lower --learning-rate and --restart")
        self._losses = [*self._losses[-19:], loss]
        self.note(**parts)
        self._bar.set_postfix({"loss": f"{sum(self._losses) / len(self._losses):.4g}"} | self._notes, refresh=False)
        self.history.append((self.step + 1, loss))

    def save(self) -> None:
        """Write the checkpoint from which the same command resumes."""
        parts = {name: part.state_dict() for name, part in self._parts.items()}
        content = {"settings": self._settings, "parts": parts, "step": self.step, "history": self.history}
        checkpoints.save(self._path, self._kind, self._category, content)

    def curve(self, name: str) -> tuple[list[int], dict[str, list[float]]]:
        """Steps and losses, as figures.save_training_curve takes them."""
        return [step for step, _ in self.history], {name: [loss for _, loss in self.history]}

    def finish(self) -> None:
        """Remove the checkpoint, once the model is saved."""
        self._path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Model:
    """The file of a model that is trained step by step, and the settings of its training.

    Attributes:
        path: the file; its checkpoint and its training curve lie beside it.
        kind: the kind of checkpoint.
        category: the category that the model is for.
        settings: everything that the training depends on; a file with other settings is refused.
    """

    path: Path
    kind: str
    category: str
    settings: Mapping[str, Any]

    def is_trained(self) -> bool:
        """Whether the finished model exists; if so, prints a line. Raises UserError if it has other settings."""
        there = distributed.gathered(self.path.exists())
        if any(there) and not all(there):
            raise UserError(f"{self.path} is not there for all processes: all machines need the same model folder")
        if not any(there):
            return False
        content = checkpoints.load(self.path, self.kind, category=self.category)
        require_same_settings(self.path, content["settings"], self.settings)
        if distributed.is_first():  # a kill may have come before it was removed
            checkpoint_of(self.path).unlink(missing_ok=True)
        print(f"{self.path} is trained already; --restart trains it again")
        return True

    def training(self, title: str, parts: Mapping[str, Any], steps: int) -> Training:
        """Its training, from the start or from its checkpoint. Raises UserError if its folder can't be written into."""
        make_folder(self.path.parent)
        return Training(self, title, parts, steps)

    def save(self, content: Mapping[str, Any], training: Training, loss: str = "loss") -> None:
        """Write the model and its training curve, labelled `loss`, as picture and CSV; remove the checkpoint."""
        if distributed.is_first():  # before the model: once that is there, the training counts as done
            picture = self.path.with_name(f"{self.path.stem}_training.png")
            figures.save_training_curve(picture, *training.curve(loss))
            table = "".join(f"{step},{value}\n" for step, value in training.history)
            write_atomically(picture.with_suffix(".csv"), f"step,loss\n{table}")
        checkpoints.save(self.path, self.kind, self.category, {"settings": self.settings, **content})
        training.finish()
        print(f"saved {self.path}")


class FinishedParts:
    """The parts of a model whose training is done. They are kept in its checkpoint, to go on from after a stop.

    Raises UserError if there is a checkpoint with other settings than those of the `model`, and names them.
    """

    def __init__(self, model: Model):
        self._model, self._path = model, checkpoint_of(model.path)
        self._parts: dict[str, Any] = {}
        if self._path.exists():
            content = checkpoints.load(self._path, model.kind, category=model.category)
            require_same_settings(self._path, content["settings"], model.settings)
            self._parts = content["parts"]
        self._parts = distributed.gathered(self._parts)[0]  # all processes must go on from the same place

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        """The part of this name. If it is missing, `make` returns it, as tensors and numbers, and it is kept."""
        if name not in self._parts:
            self._parts[name] = make()
            content = {"settings": dict(self._model.settings), "parts": self._parts}
            checkpoints.save(self._path, self._model.kind, self._model.category, content)
        return self._parts[name]

    def finish(self) -> None:
        """Remove the checkpoint, once the model is saved."""
        self._path.unlink(missing_ok=True)


def checkpoint_of(path: Path) -> Path:
    """The path of a model's checkpoint during training."""
    return path.with_suffix(".checkpoint.pt")


def require_same_settings(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise UserError, naming the first setting that differs, unless `found`, those of `path`, equal `wanted`."""
    for name in sorted((found.keys() | wanted.keys()) - {"image_files"}):  # those say which images differ
        if found.get(name) != wanted.get(name) and name == "images":
            files = found.get("image_files"), wanted.get("image_files")
            change = f" ({changes(*files)})" if all(files) and files[0] != files[1] else " or another value range"
            raise UserError(f"{path} was trained with other images{change}: add --restart to train again")
        if found.get(name) != wanted.get(name) and name == "ignored":
            raise UserError(
                f"{path} was trained with {'other' if name in found else 'no'} regions to ignore: repeat the original "
                "command (the file of --ignore, or data/CATEGORY/ignore.png), or add --restart to train again"
            )
        if found.get(name) != wanted.get(name):
            raise UserError(
                f"{path} was trained with {name.replace('_', ' ')} {found.get(name)}, not {wanted.get(name)}: "
                "repeat the original command, or add --restart to train again"
            )


def forget(paths: Iterable[Path]) -> None:
    """Remove models and their checkpoints: all that will be trained again, so that after a stop none is left out."""
    for path in paths:
        for file in (path, checkpoint_of(path)):
            file.unlink(missing_ok=True)


def learning_rate(step: int, steps: int, peak: float = 1.0, warm_up: float = 0.05) -> float:
    """Learning rate of a step: linear rise to `peak` over a fraction `warm_up` of the steps, then a cosine to 0."""
    rise = max(1.0, warm_up * steps)
    if step < rise:
        return peak * (step + 1) / (rise + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1.0, steps - rise)))


def constant(step: int, steps: int) -> float:
    """The fraction of the learning rate in each step: 1."""
    return 1.0


SCHEDULES = {"cosine": learning_rate, "constant": constant}  # (step, steps) -> fraction of the learning rate


def set_learning_rate(optimiser: torch.optim.Optimizer, value: float) -> None:
    """Set the learning rate of all of an optimiser's parameter groups."""
    for group in optimiser.param_groups:
        group["lr"] = value


def evenly_spread(indices: list[int], number: int) -> list[int]:
    """At most `number` of the indices, evenly spread."""
    places = np.linspace(0, len(indices) - 1, min(number, len(indices))).round().astype(int)
    return [indices[place] for place in places]


def shuffled_batches(indices: list[int], batch_size: int, epochs: float, seed: int) -> list[list[int]]:
    """The batches of all epochs, each in its own random order; at least one batch. `epochs` may be fractional."""
    batches = []
    for epoch in range(math.ceil(epochs)):
        order = np.random.default_rng(device.seed_of(seed, "order", epoch)).permutation(indices).tolist()
        batches += [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return batches[: max(1, round(epochs * math.ceil(len(indices) / batch_size)))]
