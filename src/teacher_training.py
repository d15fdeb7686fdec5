"""Stage 2: distil the backbone into the teacher, a small network that describes patches.

Three losses teach it (section 3.1 of "Uninformed Students"): knowledge distillation from ResNet18's features, metric
learning and descriptor compactness. The backbone is the one that resnet18_training.py adapted, if it did; else it has
the weights that --backbone-weights names.
"""

from argparse import Namespace
from pathlib import Path

import torch
from torch import Tensor

import backbone_weights
import checkpoints
import device
import figures
import losses
import stages
from AnomalyNet import PATCH_SIZES, AnomalyNet
from AnomalyResnet18 import AnomalyResnet18, pooled_features
from command_line import UserError, run
from moments import Moments
from patches import PatchSampler
from training import Training, already_trained, learning_rate, set_learning_rate

KIND = "teacher"
WEIGHT_DECAY = 1e-5  # this and the learning rate: the paper, section 4
PATCHES_MEASURED = 512  # for the features' mean and deviation, and for the final figure


def parse_arguments(arguments: list[str] | None = None) -> Namespace:
    """Read the command line."""
    options = stages.parser(__doc__)
    stages.add_image_size(
        options,
        default=[None],
        advice="the students' size, if theirs is so small that detail gets lost: the teacher shall not look for it",
    )
    stages.add_training(options, batch_size=64, learning_rate=2e-4)
    options.add_argument(
        "--patch-size",
        type=int,
        choices=PATCH_SIZES,
        nargs="+",
        default=[65],
        help="side of a patch in pixels; several train several teachers. Small defects want small patches (default 65)",
    )
    options.add_argument(
        "--steps",
        type=stages.positive,
        default=10_000,
        help="batches to learn from; the paper takes 50,000, a CPU has the most of it after 1,000 (default 10,000)",
    )
    options.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="teach on the pictures in DIR and below, of any kind, in place of the category's good images: many "
        "everyday pictures make a better teacher",
    )
    options.add_argument(
        "--backbone-size",
        type=stages.positive,
        default=64,
        metavar="PIXELS",
        help="side at which the backbone sees a patch: larger tells more, and costs its square (default 64)",
    )
    for name, default in (("distillation", 1.0), ("metric", 1.0), ("compactness", 1.0)):
        options.add_argument(
            f"--{name}-weight",
            type=stages.not_negative,
            default=default,
            metavar="X",
            help=f"weight of the {name} loss; 0 leaves it out (default {default:g})",
        )
    backbone_weights.add_option(options)
    return options.parse_args(arguments)


def adapted_backbone(args: Namespace) -> dict[str, Tensor] | None:
    """The weights that stage 1 made for the category, None where it made none."""
    path = args.model / args.category / "resnet18.pt"
    return checkpoints.load(path, "backbone", category=args.category)["net"] if path.exists() else None


def load_backbone(args: Namespace, adapted: dict[str, Tensor] | None) -> AnomalyResnet18:
    """The backbone with the adapted weights, else with those that --backbone-weights names."""
    torch.manual_seed(args.seed)
    net = AnomalyResnet18()
    if adapted is not None:
        net.load_state_dict(adapted)
    elif (state := backbone_weights.load(args.backbone_weights)) is not None:
        net.load_torchvision(state)
    return net.eval().requires_grad_(False)


class Targets:
    """The backbone's features of patches, normalised per channel: what the teacher's descriptors shall be."""

    def __init__(
        self, backbone: AnomalyResnet18, size: int, sampler: PatchSampler, batch_size: int, where: torch.device
    ):
        self._backbone, self._size = backbone, size
        self._mean, self._deviation = torch.zeros(1, device=where), torch.ones(1, device=where)
        found = Moments()
        for patches, _ in sampler.batches(range(-(-PATCHES_MEASURED // batch_size)), batch_size):
            found.update(self(patches.to(where)))
        self._mean, self._deviation = found.mean.float(), found.deviation.float()

    def __call__(self, patches: Tensor) -> Tensor:
        """Normalised patches (N,3,p,p) -> (N,512)."""
        return (pooled_features(self._backbone, patches, self._size).float() - self._mean) / self._deviation


def train(args: Namespace, patch_size: int) -> Path:
    """Train the teacher of one patch size and return where it was saved."""
    path = args.model / args.category / f"teacher_{patch_size}.pt"
    size = stages.image_size(args)
    weights = {
        "distillation": args.distillation_weight,
        "metric": args.metric_weight,
        "compactness": args.compactness_weight,
    }
    paths = stages.pictures_in(args.images) if args.images else stages.image_paths(stages.good_images(args, None))
    adapted = adapted_backbone(args)
    backbone_name = (
        f"{args.backbone_weights} weights"
        if adapted is None
        else (f"resnet18.pt of this category, {checkpoints.fingerprint(adapted)}")
    )
    settings = {
        "seed": args.seed,
        "batch_size": args.batch_size,
        "steps": args.steps,
        "learning_rate": args.learning_rate,
        "images": stages.digest_of(paths),
        "image_size": args.image_size,
        "backbone": backbone_name,
        "backbone_size": args.backbone_size,
        "weights": weights,
    }
    if already_trained(path, KIND, args.category, settings, args.restart):
        return path
    print(f"teacher of {patch_size} pixels, backbone: {backbone_name}, {len(paths)} pictures")
    where = device.choose(args.device)
    backbone = load_backbone(args, adapted).to(where, memory_format=device.memory_format(where))
    torch.manual_seed(device.seed_of(args.seed, "teacher", patch_size))
    net = AnomalyNet(patch_size).to(where, memory_format=device.memory_format(where))
    with device.autocast(where, args.precision):
        held_back = PatchSampler(paths, size, patch_size, device.seed_of(args.seed, "held back"))
        targets = Targets(backbone, args.backbone_size, held_back, args.batch_size, where)

    optimiser = torch.optim.Adam(net.parameters(), args.learning_rate, weight_decay=WEIGHT_DECAY)
    training = Training(
        path,
        f"{KIND} training, {patch_size} pixels",
        args.category,
        settings,
        {"net": net, "optimiser": optimiser},
        args.steps,
        args.restart,
    )
    sampler = PatchSampler(paths, size, patch_size, args.seed)
    batches = sampler.batches(range(training.step, args.steps), args.batch_size)
    for step, (patches, partners) in zip(training, batches, strict=False):
        set_learning_rate(optimiser, learning_rate(step, args.steps, args.learning_rate))
        patches, partners = patches.to(where), partners.to(where)
        with device.autocast(where, args.precision):
            with torch.no_grad():
                features = targets(patches)
            if weights["metric"]:
                descriptors, partner_descriptors = net(torch.cat([patches, partners])).float().chunk(2)
            else:
                descriptors = net(patches).float()
        parts = {"distillation": losses.knowledge_distillation(descriptors, features)}
        if weights["metric"]:
            parts["metric"] = losses.metric_learning(descriptors, partner_descriptors)
        if weights["compactness"]:
            parts["compactness"] = losses.compactness(descriptors)
        loss = sum(weights[name] * value for name, value in parts.items())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        training.report(loss.item(), **{name: value.item() for name, value in parts.items()})

    unexplained = evaluate(net, targets, held_back, args, where)
    content = {
        "patch_size": patch_size,
        "settings": settings,
        "net": net.cpu().state_dict(),
        "unexplained_variance": unexplained,
    }
    checkpoints.save(path, KIND, args.category, content)
    figures.save_training_curve(path.with_name(f"teacher_{patch_size}_training.png"), *training.curve("loss"))
    training.finish()
    print(f"{unexplained:.3f} of the variance of the backbone's features is left unexplained on fresh patches")
    print(f"saved {path}")
    return path


def evaluate(net: AnomalyNet, targets: Targets, held_back: PatchSampler, args: Namespace, where: torch.device) -> float:
    """Share of the features' variance that the descriptors leave unexplained, on patches not trained on."""
    net.eval()
    found = []
    with torch.inference_mode(), device.autocast(where, args.precision):
        for patches, _ in held_back.batches(range(-(-PATCHES_MEASURED // args.batch_size)), args.batch_size):
            patches = patches.to(where)
            found.append(losses.knowledge_distillation(net(patches).float(), targets(patches)).item())
    return sum(found) / len(found)


def main(arguments: list[str] | None = None) -> None:
    """Run stage 2."""
    args = parse_arguments(arguments)
    if args.batch_size < 2:
        raise UserError("--batch-size 1: metric learning and compactness need two patches or more")
    if not (args.distillation_weight or args.metric_weight or args.compactness_weight):
        raise UserError("all weights are 0: leave one of --distillation-weight, --metric-weight, --compactness-weight")
    for patch_size in sorted(set(args.patch_size)):
        train(args, patch_size)


if __name__ == "__main__":
    run(main)
