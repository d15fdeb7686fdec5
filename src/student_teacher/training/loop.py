"""The loop that all trainings share: progress bar, checkpoints, a stop at any moment, going on."""

import math
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from student_teacher.images.folders import changes
from student_teacher.runtime import checkpoints, device, distributed
from student_teacher.runtime.errors import UserError

SECONDS_BETWEEN_CHECKPOINTS = 60


class Training:
    """Counts the steps of a training, shows its loss, saves it each minute and at Ctrl-C, and goes on from there.

        training = Training(path, "students' training", category, settings, {"students": net, "adam": adam}, steps)
        for step in training:
            ...
            training.report(loss)

    `path` is the model's; the checkpoint lies beside it. `parts` are what `state_dict` and `load_state_dict` save and
    restore. A checkpoint made with other `settings` is refused by a UserError that names them. `history` holds (step,
    loss) for the picture of the training.
    """

    def __init__(
        self,
        path: Path,
        kind: str,
        category: str,
        settings: Mapping[str, Any],
        parts: Mapping[str, Any],
        steps: int,
    ):
        self._path, self._kind, self._category = checkpoint_of(path), kind, category
        self._settings, self._parts, self.steps = dict(settings), parts, steps
        self.step = 0
        self.history: list[tuple[int, float]] = []
        self._losses: list[float] = []
        self._notes: dict[str, str] = {}
        if self._path.exists():
            content = checkpoints.load(self._path, kind, category=category)
            require_same_settings(self._path, content["settings"], self._settings)
            for name, part in parts.items():
                part.load_state_dict(content["parts"][name])
            self.step = content["step"]
            self.history = [tuple(entry) for entry in content["history"]]
        if len(set(distributed.gathered(self.step))) > 1:
            raise UserError(f"{self._path} is not the same for all processes: all machines need the same model folder")

    def __iter__(self) -> Iterator[int]:
        stopped: list[int] = []

        def stop(number, _):
            # Asked twice: at once, from the checkpoint of the last minute. torchrun asks twice each time.
            if stopped and not distributed.active():
                raise KeyboardInterrupt
            stopped.append(number)

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        saved = time.monotonic()
        try:
            with tqdm(total=self.steps, initial=self.step, desc=self._kind, unit=" steps", dynamic_ncols=True) as bar:
                self._bar = bar
                while self.step < self.steps:
                    yield self.step
                    self.step += 1
                    bar.update()
                    due = time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS
                    stop_now, due = distributed.any_of(bool(stopped), due)
                    if stop_now or due:
                        self.save()
                        saved = time.monotonic()
                    if stop_now:
                        raise KeyboardInterrupt
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def note(self, **figures: float) -> None:
        """Show figures beside the loss until newer ones come."""
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
        """Write the checkpoint from which the same command goes on."""
        parts = {name: part.state_dict() for name, part in self._parts.items()}
        content = {"settings": self._settings, "parts": parts, "step": self.step, "history": self.history}
        checkpoints.save(self._path, self._kind, self._category, content)

    def curve(self, name: str) -> tuple[list[int], dict[str, list[float]]]:
        """Steps and losses, as figures.save_training_curve takes them."""
        return [step for step, _ in self.history], {name: [loss for _, loss in self.history]}

    def finish(self) -> None:
        """Remove the checkpoint: what was trained has been saved as a model."""
        self._path.unlink(missing_ok=True)


def checkpoint_of(path: Path) -> Path:
    """Where the training of a model keeps its checkpoint."""
    return path.with_suffix(".checkpoint.pt")


def require_same_settings(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise UserError, naming the first that differs, unless `path` was made with the settings that are wanted."""
    for name in sorted((found.keys() | wanted.keys()) - {"image_files"}):  # those say which images differ
        if found.get(name) != wanted.get(name) and name == "images":
            files = found.get("image_files"), wanted.get("image_files")
            change = f" ({changes(*files)})" if all(files) and files[0] != files[1] else " or another value range"
            raise UserError(f"{path} was trained with other images{change}: add --restart to train again")
        if found.get(name) != wanted.get(name):
            raise UserError(
                f"{path} was trained with {name.replace('_', ' ')} {found.get(name)}, not {wanted.get(name)}: "
                "repeat the command as it was, or add --restart to train anew"
            )


def forget(paths: Iterable[Path]) -> None:
    """Remove models and their checkpoints, all that are to be trained anew: so a stop between them loses none."""
    for path in paths:
        for file in (path, checkpoint_of(path)):
            file.unlink(missing_ok=True)


def already_trained(path: Path, kind: str, category: str, settings: Mapping[str, Any]) -> bool:
    """Whether `path` holds the finished model of these settings; says so. Raises UserError if of others."""
    if not path.exists():
        return False
    require_same_settings(path, checkpoints.load(path, kind, category=category)["settings"], settings)
    print(f"{path} is trained already; --restart trains it anew")
    return True


def learning_rate(step: int, steps: int, peak: float = 1.0, warm_up: float = 0.05) -> float:
    """Learning rate of a step: linear rise to `peak` over a share `warm_up` of all steps, then half a cosine to 0."""
    rise = max(1.0, warm_up * steps)
    if step < rise:
        return peak * (step + 1) / (rise + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1.0, steps - rise)))


def constant(step: int, steps: int) -> float:
    """The share of the learning rate in each step: all of it."""
    return 1.0


SCHEDULES = {"cosine": learning_rate, "constant": constant}  # step and steps -> share of the learning rate


def set_learning_rate(optimiser: torch.optim.Optimizer, value: float) -> None:
    """Let all of an optimiser's groups go on with this learning rate."""
    for group in optimiser.param_groups:
        group["lr"] = value


def shuffled_batches(indices: list[int], batch_size: int, epochs: float, seed: int) -> list[list[int]]:
    """The batches of all passes over `indices`, each pass in an order of its own; one batch at least."""
    batches = []
    for epoch in range(math.ceil(epochs)):
        order = np.random.default_rng(device.seed_of(seed, "order", epoch)).permutation(indices).tolist()
        batches += [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return batches[: max(1, round(epochs * math.ceil(len(indices) / batch_size)))]
