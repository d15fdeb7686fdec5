"""Stage 3: train students to imitate the teacher on anomaly-free images (section 3 of "Uninformed Students").

By default the teacher is a frozen backbone, and its students are fitted in about a minute: global ones in closed form,
which see the whole image, and local ones, which see the surroundings of a place. With --teacher patches it is the
paper's patch network, or several of them, and M students imitate each. The result, model/CATEGORY/detector.pt, has
everything that detection needs. With --paper all settings are as published.
"""

from dataclasses import dataclass, replace

from AnomalyNet import DEFAULT_PATCH_SIZES
from student_teacher.detection.Detector import VERSION, Calibration
from student_teacher.images import ignored
from student_teacher.images.category import GoodImages
from student_teacher.runtime import checkpoints, distributed
from student_teacher.runtime.errors import UserError
from student_teacher.runtime.files import make_folder
from student_teacher.runtime.settings import TrainingStage, image_size_option, option
from student_teacher.teachers import backbone_weights
from student_teacher.teachers.BackboneTeacher import seen_size
from student_teacher.training import backbone_students, paper, patch_students
from student_teacher.training.loop import FinishedParts, Model, checkpoint_of, require_same_settings

TEACHERS = ("backbone", "patches")
IMAGE_SIZES = {"backbone": (512,), "patches": (256,)}  # defaults
# Defaults of the options that are for patch teachers only.
PATCH_DEFAULTS = {
    "patch_size": DEFAULT_PATCH_SIZES,
    "students": 3,
    "epochs": None,
    "stride": 4,
    "optimiser": "muon",
    "batch_size": 4,
    "learning_rate": None,
}


@dataclass(frozen=True, kw_only=True)
class Settings(patch_students.PatchSettings):
    """The options of stage 3. None: the default depends on the teacher."""

    teacher: str | None = option(
        None,
        "backbone: a frozen backbone, without a teacher to train; fitting takes about a minute. patches: the paper's "
        "patch networks (default: patches if the category has a teacher from teacher_training.py, or if an option for "
        "patches is given; else backbone)",
        choices=TEACHERS,
    )
    image_size: tuple[int | None, ...] | None = image_size_option(
        None, "smaller is faster and misses small defects (default 512; 256 with --teacher patches)"
    )
    backbone: str = backbone_weights.backbone_option("efficientnet_lite0")
    backbone_weights: str = backbone_weights.weights_option()
    paper: bool = paper.paper_option()


def parse_arguments(arguments: list[str] | None = None) -> Settings:
    """Read the command line. The result's `teacher` is one of TEACHERS, or paper.TAUGHT with --paper."""
    return completed(paper.STUDENTS.parse(Settings, __doc__, arguments))[0]


def completed(settings: Settings) -> tuple[Settings, str]:
    """The settings with the teacher chosen and the defaults for it, and a line that names it and says why."""
    wanted = settings.patch_size or DEFAULT_PATCH_SIZES
    given = [f"--{name.replace('_', '-')}" for name in PATCH_DEFAULTS if getattr(settings, name) is not None]
    teacher = settings.teacher
    if settings.paper:
        if teacher == "backbone":
            raise UserError("--teacher backbone contradicts --paper, which has patch networks: leave one of them out")
        why = "as --paper says"
    elif teacher:
        why = "as --teacher says"
    elif given:
        teacher, why = "patches", f"as {given[0]} is for them"
    elif any((settings.models / f"teacher_{patch_size}.pt").exists() for patch_size in wanted):
        teacher, why = "patches", f"{settings.category} has a teacher of its own"
    else:
        teacher, why = "backbone", "no teacher of its own"
    if teacher == "backbone" and given:
        raise UserError(f"{given[0]} needs --teacher patches")
    chosen = {name: value for name, value in PATCH_DEFAULTS.items() if getattr(settings, name) is None}
    if settings.learning_rate is None:
        optimiser = settings.optimiser or PATCH_DEFAULTS["optimiser"]
        chosen["learning_rate"] = patch_students.LEARNING_RATES[optimiser]
    if settings.image_size is None:
        chosen["image_size"] = IMAGE_SIZES["backbone" if teacher == "backbone" else "patches"]
    shown = settings.backbone if teacher == "backbone" else f"patches of {', '.join(map(str, wanted))} pixels"
    return replace(settings, teacher=teacher, **chosen), f"teacher: {shown} ({why})"


def train_backbone_students(settings: Settings, images: GoodImages, before: dict | None) -> None:
    """Fit students to a frozen backbone and write detector.pt, unless it was made from the same `before`.

    Raises UserError if it was made from other settings.
    """
    adapted = backbone_weights.adapted_backbone(settings.models, settings.backbone)
    name = backbone_weights.backbone_name(settings.backbone, settings.backbone_weights, adapted)
    made_from = {"teacher": name} | settings.identity(TrainingStage) | images.identity
    checkpoint = checkpoint_of(settings.detector)
    if before is not None:
        require_same_settings(settings.detector, before, made_from)
        checkpoint.unlink(missing_ok=True)  # a kill may have come before it was removed
        print(f"{settings.detector} is trained already; --restart trains it again")
        return
    if settings.restart:
        checkpoint.unlink(missing_ok=True)
    backbone = backbone_weights.backbone(settings.backbone, settings.backbone_weights, adapted)
    size = seen_size(settings.size or images.common_size)
    versioned = made_from | {"detector_version": VERSION}
    parts = FinishedParts(Model(settings.detector, "unfinished detector", settings.category, versioned))
    networks, calibration = backbone_students.fit(
        backbone, size, images.decoded(size), settings.compute, ignored=images.ignored, parts=parts
    )
    content = {
        "image_size": list(size),
        "stride": networks.stride,
        "backbone": networks.to_checkpoint(settings.backbone),
    }
    save(settings, images, calibration, {"made_from": made_from} | content)
    parts.finish()


def train_patch_students(settings: Settings, images: GoodImages, before: list | None) -> None:
    """Train patch students, scale by scale, and write detector.pt, unless it was made from the same `before`."""
    fitted = patch_students.fit(settings, images, published=settings.teacher == paper.TAUGHT)
    if fitted.made_from == before:
        return
    content = {
        "made_from": fitted.made_from,
        "image_size": settings.size and list(settings.size),
        "stride": settings.stride,
        "scales": [patch_students.scale_to_checkpoint(scale.cpu()) for scale in fitted.networks.scales],
        "normalisation": settings.normalisation,
        "image_score": settings.image_score,
        "paper": paper.STUDENTS.changed(settings) + fitted.changed if settings.paper else None,
    }
    save(settings, images, fitted.calibrate(), content)


def made_from(settings: Settings) -> dict | list | None:
    """What detector.pt was made from; None if it is to be made: missing, of another version, --restart.

    Raises UserError if it has students of the other kind of teacher: it would be replaced unasked.
    """
    path = settings.detector
    if settings.restart or not path.exists():
        return None
    there = checkpoints.load(path, "detector", category=settings.category)
    if there.get("detector_version") != VERSION:
        return None
    if ("backbone" in there) != (settings.teacher == "backbone"):
        other = "a frozen backbone" if "backbone" in there else "patch teachers"
        raise UserError(f"{path} has students of {other}: add --restart to replace it, or keep both with --model DIR")
    return there["made_from"]


def save(settings: Settings, images: GoodImages, calibration: Calibration, content: dict) -> None:
    """Write detector.pt and print the guaranteed false-alarm rate."""
    content = {
        "detector_version": VERSION,
        "calibration": calibration.state_dict(),
        "value_range": images.dataset.value_range and list(images.dataset.value_range),
        "ignored": ignored.packed(images.ignored),
    } | content
    checkpoints.save(settings.detector, "detector", settings.category, content)
    print(calibration.promise())
    print(f"saved {settings.detector}: everything that detection needs")


def main(arguments: list[str] | None = None) -> None:
    """Run stage 3."""
    settings, teacher = completed(paper.STUDENTS.parse(Settings, __doc__, arguments))
    print(teacher)
    paper.STUDENTS.show(settings)
    train = train_backbone_students if settings.teacher == "backbone" else train_patch_students
    before = made_from(settings)
    if before is None:
        make_folder(settings.models)  # now, not after the training, is the time to hear of it
    train(settings, GoodImages(settings.images, settings.ignore, settings.index), before)
    print(f"next: python3 anomaly_detection.py {settings.category}")


if __name__ == "__main__":
    distributed.run(main)
