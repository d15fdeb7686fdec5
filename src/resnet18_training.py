"""Stage 1 (optional): adapt the backbone, ResNet18, to a category.

All training images are good, so a classifier of their labels would learn nothing. The two classes are "as it is" and
"with a synthetic defect" (CutPaste and CutPaste-scar, Li et al., CVPR 2021). Features that tell those apart know the
category's texture and shapes.
"""

from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from AnomalyResnet18 import AnomalyResnet18
from student_teacher.images import category as categories
from student_teacher.images import preprocessing
from student_teacher.images.store import ImageStore
from student_teacher.reports import figures
from student_teacher.runtime import checkpoints, command_line, device, distributed
from student_teacher.runtime.errors import UserError
from student_teacher.teachers import backbone_weights
from student_teacher.training import synthetic_defects
from student_teacher.training.loop import (
    Training,
    already_trained,
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
        help="passes over the images; more while the accuracy on held-back images still rises (default 50)",
    )
    backbone_weights.add_option(options)
    return options.parse_args(arguments)


def with_defects(images: Tensor, seeds: list[int]) -> Tensor:
    """A synthetic defect in each of the uint8 images (N,3,H,W), drawn by its seed."""
    defective = []
    for image, seed in zip(images, seeds, strict=True):
        random = np.random.default_rng(seed)
        make = synthetic_defects.cut_paste if random.random() < 0.5 else synthetic_defects.cut_paste_scar
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        defective.append(preprocessing.to_tensor(make(picture, random)))
    return torch.stack(defective)


def both_classes(images: Tensor, seed: int, purpose: str, step: int, where: torch.device) -> tuple[Tensor, Tensor]:
    """Images as they are (class 0), then each with a defect (class 1): normalised (2N,3,H,W) and classes (2N,)."""
    seeds = [device.seed_of(seed, purpose, step, number) for number in range(len(images))]
    inputs = preprocessing.normalise(torch.cat([images, with_defects(images, seeds)]).to(where))
    return inputs, torch.arange(2, device=where).repeat_interleave(len(images))


def accuracy(
    net: AnomalyResnet18, store: ImageStore, indices: list[int], args: Namespace, where: torch.device
) -> float:
    """Share of held-back images, as they are and with a defect, that the net puts in the right class."""
    net.eval()
    right = 0
    with torch.inference_mode(), device.autocast(where, args.precision):
        for step, groups in enumerate(store.batches([index] for index in indices)):
            inputs, classes = both_classes(groups[0], args.seed, "held-back defect", step, where)
            right += (net(inputs).argmax(1) == classes).sum().item()
    net.train()
    return right / (2 * len(indices))


def train(args: Namespace) -> Path:
    """Train the backbone and return where it was saved."""
    path = args.model / args.category / "resnet18.pt"
    dataset = categories.good_images(args, command_line.image_size(args))
    settings = {
        "seed": args.seed,
        "image_size": command_line.sides(args),
        "precision": args.precision,
        "batch_size": args.batch_size,
        "epochs": args.epochs,
        "learning_rate": args.learning_rate,
        "backbone_weights": backbone_weights.name(args.backbone_weights),
        **categories.identity_of(dataset),
    }
    if not args.restart and already_trained(path, KIND, args.category, settings):
        return path
    where = device.choose(args.device)
    torch.manual_seed(args.seed)
    net = AnomalyResnet18()
    state = backbone_weights.load(args.backbone_weights)
    if state is not None:
        net.load_torchvision(state)
    net.to(where, memory_format=device.memory_format(where))

    store = ImageStore(lambda index: dataset[index]["image"], len(dataset))
    learned, held_back = categories.held_back_split(len(dataset), args.seed)
    optimiser = torch.optim.AdamW(net.parameters(), args.learning_rate, weight_decay=WEIGHT_DECAY)
    wanted = shuffled_batches(learned, args.batch_size, args.epochs, args.seed)
    if args.restart:
        forget([path])
    training = Training(
        path,
        f"{KIND} training",
        args.category,
        settings,
        {"net": net, "optimiser": optimiser},
        len(wanted),
    )
    per_epoch = len(wanted) // args.epochs
    for step, groups in zip(training, store.batches(wanted[training.step :]), strict=False):
        set_learning_rate(optimiser, learning_rate(step, len(wanted), args.learning_rate))
        optimiser.zero_grad()
        total = 0.0
        for images in groups:
            with device.autocast(where, args.precision):
                inputs, classes = both_classes(images, args.seed, "defect", step, where)
                logits = net(inputs)
            loss = F.cross_entropy(logits.float(), classes) * (len(images) / len(wanted[step]))
            loss.backward()
            total += loss.item()
        optimiser.step()
        training.report(total)
        if (step + 1) % (5 * per_epoch) == 0:
            training.note(held_back_accuracy=accuracy(net, store, held_back, args, where))
    final = accuracy(net, store, held_back, args, where)
    content = {"settings": settings, "net": net.cpu().state_dict(), "held_back_accuracy": final}
    checkpoints.save(path, KIND, args.category, content)
    figures.save_training_curve(path.with_name("resnet18_training.png"), *training.curve("cross entropy"))
    training.finish()
    print(f"held-back accuracy {final:.3f} on {2 * len(held_back)} images (0.5 is chance)")
    print(f"saved {path}")
    return path


def main(arguments: list[str] | None = None) -> None:
    """Run stage 1."""
    args = parse_arguments(arguments)
    if distributed.active():
        raise UserError("this stage is quick and takes one process: start it without torchrun")
    train(args)


if __name__ == "__main__":
    distributed.run(main)
