"""Stage 2: distil the backbone into the teacher, a small network that describes patches.

It is trained with up to three losses (section 3.1 of "Uninformed Students"): knowledge distillation from the backbone's
features, metric learning and descriptor compactness. The teachers that ship with the project work for any category;
this stage trains others, on a category's own good images or on any pictures:

    teacher_training.py pretrained --images DIR --backbone efficientnet_lite0 --patch-size 17 33 65 --restart

replaces those that ship (category "pretrained"); with a category's name the teacher is for that category only. --paper
trains as in the paper, where --images are ImageNet's.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor

from AnomalyNet import DEFAULT_PATCH_SIZES, PATCH_SIZES, AnomalyNet
from student_teacher.images import category
from student_teacher.images.pictures import Pictures
from student_teacher.images.reading import ValueRange
from student_teacher.runtime import checkpoints, command_line, device, distributed
from student_teacher.runtime.errors import UserError
from student_teacher.runtime.SyncBatchNorm2d import SyncBatchNorm2d
from student_teacher.teachers import backbone_weights
from student_teacher.training import paper
from student_teacher.training.distillation import DenseDistillation, Distillation, PatchDistillation
from student_teacher.training.loop import SCHEDULES, Model, Training, forget
from student_teacher.training.optimiser import Optimiser, add_optimiser
from student_teacher.training.teaching import Decoder, Lesson, feature_moments, loss_weights

KIND = "teacher"
STEPS_BETWEEN_CHECKS = 500
# Defaults that depend on --distillation. Dense: a batch of views has some 10,000 descriptors; the weights were chosen
# on validation pictures. Patches: the paper's learning rate and losses.
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
        advice="set it to the students' size if that is small: a teacher should not learn detail that they can't see",
    )
    command_line.add_training(
        options, batch_size="4 dense, 64 of patches", learning_rate="0.02; of adam 2e-3 dense, 2e-4 of patches"
    )
    add_optimiser(options)
    options.add_argument(
        "--patch-size",
        type=int,
        choices=PATCH_SIZES,
        nargs="+",
        default=list(DEFAULT_PATCH_SIZES),
        help="side of a patch in pixels; give several to train several teachers. Small defects need small patches "
        "(default 33 65)",
    )
    options.add_argument(
        "--distillation",
        choices=tuple(DEFAULTS),
        default="dense",
        help="dense: all positions of a view at once, which learns far more in the same time; patches: the paper's "
        "way, one patch at a time (default dense)",
    )
    options.add_argument(
        "--steps",
        type=command_line.positive,
        help="number of training steps; raise it while the loss still falls. The paper takes 50,000 with patches "
        "(default 5000 dense, 10000 with patches)",
    )
    options.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="train on all pictures in DIR and its subfolders instead of the category's good images: many everyday "
        "pictures make a better teacher",
    )
    options.add_argument(
        "--start-from",
        type=Path,
        metavar="FILE",
        help="start from the teacher in FILE, such as one that ships, instead of random weights (dense distillation)",
    )
    add_losses(options)
    args = paper.TEACHER.parse(options, arguments)
    for name, value in DEFAULTS[args.distillation].items():
        if getattr(args, name) is None:
            setattr(args, name, value[args.optimiser] if isinstance(value, dict) else value)
    args.patch_size = sorted(set(args.patch_size))
    return args


def add_losses(options: ArgumentParser) -> None:
    """Add the options of the backbone, and the weights of the losses."""
    options.add_argument(
        "--backbone-size",
        type=command_line.positive,
        default=64,
        metavar="PIXELS",
        help="side in pixels to which patches are resized for the backbone (--distillation patches): larger is better, "
        "and slower by its square (default 64)",
    )
    options.add_argument(
        "--distillation-weight",
        type=command_line.not_negative,
        default=1.0,
        metavar="X",
        help="weight of the distillation loss (default 1)",
    )
    for name in ("metric", "compactness"):
        options.add_argument(
            f"--{name}-weight",
            type=command_line.not_negative,
            metavar="X",
            help=f"weight of the {name} loss; 0 leaves it out (default 0 dense, 1 with patches)",
        )
    backbone_weights.add_options(options, default="resnet18")


def model_path(args: Namespace, patch_size: int) -> Path:
    """The path of a patch size's teacher."""
    return args.model / args.category / f"teacher_{patch_size}.pt"


def train(args: Namespace, patch_size: int) -> None:
    """Train the teacher of one patch size and save it."""
    pictures = Source.of(args, patch_size)
    model = model_of(args, patch_size, pictures)
    if not args.restart and model.is_trained():
        return
    print(f"teacher of {patch_size} pixels, backbone: {model.settings['backbone']}, {len(pictures.paths)} pictures")
    where = device.choose(args.device)
    distillation = distillation_of(args, patch_size, pictures.adapted, where)
    size = command_line.image_size(args)
    learned, validation = (
        Pictures([pictures.paths[index] for index in part], size, value_range=pictures.value_range)
        for part in category.validation_split(len(pictures.paths), args.seed)
    )
    with device.autocast(where, args.precision):
        moments = feature_moments(distillation, learned, args)
    net = new_net(args, distillation, learned, pictures)
    decoder = Decoder(moments, args.descriptor_size, args.literal_losses).to(where)
    if args.restart:  # all sizes at once, so that after a stop the others are trained again, too
        forget(model_path(args, size) for size in args.patch_size)
        args.restart = False
    lesson = Lesson(net, decoder, distillation, args)
    training = learn(lesson, model, learned, validation)

    unexplained = lesson.unexplained_variance(validation)
    print(f"{unexplained:.3f} of the variance of the backbone's features is left unexplained on validation pictures")
    # float16 halves the file; students imitate the rounded teacher.
    teacher = net.folded().to(getattr(torch, args.saved_in)).cpu()
    content = {
        "patch_size": patch_size,
        "descriptor_size": args.descriptor_size,
        "paper": paper.TEACHER.changed(args) if args.paper else None,
        "net": teacher.state_dict(),
        "unexplained_variance": unexplained,
    }
    model.save(content, training)


class Source(NamedTuple):
    """The pictures and weights that a teacher is trained from."""

    paths: list[Path]  # of the pictures
    identity: dict  # of the pictures, for the settings
    value_range: ValueRange | None  # of pictures of more than 8 bits
    adapted: dict[str, Tensor] | None  # the backbone's weights from stage 1
    start: dict[str, Tensor] | None  # the teacher's weights to start from

    @classmethod
    def of(cls, args: Namespace, patch_size: int) -> Self:
        """From the command line. Raises UserError if something is missing."""
        if args.images:
            paths, value_range = category.pictures_in(args.images), None
            identity = {"images": category.digest_of(paths, contents=False)}
        else:
            dataset = category.good_images(args, None)
            paths, value_range = category.image_paths(dataset), dataset.value_range
            identity = category.identity_of(dataset)
        adapted = None if args.paper else backbone_weights.adapted_backbone(args)
        start = args.start_from and checkpoints.load(args.start_from, KIND, patch_size=patch_size)["net"]
        return cls(paths, identity, value_range, adapted, start)


def model_of(args: Namespace, patch_size: int, source: Source) -> Model:
    """The file of a teacher and its settings."""
    settings = {
        "seed": args.seed,
        "distillation": args.distillation,
        "batch_size": args.batch_size,
        "steps": args.steps,
        "optimiser": args.optimiser,
        "learning_rate": args.learning_rate,
        **source.identity,
        "precision": args.precision,
        "image_size": command_line.sides(args),
        "backbone": backbone_weights.backbone_name(args, source.adapted),
        "weights": loss_weights(args),
    } | paper.TEACHER.identity(args)
    if args.distillation == "patches":
        settings["backbone_size"] = args.backbone_size
    if source.start:
        settings["start_from"] = checkpoints.fingerprint(source.start)
    return Model(model_path(args, patch_size), KIND, args.category, settings)


def distillation_of(args: Namespace, patch_size: int, adapted: dict | None, where: torch.device) -> Distillation:
    """The distillation that --distillation names."""
    torch.manual_seed(args.seed)
    backbone = backbone_weights.backbone(args.backbone, args.backbone_weights, adapted)
    backbone = backbone.to(where, memory_format=device.memory_format(where))
    if args.distillation == "dense":
        return DenseDistillation(backbone, patch_size, where)
    seen_at = args.backbone_size or patch_size
    return PatchDistillation(backbone, patch_size, seen_at, where, square=args.square_zoom)


def new_net(args: Namespace, distillation: Distillation, learned: Pictures, source: Source) -> AnomalyNet:
    """The teacher before its training: with random weights, or those of --start-from."""
    where, patch_size = device.choose(args.device), distillation.patch_size
    layout = device.memory_format(where)
    torch.manual_seed(device.seed_of(args.seed, "teacher", patch_size))
    net = AnomalyNet(patch_size, args.distillation == "dense", args.descriptor_size).to(where, memory_format=layout)
    if source.start:
        trained = AnomalyNet(patch_size)
        trained.load_state_dict(source.start)
        batch = next(distillation.batches(learned, args.seed, range(1), args.batch_size))
        pixels = torch.cat(distributed.gathered(distillation.pixels(batch).cpu()))
        net.start_from(trained.to(where), pixels.to(where, memory_format=layout))
    SyncBatchNorm2d.convert(net)
    return net


def learn(lesson: Lesson, model: Model, learned: Pictures, validation: Pictures) -> Training:
    """Train the teacher, from the start or from the last checkpoint."""
    args, distillation = lesson.args, lesson.distillation
    optimiser = Optimiser((lesson.net, lesson.decoder), args.optimiser, args.learning_rate, args.weight_decay)
    parts = {"net": lesson.net, "decoder": lesson.decoder, "optimiser": optimiser}
    training = model.training(f"{KIND} training, {distillation.patch_size} pixels", parts, args.steps)
    batches = distillation.batches(learned, args.seed, range(training.step, args.steps), args.batch_size)
    for step, batch in zip(training, batches, strict=False):
        optimiser.zero_grad()
        loss, parts = lesson.learn(batch)
        optimiser.step(SCHEDULES[args.schedule](step, args.steps))
        training.report(loss, **parts)
        if (step + 1) % STEPS_BETWEEN_CHECKS == 0:
            training.note(validation=lesson.unexplained_variance(validation))
    return training


def main(arguments: list[str] | None = None) -> None:
    """Run stage 2."""
    args = parse_arguments(arguments)
    require_consistent(args)
    paper.TEACHER.show(args)
    for patch_size in args.patch_size:
        train(args, patch_size)


def require_consistent(args: Namespace) -> None:
    """Raise UserError if options contradict each other."""
    if args.paper and args.images is None:
        raise UserError(
            "--paper: the paper trains teachers on ImageNet, not on the category; give a folder of pictures, --images"
        )
    if args.batch_size < 2 and args.distillation == "patches" and (args.metric_weight or args.compactness_weight):
        raise UserError("--batch-size 1: metric learning and compactness need two patches or more")
    if not (args.distillation_weight or args.metric_weight or args.compactness_weight):
        raise UserError(
            "all weights are 0: raise one of --distillation-weight, --metric-weight and --compactness-weight"
        )
    if args.start_from and args.distillation == "patches":
        raise UserError("--start-from needs --distillation dense: the other trains without batch normalisation")
    if args.batch_size < distributed.processes():
        raise UserError(f"--batch-size {args.batch_size}: each of {distributed.processes()} processes needs at least 1")
    if args.start_from:
        if len(args.patch_size) > 1:
            raise UserError("--start-from: a teacher has one patch size, so give one --patch-size")
        if args.start_from.resolve() == model_path(args, args.patch_size[0]).resolve():
            raise UserError(
                f"--start-from {args.start_from}: it would be overwritten; copy it, or give another --model"
            )


if __name__ == "__main__":
    distributed.run(main)
