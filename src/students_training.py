"""Stage 3: train students to imitate the teacher on anomaly-free images (section 3 of "Uninformed Students").

By default the teacher is a frozen backbone, and its students are fitted in about a minute: global ones in closed form,
which see the whole image, and local ones, which see the surroundings of a place. With --teacher patches it is the
paper's patch network, or several of them, and M students imitate each. The result, model/CATEGORY/detector.pt, has
everything that detection needs. With --paper all settings are as published.
"""

from argparse import Namespace

from AnomalyNet import DEFAULT_PATCH_SIZES, PATCH_SIZES
from student_teacher.detection.Detector import VERSION, Calibration
from student_teacher.images import category, ignored
from student_teacher.images.index import read_settings
from student_teacher.images.store import ImageStore
from student_teacher.runtime import checkpoints, command_line, distributed
from student_teacher.runtime.errors import UserError
from student_teacher.teachers import backbone_weights
from student_teacher.teachers.BackboneTeacher import seen_size
from student_teacher.training import backbone_students, paper, patch_students
from student_teacher.training.loop import require_same_settings
from student_teacher.training.optimiser import add_optimiser

TEACHERS = ("backbone", "patches")
BACKBONE_SIZE, PATCHES_SIZE = 512, 256  # default sides to which images are resized
# Options for patch teachers only, with their defaults.
PATCH_OPTIONS = {
    "patch_size": list(DEFAULT_PATCH_SIZES),
    "students": 3,
    "epochs": None,
    "stride": 4,
    "optimiser": "muon",
    "batch_size": 4,
    "learning_rate": None,
}


def parse_arguments(arguments: list[str] | None = None) -> Namespace:
    """Read the command line. The result's `teacher` is one of TEACHERS, or paper.TAUGHT with --paper."""
    options = command_line.parser(__doc__)
    options.add_argument(
        "--teacher",
        choices=TEACHERS,
        help="backbone: a frozen backbone, without a teacher to train; fitting takes about a minute. patches: the "
        "paper's patch networks (default: patches if the category has a teacher from teacher_training.py, or if an "
        "option for patches is given; else backbone)",
    )
    command_line.add_image_size(options, default=None, otherwise="512; 256 with --teacher patches")
    command_line.add_training(options, batch_size="4", learning_rate="0.05; of adam 1e-3")
    add_optimiser(options, default=None)
    ignored.add_option(options)
    backbone_weights.add_options(options, default="efficientnet_lite0")
    patches = options.add_argument_group("with --teacher patches, like --batch-size, --learning-rate and --optimiser")
    patches.add_argument(
        "--patch-size",
        type=int,
        choices=PATCH_SIZES,
        nargs="+",
        help="side of a patch in pixels; several make a detector of several scales (default 33 65)",
    )
    patches.add_argument(
        "--students",
        type=command_line.positive,
        help="1 is fastest, but has no predictive variance; the paper takes 3 (default 3)",
    )
    patches.add_argument(
        "--epochs",
        type=command_line.positive_real,
        help="passes over the images, may be fractional; raise it while the validation loss still falls; the paper "
        f"takes 100 (default: as many as make {patch_students.VISITS:,} images in all)",
    )
    command_line.add_stride(patches, default=4, stored=None)
    return _completed(paper.STUDENTS.parse(options, arguments))


def _completed(args):
    """Choose the teacher, and fill in the defaults for it."""
    wanted = args.patch_size or PATCH_OPTIONS["patch_size"]
    own = [args.model / args.category / f"teacher_{patch_size}.pt" for patch_size in wanted]
    given = [f"--{name.replace('_', '-')}" for name in PATCH_OPTIONS if getattr(args, name) is not None]
    if args.paper:
        if args.teacher == "backbone":
            raise UserError("--teacher backbone contradicts --paper, which has patch networks: leave one of them out")
        why = "as --paper says"
    elif args.teacher:
        why = "as --teacher says"
    elif given:
        args.teacher, why = "patches", f"as {given[0]} is for them"
    else:
        args.teacher = "patches" if any(path.exists() for path in own) else "backbone"
        why = f"{args.category} has a teacher of its own" if args.teacher == "patches" else "no teacher of its own"
    if args.teacher == "backbone" and given:
        raise UserError(f"{given[0]} needs --teacher patches")
    for name, value in PATCH_OPTIONS.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.teacher == "patches":
        args.learning_rate = args.learning_rate or patch_students.LEARNING_RATES[args.optimiser]
    args.image_size = args.image_size or [BACKBONE_SIZE if args.teacher == "backbone" else PATCHES_SIZE]
    shown = args.backbone if args.teacher == "backbone" else f"patches of {', '.join(map(str, wanted))} pixels"
    args.shown_teacher = f"teacher: {shown} ({why})"
    return args


def train_backbone_students(args: Namespace, before: dict | None) -> None:
    """Fit students to a frozen backbone and write detector.pt, unless it was made from the same `before`.

    Raises UserError if it was made from other settings.
    """
    dataset = category.good_images(args, None)
    adapted = backbone_weights.adapted_backbone(args)
    settings = {
        "teacher": backbone_weights.backbone_name(args, adapted),
        "seed": args.seed,
        "image_size": command_line.sides(args),
        "precision": args.precision,
        **category.identity_of(dataset),
    }
    path = args.model / args.category / "detector.pt"
    if before is not None:
        require_same_settings(path, before, settings)
        print(f"{path} is trained already; --restart trains it again")
        return
    size = seen_size(command_line.image_size(args) or category.size_of_all(dataset))
    backbone = backbone_weights.backbone(args.backbone, args.backbone_weights, adapted)
    dataset = category.good_images(args, size)
    store = ImageStore(lambda index: dataset[index]["image"], len(dataset))
    indices = list(range(len(dataset)))
    networks, calibration = backbone_students.fit(backbone, size, store, indices, args, ignored=dataset.ignored)
    content = {"image_size": list(size), "stride": networks.stride, "backbone": networks.to_checkpoint(args.backbone)}
    save(path, args, settings, calibration, content)


def train_patch_students(args: Namespace, before: list | None) -> None:
    """Train patch students, scale by scale, and write detector.pt, unless it was made from the same `before`."""
    path = args.model / args.category / "detector.pt"
    fitted = patch_students.fit(args)
    changed = paper.STUDENTS.changed(args) + fitted.changed if args.paper else None
    if fitted.made_from == before:
        return
    size = command_line.image_size(args)
    calibration = fitted.calibrate()
    content = {
        "image_size": size and list(size),
        "stride": args.stride,
        "scales": [patch_students.scale_to_checkpoint(scale.cpu()) for scale in fitted.networks.scales],
        "normalisation": args.normalisation,
        "image_score": args.image_score,
        "paper": changed,
    }
    save(path, args, fitted.made_from, calibration, content)


def made_from(args: Namespace) -> dict | list | None:
    """The settings that detector.pt was made from; None if it is to be made: missing, of another version, --restart.

    Raises UserError if it has students of the other kind of teacher: it would be replaced unasked.
    """
    path = args.model / args.category / "detector.pt"
    if args.restart or not path.exists():
        return None
    there = checkpoints.load(path, "detector", category=args.category)
    if there.get("detector_version") != VERSION:
        return None
    if ("backbone" in there) != (args.teacher == "backbone"):
        other = "a frozen backbone" if "backbone" in there else "patch teachers"
        raise UserError(f"{path} has students of {other}: add --restart to replace it, or keep both with --model DIR")
    return there["made_from"]


def save(path, args: Namespace, settings, calibration: Calibration, content: dict) -> None:
    """Write detector.pt and print the guaranteed false-alarm rate."""
    content = {
        "detector_version": VERSION,
        "made_from": settings,
        "calibration": calibration.state_dict(),
        "value_range": read_settings(args.data / args.category)["value_range"],
        "ignored": ignored.packed(ignored.load(args.data / args.category, args.ignore)),
    } | content
    checkpoints.save(path, "detector", args.category, content)
    print(calibration.promise())
    print(f"saved {path}: everything that detection needs")


def main(arguments: list[str] | None = None) -> None:
    """Run stage 3."""
    args = parse_arguments(arguments)
    print(args.shown_teacher)
    paper.STUDENTS.show(args)
    train = train_backbone_students if args.teacher == "backbone" else train_patch_students
    train(args, made_from(args))
    print(f"next: python3 anomaly_detection.py {args.category}")


if __name__ == "__main__":
    distributed.run(main)
