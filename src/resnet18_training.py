"""Stage 1 (optional): adapt the backbone, ResNet18, to a category.

All training images are good, so their labels teach nothing. Instead the two classes are "unchanged" and "with a
synthetic defect" (CutPaste and CutPaste-scar, Li et al., CVPR 2021). To tell these apart, the features must represent
the category's texture and shapes.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from AnomalyResnet18 import AnomalyResnet18
from student_teacher.images import preprocessing
from student_teacher.images.category import GoodImages
from student_teacher.images.ignored import ignore_option
from student_teacher.images.store import ImageStore
from student_teacher.runtime import device, distributed
from student_teacher.runtime.command_line import positive
from student_teacher.runtime.errors import UserError
from student_teacher.runtime.files import make_folder
from student_teacher.runtime.settings import TrainingStage, batch_size_option, learning_rate_option, option
from student_teacher.teachers import backbone_weights
from student_teacher.training import synthetic_defects
from student_teacher.training.loop import (
    Model,
    Training,
    forget,
    learning_rate,
    set_learning_rate,
    shuffled_batches,
)

KIND = "backbone"
WEIGHT_DECAY = 1e-2


@dataclass(frozen=True, kw_only=True)
class Settings(TrainingStage):
    """The options of stage 1."""

    batch_size: int = batch_size_option(16)
    learning_rate: float = learning_rate_option(3e-4)
    epochs: int = option(
        50, "passes over the images; raise it while the validation accuracy still rises", identity=True, type=positive
    )
    backbone_weights: str = backbone_weights.weights_option()
    ignore: Path | None = ignore_option()


def parse_arguments(arguments: list[str] | None = None) -> Settings:
    """Read the command line."""
    return Settings.parse(__doc__, arguments)


def with_defects(images: Tensor, seeds: list[int]) -> Tensor:
    """The uint8 images (N,3,H,W), each with a synthetic defect drawn from its seed."""
    defective = []
    for image, seed in zip(images, seeds, strict=True):
        random = np.random.default_rng(seed)
        make = synthetic_defects.cut_paste if random.random() < 0.5 else synthetic_defects.cut_paste_scar
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        defective.append(preprocessing.to_tensor(make(picture, random)))
    return torch.stack(defective)


def both_classes(images: Tensor, compute: device.Compute, purpose: str, step: int) -> tuple[Tensor, Tensor]:
    """Unchanged images (class 0), then each with a defect (class 1): normalised (2N,3,H,W), and classes (2N,)."""
    seeds = [device.seed_of(compute.seed, purpose, step, number) for number in range(len(images))]
    inputs = preprocessing.normalise(torch.cat([images, with_defects(images, seeds)]).to(compute.where))
    return inputs, torch.arange(2, device=compute.where).repeat_interleave(len(images))


def accuracy(net: AnomalyResnet18, store: ImageStore, indices: list[int], compute: device.Compute) -> float:
    """The fraction of validation images, unchanged and with a defect, that are classified correctly."""
    net.eval()
    right = 0
    with torch.inference_mode(), compute.autocast():
        for step, groups in enumerate(store.batches([index] for index in indices)):
            inputs, classes = both_classes(groups[0], compute, "held-back defect", step)
            right += (net(inputs).argmax(1) == classes).sum().item()
    net.train()
    return right / (2 * len(indices))


def new_net(settings: Settings) -> AnomalyResnet18:
    """The backbone before its training."""
    torch.manual_seed(settings.seed)
    net = AnomalyResnet18()
    state = backbone_weights.load(settings.backbone_weights)
    if state is not None:
        net.load_torchvision(state)
    return settings.compute.place(net)


def model_of(settings: Settings, images: GoodImages) -> Model:
    """The file that this stage writes, and what it was made from."""
    weights = {"backbone_weights": backbone_weights.name(settings.backbone_weights)}
    made_from = settings.identity() | weights | images.identity
    return Model(settings.models / "resnet18.pt", KIND, settings.category, made_from)


def learn(net: AnomalyResnet18, model: Model, images: GoodImages, settings: Settings) -> Training:
    """Train the backbone, from the start or from the last checkpoint."""
    compute, store = settings.compute, images.decoded(settings.size)
    learned, validation = images.split(settings.seed)
    optimiser = torch.optim.AdamW(net.parameters(), settings.learning_rate, weight_decay=WEIGHT_DECAY)
    batches = shuffled_batches(learned, settings.batch_size, settings.epochs, settings.seed)
    training = model.training(f"{KIND} training", {"net": net, "optimiser": optimiser}, len(batches))
    per_epoch = len(batches) // settings.epochs
    for step, groups in zip(training, store.batches(batches[training.step :]), strict=False):
        set_learning_rate(optimiser, learning_rate(step, len(batches), settings.learning_rate))
        optimiser.zero_grad()
        total = 0.0
        for batch in groups:
            with compute.autocast():
                inputs, classes = both_classes(batch, compute, "defect", step)
                logits = net(inputs)
            loss = F.cross_entropy(logits.float(), classes) * (len(batch) / len(batches[step]))
            loss.backward()
            total += loss.item()
        optimiser.step()
        training.report(total)
        if (step + 1) % (5 * per_epoch) == 0:
            training.note(accuracy=accuracy(net, store, validation, compute))
    return training


def main(arguments: list[str] | None = None) -> None:
    """Run stage 1."""
    settings = parse_arguments(arguments)
    if distributed.active():
        raise UserError("this stage is fast and runs in one process: start it without torchrun")
    images = GoodImages(settings.images, settings.ignore, settings.index)
    model = model_of(settings, images)
    if not settings.restart and model.is_trained():
        return
    make_folder(settings.models)  # now, not after the images are read, is the time to hear of it
    net = new_net(settings)
    if settings.restart:
        forget([model.path])
    training = learn(net, model, images, settings)
    validation = images.split(settings.seed)[1]
    final = accuracy(net, images.decoded(settings.size), validation, settings.compute)
    print(f"validation accuracy {final:.3f} on {2 * len(validation)} images (0.5 is chance)")
    model.save({"net": net.cpu().state_dict(), "validation_accuracy": final}, training, "cross entropy")


if __name__ == "__main__":
    distributed.run(main)
