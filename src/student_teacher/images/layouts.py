"""The layouts of data sets, known by their folders: which images are to be learned from, which tested, where masks lie.

- MVTec AD, MVTec LOCO, BTAD: train/good, validation/good, test/KIND, ground_truth/KIND; BTAD calls good images "ok".
- MVTec AD 2: train/good, validation/good, test_public/KIND, test_public/ground_truth/KIND, and without labels
  test_private and test_private_mixed.
- VisA: Data/Images/Normal, Data/Images/Anomaly, Data/Masks/Anomaly, split by split_csv/1cls.csv beside the category.
- Folders named good and bad, OK and NG, or alike, with any folders below.

The mask of KIND/NAME.png is NAME.png or NAME_mask.png, of any ending, or a folder NAME of masks; or labelme's NAME.json
beside the image.
"""

import csv
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from student_teacher.images import labelme
from student_teacher.images.folders import IGNORED, entries, images_below, listed, told
from student_teacher.images.index import COLUMNS, LEARNED, UNLABELLED, place_of
from student_teacher.images.reading import file_and_page, is_image, pages_of, stem_of
from student_teacher.runtime.errors import UserError

# Names of folders, without case, spaces, hyphens and underscores.
GOOD = {"good", "ok", "normal", "pass", "passed", "io", "defectfree", "anomalyfree", "nondefective"}
BAD = {"bad", "ng", "nok", "ko", "nio", "notok", "notgood", "anomalous", "anomaly", "anomalies", "abnormal"}
BAD |= {"defect", "defects", "defective", "fail", "failed", "faulty", "reject", "rejected"}
PARTS = {"train": "train", "validation": "validation", "test": "test", "test_public": "test"}  # and the index's type
PRIVATE = ("test_private", "test_private_mixed")  # folder and type
MASKS = "ground_truth"
VISA_IMAGES, VISA_MASKS, VISA_SPLIT = "Data/Images", "Data/Masks", "split_csv/1cls.csv"
SPLIT_COLUMNS = ("object", "split", "label", "image", "mask")
TESTED = 0.2  # of the good images, where nothing says which ones
SEED = 0  # that these are drawn with


class Listing(NamedTuple):
    """What lies in a category's folder."""

    category: Path
    rows: list[dict[str, str | int]]  # of the index, in its columns and order
    problems: list[str]  # what is wrong, a line each
    others: list[Path]  # what is passed over
    layout: list[str]  # the layout in words, of which one line is made

    def add(self, image: Path, mask: Path | None, label: int, part: str) -> None:
        """Add an image's row; the paths lie in the category."""
        names = [path.relative_to(self.category).as_posix() if path else "" for path in (image, mask)]
        self.rows.append(dict(zip(COLUMNS, (*names, label, part), strict=True)))


def is_category(folder: Path) -> bool:
    """Whether the layout of a folder is one of those above."""
    names = [entry.name for place in (folder, folder / "train") for entry in entries(place) if entry.is_dir()]
    return any(_plain(name) in GOOD for name in names) or (folder / VISA_IMAGES).is_dir()


def split_file(category: Path, given: str | Path | None) -> Path | None:
    """The file that splits a category's images: the one that was given, or else VisA's beside it; None for none."""
    beside = category.parent / VISA_SPLIT
    return Path(given) if given else beside if (category / VISA_IMAGES).is_dir() and beside.is_file() else None


def list_images(category: Path, split_csv: str | Path | None = None) -> Listing:
    """What lies in a category's folder. `split_csv` is a file as VisA has it, for any layout, or None.

    Raises:
        UserError: there is nothing to train on, or the split can't be read or does not name the category.
    """
    found = Listing(category, [], [], [], [])
    names = {entry.name for entry in entries(category) if entry.is_dir()}
    split = split_file(category, split_csv)
    if split and _list_split(found, split, must=split_csv is not None):
        pass
    elif names & {*PARTS, *PRIVATE}:
        _list_parts(found)
    elif (category / VISA_IMAGES).is_dir():
        _list_classes(found, category / VISA_IMAGES, category / VISA_MASKS)
    elif any(_plain(name) in GOOD | BAD for name in names):
        _list_classes(found, category, category / MASKS)
    else:
        _list_nothing(found)
    if not found.problems and not any(row["type"] in LEARNED for row in found.rows):
        more = f"; {told(found.others, category)}" if found.others else ""
        raise UserError(f"{category / 'train' / 'good'}: no images to train on (PNG, JPEG, TIFF and others){more}")
    _refuse_twins(found)
    return found


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name.casefold())


def _list_parts(found: Listing) -> None:
    """MVTec AD and its relatives."""
    category = found.category
    for part, kind_type in PARTS.items():
        where = f"{part}/good" if kind_type in LEARNED else f"{part}/good or another folder"
        found.problems.extend(_loose(category / part, where, category))
        for kind in (entry for entry in entries(category / part) if entry.name != MASKS):
            if not kind.is_dir() or kind.name.startswith("."):
                found.others.extend([] if is_image(kind) else [kind])
                continue
            images = _images_in(found, kind)
            good = _plain(kind.name) in GOOD
            if images and not good and kind_type in LEARNED:
                found.problems.append(
                    f"{part}/{kind.name}: training takes good images only; move them to test/{kind.name}, or to "
                    "train/good if they are good"
                )
                continue
            own = category / part / MASKS
            masks = (own if own.is_dir() else category / MASKS) / kind.name
            _add(found, images, masks, label=int(not good), part=kind_type)
    for part in PRIVATE:
        images, others = images_below(category / part) if (category / part).is_dir() else ([], [])
        found.others.extend(others)
        for image in images:
            found.add(image, None, UNLABELLED, part)
    found.layout.extend(_names_of_parts(found))
    found.problems.extend(_loose(category, "train/good, to test/KIND, or out of the category", category))
    _refuse_others(found, category, {*PARTS, *PRIVATE, MASKS}, "train/good, to test/KIND, or out of the category")


def _names_of_parts(found):
    """Which of the data sets, and what goes with it."""
    there = {entry.name for entry in entries(found.category)}
    if "test_public" in there:
        yield "MVTec AD 2"
    elif "validation" in there or "defects_config.json" in there:
        yield "MVTec LOCO"
    else:
        good = {_plain(PurePosixPath(row["image_name"]).parent.name) for row in found.rows if row["type"] == "train"}
        yield "BTAD, train/ok" if good == {"ok"} else "MVTec AD"
    if "validation" in there:
        yield "students learn from validation/ as from train/"
    if private := [part for part in PRIVATE if part in there]:
        yield f"{' and '.join(private)} without labels, which no stage takes by itself"


def _images_in(found, folder):
    """The images of a folder that holds no others."""
    images = []
    for file in entries(folder):
        if file.is_dir() and not file.name.startswith("."):
            name = file.relative_to(found.category).as_posix()
            part = name.split("/")[0]
            found.problems.append(f"{name}: a folder where images are expected; move its images to {part}/NAME")
        elif is_image(file):
            images += pages_of(file)
        else:
            found.others.append(file)
    return images


def _add(found, images, masks, *, label, part):
    """Add images of one kind, in one folder, with the masks of another one and those beside them."""
    by_stem = {}
    if part not in LEARNED:
        for file in entries(masks):
            if file.is_dir() and not file.name.startswith("."):  # MVTec LOCO: a file for each region
                by_stem[file.name] = file
            elif is_image(file):
                by_stem |= {stem_of(page): page for page in pages_of(file)}
            else:
                found.others.append(file)
    unused = set(by_stem.values())
    for image in images:
        stem = stem_of(image)
        name, mark, page = stem.partition("#")  # of several pages: a mask for each, in one file or in several
        named = (by_stem.get(each) for each in (f"{stem}_mask", f"{name}_mask{mark}{page}", stem))
        mask = next((each for each in named if each), None) if label else None
        beside = image.with_name(stem + labelme.SUFFIX)
        if label and mask is None and beside in found.others and labelme.is_labelme(beside):
            mask = beside
            found.others.remove(beside)
        unused.discard(mask)
        found.add(image, mask, label, part)
    found.others.extend(sorted(unused))  # masks of no image


def _list_classes(found: Listing, root: Path, masks: Path) -> None:
    """Folders of good images and of bad ones, in `root`, without a split."""
    classes = [entry for entry in entries(root) if entry.is_dir() and _plain(entry.name) in GOOD | BAD]
    where = f"{classes[0].name} or another folder" if classes else "a folder OK or NG"
    found.problems.extend(_loose(root, where, found.category))
    groups = {0: {}, 1: {}}  # label -> folder -> its images
    for folder in classes:
        images, others = images_below(folder)
        found.others.extend(others)
        for image in images:
            groups[int(_plain(folder.name) in BAD)].setdefault(image.parent, []).append(image)
    good, bad = ([image for images in groups[label].values() for image in images] for label in (0, 1))
    names = {image: image.relative_to(root).as_posix() for image in good}
    tested = drawn_for_test(list(names.values())) if bad else set()
    for image in sorted(good, key=lambda image: names[image] in tested):  # those for training first
        found.add(image, None, 0, "test" if names[image] in tested else "train")
    for folder, images in groups[1].items():
        _add(found, images, masks / folder.relative_to(root), label=1, part="test")
    found.layout.append(
        f"folders {' and '.join(folder.name for folder in classes)}, with no split into training and testing"
        if root == found.category
        else f"VisA, without {VISA_SPLIT} beside it"
    )
    found.layout.append(
        f"{len(tested)} of {len(good)} good images, drawn with seed {SEED}, and all bad ones are for testing"
        if bad
        else "all good images are for training"
    )
    _refuse_others(found, root, {*(folder.name for folder in classes), masks.name}, "a folder OK or NG")


def drawn_for_test(names: Sequence[str]) -> set[str]:
    """The fifth of the names that is tested on, where nothing says which; none of fewer than 3.

    Ordered by their digests with SEED: names that come or go change little of the rest.
    """

    def digest(name):
        return hashlib.sha256(f"{SEED} {name}".encode(errors="replace")).digest()

    number = max(1, round(TESTED * len(names))) if len(names) >= 3 else 0
    return set(sorted(names, key=digest)[:number])


def _list_split(found: Listing, split: Path, must: bool) -> bool:
    """The images that a file as VisA's names for this category: whether there are any; `must`: raises UserError."""
    category, lines = found.category, _read_split(split)
    ours = [line for line in lines if line["object"] == category.name]
    if not ours and must:
        objects = listed(sorted({str(line["object"]) for line in lines})) or "none"
        raise UserError(f"{split}: names no images of {category.name}, but of {objects}; call the category as it does")
    for line in ours:
        image, mask, part = line["image"], line["mask"], line["split"]
        if wrong := _wrong_in(line):
            found.problems.append(f"{split}: {image}: {wrong}; correct that line")
            continue
        paths = [category / name.removeprefix(f"{category.name}/") if name else None for name in (image, mask)]
        found.add(*paths, int(_plain(line["label"]) in BAD), part)
    if ours:
        images = category / VISA_IMAGES
        found.layout.append(f"{'VisA, ' if images.is_dir() else ''}split by {split}")
        named = {category / row[column] for row in found.rows for column in ("image_name", "gt_name") if row[column]}
        named |= {file_and_page(path)[0] for path in named} | {category / IGNORED}
        there = images_below(images if images.is_dir() else category)[0]
        found.others.extend(path for path in there if not named & {path, file_and_page(path)[0], *path.parents})
    return bool(ours)


def _read_split(split):
    try:
        with split.open(newline="", encoding="utf-8-sig") as file:
            return [{name: line[name] for name in SPLIT_COLUMNS} for line in csv.DictReader(file)]
    except OSError as error:
        way = "--split-csv FILE names another, --split-csv auto none"
        raise UserError(f"{split}: cannot be read ({error.strerror}); {way}") from None
    except (KeyError, ValueError, csv.Error):
        raise UserError(f"{split}: not a split as VisA's, with columns {', '.join(SPLIT_COLUMNS)}") from None


def _wrong_in(line):
    """What is wrong in a line of a split; nothing if all is well."""
    label, part = _plain(line["label"] or ""), line["split"]
    if part not in (*LEARNED, "test"):
        return f"split {part!r} is none of {', '.join((*LEARNED, 'test'))}"
    if label not in GOOD | BAD:
        return f"label {line['label']!r} is neither normal nor anomaly"
    if label in BAD and part in LEARNED:
        return f"an anomaly in {part}, which takes good images only"
    for name in filter(None, (line["image"], line["mask"])):
        if Path(name).anchor or ".." in Path(name).parts:
            return f"{name} leads out of the category"
    return "" if line["image"] else "names no image"


def _list_nothing(found):
    """No layout is known: say of all images that lie there what to do."""
    found.problems.extend(_loose(found.category, "train/good if good, to test/KIND if not", found.category))
    _refuse_others(found, found.category, set(), "train/good if good, to test/KIND if not")


def _loose(folder, where, category):
    """A problem where images lie in a folder that should hold folders of them."""
    files = [file for file in entries(folder) if file != category / IGNORED and not file.is_dir()]
    images = [file.relative_to(category).as_posix() for file in files if is_image(file)]
    verb = "lies in no folder; move it" if len(images) == 1 else "lie in no folder; move them"
    return [f"{listed(images)}: {verb} to {where}"] if images else []


def _refuse_others(found, root, known, where):
    """Add a problem for each folder that holds images and is not known."""
    for folder in entries(root):
        if folder.is_dir() and folder.name not in known and not folder.name.startswith("."):
            images, _ = images_below(folder)
            number = "1 image" if len(images) == 1 else f"{len(images)} images"
            name = folder.relative_to(found.category).as_posix()
            if images:
                found.problems.append(f"{name}: {number} in a folder that no layout has; move them to {where}")


def _refuse_twins(found):
    """Add a problem for each test image that has the name of another, but for the ending: results are named by it."""
    seen = {}
    for row in found.rows:
        if row["type"] == "test":
            name = row["image_name"]
            first = seen.setdefault(place_of(name).with_name(stem_of(name)), name)
            if first != name:
                found.problems.append(f"{name}: has the name of {first}, but for the ending; rename one")
