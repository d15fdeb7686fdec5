"""A step of a teacher's training: the losses of section 3.1 of "Uninformed Students"."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from AnomalyNet import AnomalyNet
from student_teacher.images.pictures import Pictures
from student_teacher.runtime import device, distributed
from student_teacher.runtime.command_line import not_negative
from student_teacher.runtime.running_moments import RunningMoments
from student_teacher.runtime.settings import TrainingStage, batch_size_option, option
from student_teacher.training import losses
from student_teacher.training.distillation import Batch, Distillation

BATCHES_MEASURED = 12  # for the features' mean and std, and for the validation


def weight_option(default: float | None, help: str) -> Any:
    """A field for the weight of a loss."""
    return option(default, help, type=not_negative, metavar="X")


@dataclass(frozen=True, kw_only=True)
class LossSettings(TrainingStage):
    """What a step depends on. Weights of None depend on other options."""

    batch_size: int | None = batch_size_option(None, "4 dense, 64 of patches")
    distillation_weight: float = weight_option(1.0, "weight of the distillation loss (default 1)")
    metric_weight: float | None = weight_option(
        None, "weight of the metric loss; 0 leaves it out (default 0 dense, 1 with patches)"
    )
    compactness_weight: float | None = weight_option(
        None, "weight of the compactness loss; 0 leaves it out (default 0 dense, 1 with patches)"
    )
    literal_losses: bool = False  # the paper's sums over channels; means have the same size for any number of them

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each loss."""
        return {name: getattr(self, f"{name}_weight") for name in ("distillation", "metric", "compactness")}

    @property
    def portion(self) -> float:
        """This process's fraction of a batch."""
        return len(distributed.share(range(self.batch_size))) / self.batch_size


class Decoder(nn.Module):
    """The linear layer that decodes descriptors (n,C) to a backbone's features (n,F), normalised per channel.

    With `literal` the features are not normalised.
    """

    def __init__(self, moments: RunningMoments, descriptor_size: int, literal: bool = False):
        super().__init__()
        mean, std = moments.mean.float(), moments.std.float()
        self.register_buffer("mean", torch.zeros_like(mean) if literal else mean)
        self.register_buffer("std", torch.ones_like(std) if literal else std)
        self.register_buffer("unit", std / self.std, persistent=False)
        self.linear = nn.Linear(descriptor_size, len(mean))

    def target(self, features: Tensor) -> Tensor:
        """The backbone's features (n,F) -> the targets of `forward` (n,F)."""
        return (features - self.mean) / self.std

    def unexplained(self, decoded: Tensor, target: Tensor) -> float:
        """The fraction of the features' variance that the differences of `decoded` and `target` (n,F) have."""
        return losses.knowledge_distillation(decoded / self.unit, target / self.unit).item()

    def forward(self, descriptors: Tensor) -> Tensor:
        return self.linear(descriptors)


class Lesson:
    """A teacher, the decoder of its descriptors, and a step of their training."""

    def __init__(self, net: AnomalyNet, decoder: Decoder, distillation: Distillation, settings: LossSettings):
        self.net, self.decoder, self.distillation, self.settings = net, decoder, distillation, settings
        self._compute = settings.compute

    def learn(self, batch: Batch) -> tuple[float, dict[str, float]]:
        """Add the gradients of a batch's losses (section 3.1). Returns their weighted sum, and each loss."""
        weights, literal = self.settings.weights, self.settings.literal_losses
        with self._compute.autocast():
            features = self.distillation.features(batch)
            answer = self.distillation.ask(self.net, batch, triplets=weights["metric"] > 0)
        decoded, target = self.decoder(answer.descriptors), self.decoder.target(features)
        parts = {"distillation": losses.knowledge_distillation(decoded, target, literal) * self.settings.portion}
        if weights["metric"] or weights["compactness"]:
            anchors = distributed.rows_of_all(answer.anchors)
        if weights["metric"]:
            parts["metric"] = losses.metric_learning(
                anchors, distributed.rows_of_all(answer.positives), literal=literal
            )
        if weights["compactness"]:
            parts["compactness"] = losses.compactness(anchors, literal)
        sum(weights[name] * value for name, value in parts.items()).backward()
        parts["distillation"] = distributed.all_reduce(parts["distillation"].detach())
        values = {name: value.item() for name, value in parts.items()}
        return sum(weights[name] * value for name, value in values.items()), values

    @torch.inference_mode()
    def unexplained_variance(self, pictures: Pictures) -> float:
        """The fraction of the features' variance left unexplained, on pictures not trained on; 1 for a constant."""
        settings, found = self.settings, []
        self.net.eval()
        seed = device.seed_of(settings.seed, "held back")
        with self._compute.autocast():
            for batch in self.distillation.batches(pictures, seed, range(BATCHES_MEASURED), settings.batch_size):
                decoded = self.decoder(self.distillation.ask(self.net, batch, triplets=False).descriptors)
                target = self.decoder.target(self.distillation.features(batch))
                found.append(self.decoder.unexplained(decoded, target))
        self.net.train()
        return distributed.summed(sum(found) / len(found) * settings.portion)


@torch.inference_mode()
def feature_moments(distillation: Distillation, pictures: Pictures, settings: LossSettings) -> RunningMoments:
    """Mean and std of the backbone's features per channel (F,)."""
    found = RunningMoments()
    seed = device.seed_of(settings.seed, "measured")
    for batch in distillation.batches(pictures, seed, range(BATCHES_MEASURED), settings.batch_size):
        found.update(distillation.features(batch))
    found.gather()
    return found
