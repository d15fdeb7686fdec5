"""A step of a teacher's training: the losses of section 3.1 of "Uninformed Students"."""

from argparse import Namespace

import torch
from torch import Tensor, nn

from AnomalyNet import AnomalyNet
from student_teacher.images.pictures import Pictures
from student_teacher.runtime import device, distributed
from student_teacher.runtime.running_moments import RunningMoments
from student_teacher.training import losses
from student_teacher.training.distillation import Batch, Distillation

BATCHES_MEASURED = 12  # for the features' mean and std, and for the validation


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

    def __init__(self, net: AnomalyNet, decoder: Decoder, distillation: Distillation, args: Namespace):
        self.net, self.decoder, self.distillation, self.args = net, decoder, distillation, args
        self._weights, self._where = loss_weights(args), device.choose(args.device)

    def learn(self, batch: Batch) -> tuple[float, dict[str, float]]:
        """Add the gradients of a batch's losses (section 3.1). Returns their weighted sum, and each loss."""
        weights, literal = self._weights, self.args.literal_losses
        with device.autocast(self._where, self.args.precision):
            features = self.distillation.features(batch)
            answer = self.distillation.ask(self.net, batch, triplets=weights["metric"] > 0)
        decoded, target = self.decoder(answer.descriptors), self.decoder.target(features)
        parts = {"distillation": losses.knowledge_distillation(decoded, target, literal) * portion(self.args)}
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
        args, found = self.args, []
        self.net.eval()
        seed = device.seed_of(args.seed, "held back")
        with device.autocast(self._where, args.precision):
            for batch in self.distillation.batches(pictures, seed, range(BATCHES_MEASURED), args.batch_size):
                decoded = self.decoder(self.distillation.ask(self.net, batch, triplets=False).descriptors)
                target = self.decoder.target(self.distillation.features(batch))
                found.append(self.decoder.unexplained(decoded, target))
        self.net.train()
        return distributed.summed(sum(found) / len(found) * portion(args))


@torch.inference_mode()
def feature_moments(distillation: Distillation, pictures: Pictures, args: Namespace) -> RunningMoments:
    """Mean and std of the backbone's features per channel (F,)."""
    found = RunningMoments()
    seed = device.seed_of(args.seed, "measured")
    for batch in distillation.batches(pictures, seed, range(BATCHES_MEASURED), args.batch_size):
        found.update(distillation.features(batch))
    found.gather()
    return found


def portion(args: Namespace) -> float:
    """This process's fraction of a batch."""
    return len(distributed.share(range(args.batch_size))) / args.batch_size


def loss_weights(args: Namespace) -> dict[str, float]:
    """The weight of each loss."""
    return {name: getattr(args, f"{name}_weight") for name in ("distillation", "metric", "compactness")}
