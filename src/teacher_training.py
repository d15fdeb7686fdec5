"""Stage 2: distil the backbone into the teacher, a small network that describes patches.

Up to three losses teach it (section 3.1 of "Uninformed Students"): knowledge distillation from the backbone's features,
metric learning and descriptor compactness. The teachers that ship with the project serve any category; this stage makes
others, of a category's own good images or of any pictures:

    teacher_training.py pretrained --images DIR --backbone efficientnet_lite0 --patch-size 17 33 65 --restart

replaces those that ship (category "pretrained"); with a category's name the teacher is that category's alone. --paper
teaches as the paper does, --images being ImageNet's in the paper.
"""

from argparse import Namespace
from pathlib import Path

import torch
from torch import Tensor, nn

from AnomalyNet import DEFAULT_PATCH_SIZES, PATCH_SIZES, AnomalyNet
from student_teacher.images import category as categories
from student_teacher.images.pictures import Pictures
from student_teacher.reports import figures
from student_teacher.runtime import checkpoints, command_line, device, distributed
from student_teacher.runtime.errors import UserError
from student_teacher.runtime.running_moments import Moments
from student_teacher.runtime.SyncBatchNorm2d import SyncBatchNorm2d
from student_teacher.teachers import backbone_weights
from student_teacher.training import losses, paper
from student_teacher.training import optimiser as optimisers
from student_teacher.training.distillation import DenseDistillation, Distillation, PatchDistillation
from student_teacher.training.loop import SCHEDULES, Training, already_trained, forget
from student_teacher.training.optimiser import Optimiser

KIND = "teacher"
STEPS_BETWEEN_CHECKS = 500
BATCHES_MEASURED = 12  # for the features' mean and deviation, and for the figure on held-back pictures
# What hangs on the way of distillation. Dense: a batch is one of views, with some 10,000 descriptors in it; weights
# found good on held-back pictures. Patches: the paper's learning rate and losses.
DEFAULTS = {
    "dense": {
        "batch_size": 4,
        "learning_rate": {"muon": 0.02, "adam": 2e-3},
        "steps": 5_000,
        "metric_weight": 0.0,
        "compactness_weight": 0.0,
    },
    "patches": {
        "batch_size": 64,
        "learning_rate": {"muon": 0.02, "adam": 2e-4},
        "steps": 10_000,
        "metric_weight": 1.0,
        "compactness_weight": 1.0,
    },
}


def parse_arguments(arguments: list[str] | None = None) -> Namespace:
    """Read the command line."""
    options = command_line.parser(__doc__)
    command_line.add_image_size(
        options,
        default=[None],
        advice="the students' size, if theirs is so small that detail gets lost: the teacher shall not look for it",
    )
    command_line.add_training(
        options, batch_size="4 dense, 64 of patches", learning_rate="0.02; of adam 2e-3 dense, 2e-4 of patches"
    )
    optimisers.add_option(options)
    options.add_argument(
        "--patch-size",
        type=int,
        choices=PATCH_SIZES,
        nargs="+",
        default=list(DEFAULT_PATCH_SIZES),
        help="side of a patch in pixels; several train several teachers. Small defects need small patches (default: 33 "
        "and 65)",
    )
    options.add_argument(
        "--distillation",
        choices=tuple(DEFAULTS),
        default="dense",
        help="dense: every position of a view at once, learns far more in the same time; patches: the paper's, one "
        "patch at a time (default dense)",
    )
    options.add_argument(
        "--steps",
        type=command_line.positive,
        help="batches to learn from; more while the loss still falls. The paper takes 50,000 batches of patches "
        "(default 5000 dense, 10000 of patches)",
    )
    options.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="teach on the pictures in DIR and below, of any kind, in place of the category's good images: many "
        "everyday pictures make a better teacher",
    )
    options.add_argument(
        "--start-from",
        type=Path,
        metavar="FILE",
        help="go on from the teacher in FILE, of one that ships, say, in place of random weights (dense distillation)",
    )
    options.add_argument(
        "--backbone-size",
        type=command_line.positive,
        default=64,
        metavar="PIXELS",
        help="side at which the backbone sees a patch (--distillation patches): larger tells more, and costs its "
        "square (default 64)",
    )
    options.add_argument(
        "--distillation-weight",
        type=command_line.not_negative,
        default=1.0,
        metavar="X",
        help="of its loss (default 1)",
    )
    for name in ("metric", "compactness"):
        options.add_argument(
            f"--{name}-weight",
            type=command_line.not_negative,
            metavar="X",
            help=f"weight of the {name} loss; 0 leaves it out (default 0 dense, 1 of patches)",
        )
    backbone_weights.add_options(options, default="resnet18")
    args = paper.TEACHER.parse(options, arguments)
    for name, value in DEFAULTS[args.distillation].items():
        if getattr(args, name) is None:
            setattr(args, name, value[args.optimiser] if isinstance(value, dict) else value)
    args.patch_size = sorted(set(args.patch_size))
    return args


def model_path(args: Namespace, patch_size: int) -> Path:
    """Where the teacher of a patch size is saved."""
    return args.model / args.category / f"teacher_{patch_size}.pt"


def train(args: Namespace, patch_size: int) -> Path:
    """Train the teacher of one patch size and return where it was saved."""
    path = model_path(args, patch_size)
    weights = {name: getattr(args, f"{name}_weight") for name in ("distillation", "metric", "compactness")}
    dataset = None if args.images else categories.good_images(args, None)
    paths = categories.image_paths(dataset) if dataset else categories.pictures_in(args.images)
    images = categories.identity_of(dataset) if dataset else {"images": categories.digest_of(paths, contents=False)}
    adapted = None if args.paper else backbone_weights.adapted_backbone(args)
    settings = {
        "seed": args.seed,
        "distillation": args.distillation,
        "batch_size": args.batch_size,
        "steps": args.steps,
        "optimiser": args.optimiser,
        "learning_rate": args.learning_rate,
        **images,
        "precision": args.precision,
        "image_size": command_line.sides(args),
        "backbone": backbone_weights.backbone_name(args, adapted),
        "weights": weights,
    }
    if args.distillation == "patches":
        settings["backbone_size"] = args.backbone_size
    settings |= paper.TEACHER.identity(args)
    start = args.start_from and checkpoints.load(args.start_from, KIND, patch_size=patch_size)["net"]
    if start:
        settings["start_from"] = checkpoints.fingerprint(start)
    if not args.restart and already_trained(path, KIND, args.category, settings):
        return path
    print(f"teacher of {patch_size} pixels, backbone: {settings['backbone']}, {len(paths)} pictures")
    where = device.choose(args.device)
    layout = device.memory_format(where)
    torch.manual_seed(args.seed)
    backbone = backbone_weights.backbone(args.backbone, args.backbone_weights, adapted).to(where, memory_format=layout)
    if args.distillation == "dense":
        distillation = DenseDistillation(backbone, patch_size, where)
    else:
        seen_at = args.backbone_size or patch_size
        distillation = PatchDistillation(backbone, patch_size, seen_at, where, square=args.square_zoom)
    size = command_line.image_size(args)
    learned, held_back = (
        Pictures([paths[index] for index in part], size, value_range=dataset and dataset.value_range)
        for part in categories.held_back_split(len(paths), args.seed)
    )

    with device.autocast(where, args.precision):
        moments = feature_moments(distillation, learned, args)
    torch.manual_seed(device.seed_of(args.seed, "teacher", patch_size))
    net = AnomalyNet(patch_size, args.distillation == "dense", args.descriptor_size).to(where, memory_format=layout)
    if start:
        trained = AnomalyNet(patch_size)
        trained.load_state_dict(start)
        batch = next(distillation.batches(learned, args.seed, range(1), args.batch_size))
        pixels = torch.cat(distributed.gathered(distillation.pixels(batch).cpu()))
        net.start_from(trained.to(where), pixels.to(where, memory_format=layout))
    SyncBatchNorm2d.convert(net)
    decoder = Decoder(moments, args.descriptor_size, args.literal_losses).to(where)
    optimiser = Optimiser((net, decoder), args.optimiser, args.learning_rate, args.weight_decay)
    if args.restart:  # all sizes at once, so that after a stop the others are trained anew, too
        forget(model_path(args, size) for size in args.patch_size)
        args.restart = False
    training = Training(
        path,
        f"{KIND} training, {patch_size} pixels",
        args.category,
        settings,
        {"net": net, "decoder": decoder, "optimiser": optimiser},
        args.steps,
    )
    batches = distillation.batches(learned, args.seed, range(training.step, args.steps), args.batch_size)
    for step, batch in zip(training, batches, strict=False):
        with device.autocast(where, args.precision):
            features = distillation.features(batch)
            answer = distillation.ask(net, batch, triplets=weights["metric"] > 0)
        decoded, target = decoder(answer.descriptors), decoder.target(features)
        parts = {"distillation": losses.knowledge_distillation(decoded, target, args.literal_losses) * portion(args)}
        if weights["metric"] or weights["compactness"]:
            anchors = distributed.rows_of_all(answer.anchors)
        if weights["metric"]:
            positives = distributed.rows_of_all(answer.positives)
            parts["metric"] = losses.metric_learning(anchors, positives, literal=args.literal_losses)
        if weights["compactness"]:
            parts["compactness"] = losses.compactness(anchors, args.literal_losses)
        loss = sum(weights[name] * value for name, value in parts.items())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step(SCHEDULES[args.schedule](step, args.steps))
        parts["distillation"] = distributed.all_reduce(parts["distillation"].detach())
        loss = sum(weights[name] * value.detach() for name, value in parts.items())
        training.report(loss.item(), **{name: value.item() for name, value in parts.items()})
        if (step + 1) % STEPS_BETWEEN_CHECKS == 0:
            with device.autocast(where, args.precision):
                training.note(held_back=unexplained_variance(net, decoder, distillation, held_back, args))

    with device.autocast(where, args.precision):
        unexplained = unexplained_variance(net, decoder, distillation, held_back, args)
    # float16 halves the file; students imitate the teacher as it was rounded.
    teacher = net.folded().to(getattr(torch, args.saved_in)).cpu()
    content = {
        "patch_size": patch_size,
        "descriptor_size": args.descriptor_size,
        "paper": paper.TEACHER.changed(args) if args.paper else None,
        "settings": settings,
        "net": teacher.state_dict(),
        "unexplained_variance": unexplained,
    }
    checkpoints.save(path, KIND, args.category, content)
    if distributed.is_first():
        figures.save_training_curve(path.with_name(f"teacher_{patch_size}_training.png"), *training.curve("loss"))
    training.finish()
    print(f"{unexplained:.3f} of the variance of the backbone's features is left unexplained on held-back pictures")
    print(f"saved {path}")
    return path


def portion(args: Namespace) -> float:
    """How much of a batch is this process's."""
    return len(distributed.share(range(args.batch_size))) / args.batch_size


class Decoder(nn.Module):
    """The linear head that decodes descriptors (n,C) to a backbone's features (n,F), normalised per channel.

    `literal`: to the features as the backbone gives them.
    """

    def __init__(self, moments: Moments, descriptor_size: int, literal: bool = False):
        super().__init__()
        mean, deviation = moments.mean.float(), moments.deviation.float()
        self.register_buffer("mean", torch.zeros_like(mean) if literal else mean)
        self.register_buffer("deviation", torch.ones_like(deviation) if literal else deviation)
        self.register_buffer("unit", deviation / self.deviation, persistent=False)
        self.linear = nn.Linear(descriptor_size, len(mean))

    def target(self, features: Tensor) -> Tensor:
        """Features as the backbone gives them (n,F) -> what `forward` should say of them."""
        return (features - self.mean) / self.deviation

    def unexplained(self, decoded: Tensor, target: Tensor) -> float:
        """The share of the features' variance that is in the differences of `decoded` and `target` (n,F)."""
        return losses.knowledge_distillation(decoded / self.unit, target / self.unit).item()

    def forward(self, descriptors: Tensor) -> Tensor:
        return self.linear(descriptors)


@torch.inference_mode()
def feature_moments(distillation: Distillation, pictures: Pictures, args: Namespace) -> Moments:
    """Mean and deviation of the backbone's features per channel."""
    found = Moments()
    seed = device.seed_of(args.seed, "measured")
    for batch in distillation.batches(pictures, seed, range(BATCHES_MEASURED), args.batch_size):
        found.update(distillation.features(batch))
    found.gather()
    return found


@torch.inference_mode()
def unexplained_variance(
    net: AnomalyNet, decoder: Decoder, distillation: Distillation, pictures: Pictures, args: Namespace
) -> float:
    """Share of the features' variance that decoded descriptors leave unexplained, on pictures not trained on."""
    net.eval()
    found = []
    seed = device.seed_of(args.seed, "held back")
    for batch in distillation.batches(pictures, seed, range(BATCHES_MEASURED), args.batch_size):
        decoded = decoder(distillation.ask(net, batch, triplets=False).descriptors)
        found.append(decoder.unexplained(decoded, decoder.target(distillation.features(batch))))
    net.train()
    return distributed.summed(sum(found) / len(found) * portion(args))


def main(arguments: list[str] | None = None) -> None:
    """Run stage 2."""
    args = parse_arguments(arguments)
    if args.paper and args.images is None:
        raise UserError(
            "--paper: the paper teaches on ImageNet, not on the category; give a folder of pictures, --images"
        )
    if args.batch_size < 2 and args.distillation == "patches" and (args.metric_weight or args.compactness_weight):
        raise UserError("--batch-size 1: metric learning and compactness need two patches or more")
    if not (args.distillation_weight or args.metric_weight or args.compactness_weight):
        raise UserError("all weights are 0: leave one of --distillation-weight, --metric-weight, --compactness-weight")
    if args.start_from and args.distillation == "patches":
        raise UserError("--start-from goes with --distillation dense: the other trains without batch normalisation")
    if args.batch_size < distributed.processes():
        raise UserError(f"--batch-size {args.batch_size}: the {distributed.processes()} processes need one each")
    if args.start_from:
        if len(args.patch_size) > 1:
            raise UserError("--start-from: a teacher to start from has one patch size, so give one --patch-size")
        if args.start_from.resolve() == model_path(args, args.patch_size[0]).resolve():
            raise UserError(
                f"--start-from {args.start_from}: it would be written over; copy it, or give another --model"
            )
    paper.TEACHER.show(args)
    for patch_size in args.patch_size:
        train(args, patch_size)


if __name__ == "__main__":
    distributed.run(main)
