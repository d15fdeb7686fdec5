"""Stage 2: distil the backbone into the teacher, a small network that describes patches.

It is trained with up to three losses (section 3.1 of "Uninformed Students"): knowledge distillation from the backbone's
features, metric learning and descriptor compactness. The teachers that ship with the project work for any category;
this stage trains others, on a category's own good images or on any pictures:

    teacher_training.py pretrained --images DIR --backbone efficientnet_lite0 --patch-size 17 33 65 --restart

replaces those that ship (category "pretrained"); with a category's name the teacher is for that category only. --paper
trains as in the paper, where --images are ImageNet's.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from AnomalyNet import DEFAULT_PATCH_SIZES, DESCRIPTOR_SIZE, PATCH_SIZES, AnomalyNet
from student_teacher.images import category, preprocessing
from student_teacher.images.ignored import ignore_option
from student_teacher.images.pictures import Pictures
from student_teacher.images.reading import ValueRange
from student_teacher.runtime import checkpoints, command_line, device, distributed
from student_teacher.runtime.errors import UserError
from student_teacher.runtime.files import make_folder
from student_teacher.runtime.settings import image_size_option, learning_rate_option, option
from student_teacher.runtime.SyncBatchNorm2d import SyncBatchNorm2d
from student_teacher.teachers import backbone_weights
from student_teacher.training import paper
from student_teacher.training.distillation import DenseDistillation, Distillation, PatchDistillation
from student_teacher.training.loop import SCHEDULES, Model, Training, forget
from student_teacher.training.optimiser import WEIGHT_DECAY, Optimiser, optimiser_option
from student_teacher.training.teaching import Decoder, Lesson, LossSettings, feature_moments

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


@dataclass(frozen=True, kw_only=True)
class Settings(LossSettings):
    """The options of stage 2, and what --paper changes besides. None: see DEFAULTS."""

    image_size: tuple[int | None, ...] = image_size_option(
        (None,),
        "set it to the students' size if that is small: a teacher should not learn detail that they can't see (default "
        "native)",
    )
    learning_rate: float | None = learning_rate_option(None, "0.02; of adam 2e-3 dense, 2e-4 of patches")
    optimiser: str = optimiser_option()
    patch_size: tuple[int, ...] = option(
        DEFAULT_PATCH_SIZES,
        "side of a patch in pixels; give several to train several teachers. Small defects need small patches (default "
        "33 65)",
        type=int,
        choices=PATCH_SIZES,
        nargs="+",
    )
    distillation: str = option(
        "dense",
        "dense: all positions of a view at once, which learns far more in the same time; patches: the paper's way, one "
        "patch at a time (default dense)",
        identity=True,
        choices=tuple(DEFAULTS),
    )
    steps: int | None = option(
        None,
        "number of training steps; raise it while the loss still falls. The paper takes 50,000 with patches (default "
        "5000 dense, 10000 with patches)",
        identity=True,
        type=command_line.positive,
    )
    pictures: Path | None = option(
        None,
        "train on all pictures in DIR and its subfolders instead of the category's good images: many everyday pictures "
        "make a better teacher",
        name="--images",
        type=Path,
        metavar="DIR",
    )
    start_from: Path | None = option(
        None,
        "start from the teacher in FILE, such as one that ships, instead of random weights (dense distillation)",
        type=Path,
        metavar="FILE",
    )
    backbone_size: int | None = option(
        64,
        "side in pixels to which patches are resized for the backbone (--distillation patches): larger is better, and "
        "slower by its square (default 64)",
        type=command_line.positive,
        metavar="PIXELS",
    )
    backbone: str = backbone_weights.backbone_option("resnet18")
    backbone_weights: str = backbone_weights.weights_option()
    ignore: Path | None = ignore_option()
    paper: bool = paper.paper_option()
    descriptor_size: int = DESCRIPTOR_SIZE
    square_zoom: bool = False  # the paper's zoom to equal width and height changes the shape of what is seen
    weight_decay: float = WEIGHT_DECAY
    schedule: str = "cosine"
    saved_in: str = "float16"  # half the file; students imitate the rounded teacher

    def path(self, patch_size: int) -> Path:
        """The file of a patch size's teacher."""
        return self.models / f"teacher_{patch_size}.pt"


def parse_arguments(arguments: list[str] | None = None) -> Settings:
    """Read the command line."""
    settings = paper.TEACHER.parse(Settings, __doc__, arguments)
    chosen = {"patch_size": tuple(sorted(set(settings.patch_size)))}
    for name, value in DEFAULTS[settings.distillation].items():
        if getattr(settings, name) is None:
            chosen[name] = value[settings.optimiser] if isinstance(value, dict) else value
    return replace(settings, **chosen)


def require_consistent(settings: Settings) -> None:
    """Raise UserError if options contradict each other."""
    if settings.paper and settings.pictures is None:
        raise UserError(
            "--paper: the paper trains teachers on ImageNet, not on the category; give a folder of pictures, --images"
        )
    if settings.ignore and settings.pictures:
        raise UserError("--ignore is for the category's own images: leave it out with --images")
    of_pairs = settings.metric_weight or settings.compactness_weight
    if settings.batch_size < 2 and settings.distillation == "patches" and of_pairs:
        raise UserError("--batch-size 1: metric learning and compactness need two patches or more")
    if not any(settings.weights.values()):
        raise UserError(
            "all weights are 0: raise one of --distillation-weight, --metric-weight and --compactness-weight"
        )
    processes = distributed.processes()
    if settings.batch_size < processes:
        raise UserError(f"--batch-size {settings.batch_size}: each of {processes} processes needs at least 1")
    if settings.start_from is None:
        return
    if settings.distillation == "patches":
        raise UserError("--start-from needs --distillation dense: the other trains without batch normalisation")
    if len(settings.patch_size) > 1:
        raise UserError("--start-from: a teacher has one patch size, so give one --patch-size")
    if settings.start_from.resolve() == settings.path(settings.patch_size[0]).resolve():
        raise UserError(
            f"--start-from {settings.start_from}: it would be overwritten; copy it, or give another --model"
        )


class Source(NamedTuple):
    """The pictures and weights that teachers are trained from."""

    paths: list[Path]  # of the pictures
    identity: dict  # of the pictures
    value_range: ValueRange | None  # of pictures of more than 8 bits
    ignored: np.ndarray | None  # regions to ignore (h,w), of the category's own images alone
    adapted: dict[str, Tensor] | None  # the backbone's weights from stage 1
    start: dict[str, Tensor] | None  # the teacher's weights to start from

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """What the settings name. Raises UserError if something is missing."""
        if settings.pictures:
            paths, value_range, ignored = category.pictures_in(settings.pictures), None, None
            identity = {"images": category.digest_of(paths, contents=False)}
        else:
            images = category.GoodImages(settings.images, settings.ignore, settings.index)
            paths, value_range, ignored = images.paths, images.dataset.value_range, images.ignored
            identity = images.identity
        adapted = start = None
        if not settings.paper:
            adapted = backbone_weights.adapted_backbone(settings.models, settings.backbone)
        if settings.start_from:
            start = checkpoints.load(settings.start_from, KIND, patch_size=settings.patch_size[0])["net"]
        return cls(paths, identity, value_range, ignored, adapted, start)

    def pictures(self, size: preprocessing.Size, seed: int) -> tuple[Pictures, Pictures]:
        """The pictures to train on, and those for validation."""
        parts = category.validation_split(len(self.paths), seed)
        training, validation = (
            Pictures([self.paths[index] for index in part], size, value_range=self.value_range, ignored=self.ignored)
            for part in parts
        )
        return training, validation


def model_of(settings: Settings, patch_size: int, source: Source) -> Model:
    """The file of a teacher, and what it was made from."""
    made_from = settings.identity() | {
        **source.identity,
        "backbone": backbone_weights.backbone_name(settings.backbone, settings.backbone_weights, source.adapted),
        "weights": settings.weights,
    }
    if settings.distillation == "patches":
        made_from["backbone_size"] = settings.backbone_size
    if source.start:
        made_from["start_from"] = checkpoints.fingerprint(source.start)
    return Model(settings.path(patch_size), KIND, settings.category, made_from | paper.TEACHER.identity(settings))


def distillation_of(settings: Settings, patch_size: int, source: Source) -> Distillation:
    """The distillation that --distillation names."""
    torch.manual_seed(settings.seed)
    compute = settings.compute
    backbone = backbone_weights.backbone(settings.backbone, settings.backbone_weights, source.adapted)
    backbone = compute.place(backbone)
    if settings.distillation == "dense":
        return DenseDistillation(backbone, patch_size, compute.where)
    seen_at = settings.backbone_size or patch_size
    return PatchDistillation(backbone, patch_size, seen_at, compute.where, square=settings.square_zoom)


def new_net(settings: Settings, distillation: Distillation, pictures: Pictures, source: Source) -> AnomalyNet:
    """The teacher before its training: with random weights, or those of --start-from."""
    compute, patch_size = settings.compute, distillation.patch_size
    torch.manual_seed(device.seed_of(settings.seed, "teacher", patch_size))
    net = compute.place(AnomalyNet(patch_size, settings.distillation == "dense", settings.descriptor_size))
    if source.start:
        trained = AnomalyNet(patch_size)
        trained.load_state_dict(source.start)
        batch = next(distillation.batches(pictures, settings.seed, range(1), settings.batch_size))
        pixels = torch.cat(distributed.gathered(distillation.pixels(batch).cpu()))
        pixels = pixels.to(compute.where, memory_format=device.memory_format(compute.where))
        net.start_from(trained.to(compute.where), pixels)
    SyncBatchNorm2d.convert(net)
    return net


def learn(lesson: Lesson, model: Model, pictures: Pictures, validation: Pictures) -> Training:
    """Train the teacher, from the start or from the last checkpoint."""
    settings, distillation = lesson.settings, lesson.distillation
    networks = lesson.net, lesson.decoder
    optimiser = Optimiser(networks, settings.optimiser, settings.learning_rate, settings.weight_decay)
    parts = {"net": lesson.net, "decoder": lesson.decoder, "optimiser": optimiser}
    training = model.training(f"{KIND} training, {distillation.patch_size} pixels", parts, settings.steps)
    batches = distillation.batches(pictures, settings.seed, range(training.step, settings.steps), settings.batch_size)
    for step, batch in zip(training, batches, strict=False):
        optimiser.zero_grad()
        loss, parts = lesson.learn(batch)
        optimiser.step(SCHEDULES[settings.schedule](step, settings.steps))
        training.report(loss, **parts)
        if (step + 1) % STEPS_BETWEEN_CHECKS == 0:
            training.note(validation=lesson.unexplained_variance(validation))
    return training


def train(settings: Settings, patch_size: int, source: Source, replaced: Iterable[Path]) -> None:
    """Train the teacher of one patch size and save it; remove the models `replaced` when the training begins."""
    model = model_of(settings, patch_size, source)
    if not settings.restart and model.is_trained():
        return
    make_folder(settings.models)  # now, not after the features are measured, is the time to hear of it
    print(f"teacher of {patch_size} pixels, backbone: {model.settings['backbone']}, {len(source.paths)} pictures")
    distillation = distillation_of(settings, patch_size, source)
    pictures, validation = source.pictures(settings.size, settings.seed)
    with settings.compute.autocast():
        moments = feature_moments(distillation, pictures, settings)
    net = new_net(settings, distillation, pictures, source)
    decoder = Decoder(moments, settings.descriptor_size, settings.literal_losses).to(settings.compute.where)
    forget(replaced)
    lesson = Lesson(net, decoder, distillation, settings)
    training = learn(lesson, model, pictures, validation)

    unexplained = lesson.unexplained_variance(validation)
    print(f"{unexplained:.3f} of the variance of the backbone's features is left unexplained on validation pictures")
    teacher = net.folded().to(getattr(torch, settings.saved_in)).cpu()
    content = {
        "patch_size": patch_size,
        "descriptor_size": settings.descriptor_size,
        "paper": paper.TEACHER.changed(settings) if settings.paper else None,
        "net": teacher.state_dict(),
        "unexplained_variance": unexplained,
    }
    model.save(content, training)


def main(arguments: list[str] | None = None) -> None:
    """Run stage 2."""
    settings = parse_arguments(arguments)
    require_consistent(settings)
    paper.TEACHER.show(settings)
    source = Source.of(settings)
    # All sizes at once, so that after a stop the others are trained again, too.
    replaced = [settings.path(patch_size) for patch_size in settings.patch_size] if settings.restart else []
    for patch_size in settings.patch_size:
        train(settings, patch_size, source, replaced)
        replaced = []


if __name__ == "__main__":
    distributed.run(main)
