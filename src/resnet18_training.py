"""Stage 1 (optional): adapt the backbone, ResNet18, to a category.

All training images are good, so their labels teach nothing. Instead the two classes are "unchanged" and "with a
synthetic defect" (CutPaste and CutPaste-scar, Li et al., CVPR 2021). To tell these apart, the features must represent
the category's texture and shapes.
"""

from argparse import Namespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from AnomalyDataset import AnomalyDataset
from AnomalyResnet18 import AnomalyResnet18
from student_teacher.images import category, preprocessing
from student_teacher.images.store import ImageStore
from student_teacher.runtime import command_line, device, distributed
from student_teacher.runtime.errors import UserError
from student_teacher.teachers import backbone_weights
from student_teacher.training import synthetic_defects
from student_teacher.training.loop import (
    Model,
    forget,
    learning_rate,
    set_learning_rate,
    shuffled_batches,
)

KIND = "backbone"
WEIGHT_DECAY = 1e-2


def parse_arguments(arguments: list[str] | None = None) -> Namespace:
    """Read the command line."""
    options = command_line.parser(__doc__)
    command_line.add_image_size(options)
    command_line.add_training(options, batch_size=16, learning_rate=3e-4)
    options.add_argument(
        "--epochs",
        type=command_line.positive,
        default=50,
        help="passes over the images; raise it while the validation accuracy still rises (default 50)",
    )
    backbone_weights.add_option(options)
    return options.parse_args(arguments)


def with_defects(images: Tensor, seeds: list[int]) -> Tensor:
    """The uint8 images (N,3,H,W), each with a synthetic defect drawn from its seed."""
    defective = []
    for image, seed in zip(images, seeds, strict=True):
        random = np.random.default_rng(seed)
        make = synthetic_defects.cut_paste if random.random() < 0.5 else synthetic_defects.cut_paste_scar
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        defective.append(preprocessing.to_tensor(make(picture, random)))
    return torch.stack(defective)


def both_classes(images: Tensor, seed: int, purpose: str, step: int, where: torch.device) -> tuple[Tensor, Tensor]:
    """Unchanged images (class 0), then each with a defect (class 1): normalised (2N,3,H,W), and classes (2N,)."""
    seeds = [device.seed_of(seed, purpose, step, number) for number in range(len(images))]
    inputs = preprocessing.normalise(torch.cat([images, with_defects(images, seeds)]).to(where))
    return inputs, torch.arange(2, device=where).repeat_interleave(len(images))


def accuracy(
    net: AnomalyResnet18, store: ImageStore, indices: list[int], args: Namespace, where: torch.device
) -> float:
    """The fraction of validation images, unchanged and with a defect, that are classified correctly."""
    net.eval()
    right = 0
    with torch.inference_mode(), device.autocast(where, args.precision):
        for step, groups in enumerate(store.batches([index] for index in indices)):
            inputs, classes = both_classes(groups[0], args.seed, "held-back defect", step, where)
            right += (net(inputs).argmax(1) == classes).sum().item()
    net.train()
    return right / (2 * len(indices))


def model_of(args: Namespace, dataset: AnomalyDataset) -> Model:
    """The file that this stage writes, and its settings."""
    settings = {
        "seed": args.seed,
        "image_size": command_line.sides(args),
        "precision": args.precision,
        "batch_size": args.batch_size,
        "epochs": args.epochs,
        "learning_rate": args.learning_rate,
        "backbone_weights": backbone_weights.name(args.backbone_weights),
        **category.identity_of(dataset),
    }
    return Model(args.model / args.category / "resnet18.pt", KIND, args.category, settings)


def train(args: Namespace) -> None:
    """Train the backbone and save it."""
    dataset = category.good_images(args, command_line.image_size(args))
    model = model_of(args, dataset)
    if not args.restart and model.is_trained():
        return
    where = device.choose(args.device)
    torch.manual_seed(args.seed)
    net = AnomalyResnet18()
    state = backbone_weights.load(args.backbone_weights)
    if state is not None:
        net.load_torchvision(state)
    net.to(where, memory_format=device.memory_format(where))

    store = ImageStore(lambda index: dataset[index]["image"], len(dataset))
    learned, validation = category.validation_split(len(dataset), args.seed)
    optimiser = torch.optim.AdamW(net.parameters(), args.learning_rate, weight_decay=WEIGHT_DECAY)
    batches = shuffled_batches(learned, args.batch_size, args.epochs, args.seed)
    if args.restart:
        forget([model.path])
    training = model.training(f"{KIND} training", {"net": net, "optimiser": optimiser}, len(batches))
    per_epoch = len(batches) // args.epochs
    for step, groups in zip(training, store.batches(batches[training.step :]), strict=False):
        set_learning_rate(optimiser, learning_rate(step, len(batches), args.learning_rate))
        optimiser.zero_grad()
        total = 0.0
        for images in groups:
            with device.autocast(where, args.precision):
                inputs, classes = both_classes(images, args.seed, "defect", step, where)
                logits = net(inputs)
            loss = F.cross_entropy(logits.float(), classes) * (len(images) / len(batches[step]))
            loss.backward()
            total += loss.item()
        optimiser.step()
        training.report(total)
        if (step + 1) % (5 * per_epoch) == 0:
            training.note(accuracy=accuracy(net, store, validation, args, where))
    final = accuracy(net, store, validation, args, where)
    print(f"validation accuracy {final:.3f} on {2 * len(validation)} images (0.5 is chance)")
    model.save({"net": net.cpu().state_dict(), "validation_accuracy": final}, training, "cross entropy")


def main(arguments: list[str] | None = None) -> None:
    """Run stage 1."""
    args = parse_arguments(arguments)
    if distributed.active():
        raise UserError("this stage is fast and runs in one process: start it without torchrun")
    train(args)


if __name__ == "__main__":
    distributed.run(main)
