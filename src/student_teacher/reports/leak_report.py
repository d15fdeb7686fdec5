"""How many test images show a part that is in training, and what knowing that alone is worth."""

import csv
import hashlib
import io
import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse.csgraph import connected_components

from AnomalyDataset import AnomalyDataset
from student_teacher.evaluation.metrics import au_roc
from student_teacher.images.index import LEARNED, kind_of
from student_teacher.images.layouts import SPLIT_COLUMNS
from student_teacher.images.leaks import ALIKE, correlations, grey_thumbnail, thumbnails
from student_teacher.runtime.errors import UserError
from student_teacher.runtime.files import write_atomically

ALL, GOOD = "all", "good"
SHOWN = 3  # pairs of images


class Seen(NamedTuple):
    """The test images of one kind, or all of them."""

    kind: str
    images: int
    seen_before: int  # of these, show a part that is in training
    image_au_roc: float | None  # of "not seen before", against the good test images; None without good and defective


class Leaks(NamedTuple):
    """The test images of a category against its training images."""

    kinds: list[Seen]  # of all images, of good ones, and of each kind of defect
    pairs: list[tuple[str, str, float]]  # those most alike: test image, training image, correlation


def find_leaks(category: Path, index: Path | None = None) -> Leaks:
    """Compare each test image with all training images, by `images.leaks`.

    The image score of "not seen before" is 1 minus the highest correlation with a training image. `index`: as of
    AnomalyDataset.

    Raises:
        UserError: the category has no index, or no test images; an image is broken.
    """
    (good, test), (of_good, of_test) = _both_sides(category, index)
    highest, nearest = (found.numpy() for found in correlations(of_test, of_good).max(1))
    labels = np.array([row["label"] for row in test.rows])
    kinds = np.array([kind_of(row) for row in test.rows])
    rows = []
    for kind in (ALL, *sorted(set(kinds), key=lambda kind: (kind != GOOD, kind))):
        chosen = np.ones_like(labels, bool) if kind == ALL else kinds == kind
        against = chosen | (labels == 0)
        both = labels[chosen].any() and not labels[against].all()
        score = au_roc(1 - highest[against], labels[against]) if both else None
        rows.append(Seen(kind, int(chosen.sum()), int((highest[chosen] > ALIKE).sum()), score))
    pairs = [
        (test.rows[index]["image_name"], good.rows[nearest[index]]["image_name"], float(highest[index]))
        for index in np.argsort(-highest)
        if highest[index] > ALIKE
    ]
    return Leaks(rows, pairs)


def _both_sides(category, index):
    """What is learned from and what is tested on, as datasets and as thumbnails."""
    sets = [AnomalyDataset(category, grey_thumbnail, index=index, type=part) for part in (LEARNED, "test")]
    if not sets[1].rows:
        raise UserError(f"{category} has no test images that training could know")
    return sets, thumbnails(*sets)


def split_by_parts(category: Path, index: Path | None = None) -> tuple[list[dict[str, str | int]], int]:
    """The rows of a category's index, split so that no part is both learned from and tested on; and how many moved.

    Images of the same part are those that are connected by thumbnails that correlate by more than ALIKE. Parts with
    a defective image are tested on. Of the parts on both sides, the others are tested on in a random but fixed order
    until as many good images are tested on as before; the rest is learned from. All other images stay.

    Raises:
        UserError: as `find_leaks`; or nearly all images would be one part.
    """
    sets, shown = _both_sides(category, index)
    rows = [dict(row) for dataset in sets for row in dataset.rows]
    shown = torch.cat(shown)
    alike = correlations(shown, shown) > ALIKE
    number, part_of = connected_components(alike.numpy(), directed=False)
    parts = [[rows[index] for index in np.flatnonzero(part_of == part)] for part in range(number)]
    if max(map(len, parts)) > len(rows) / 2:
        raise UserError(f"{category}: more than half of the images look like one part, so there is nothing to split by")
    before = [row["type"] for row in rows]
    wanted = sum(row["type"] == "test" and row["label"] == 0 for row in rows)
    for part in parts:
        if any(row["label"] for row in part):
            _put(part, "test")
    tested = sum(row["label"] == 0 for part in parts if not _is_mixed(part) for row in part if row["type"] == "test")
    mixed = sorted(filter(_is_mixed, parts), key=lambda part: hashlib.sha256(part[0]["image_name"].encode()).digest())
    for part in mixed:
        _put(part, "test" if tested + len(part) <= wanted else "train")
        tested += len(part) if part[0]["type"] == "test" else 0
    return rows, sum(row["type"] != old for row, old in zip(rows, before, strict=True))


def _is_mixed(part):
    return len({row["type"] in LEARNED for row in part}) > 1


def _put(part, where):
    """Bring a part to one side; what lies on that side already stays as it is."""
    for row in part:
        if (row["type"] in LEARNED) != (where in LEARNED):
            row["type"] = where


def write_split(category: Path, path: Path, index: Path | None = None) -> str:
    """Write a split by parts for --split-csv, and return a line that says what was done.

    Raises UserError as `split_by_parts`, and if the file is there already.
    """
    if path.exists():
        raise UserError(f"{path} is there already: move it away, or give another name")
    rows, moved = split_by_parts(category, index)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(SPLIT_COLUMNS)
    for row in rows:
        names = [f"{category.name}/{row[name]}" if row[name] else "" for name in ("image_name", "gt_name")]
        writer.writerow([category.name, row["type"], "anomaly" if row["label"] else "normal", *names])
    write_atomically(path, os.fsencode(text.getvalue()))
    count = Counter((row["type"] == "test", bool(row["label"])) for row in rows)
    use = f"./mvtec_dataset.sh {category.name} --split-csv {path} takes it, --split-csv auto goes back"
    sides = f"{count[False, False]} are then learned from, and {count[True, False]} good ones tested on"
    return f"{path}: {moved} images change sides, {sides}; {use}"


def report(leaks: Leaks) -> str:
    """What was found, in a few lines."""
    everything, *kinds = leaks.kinds
    lines = [
        f"{everything.seen_before} of {everything.images} test images are likely to show a part that is in training "
        f"(thumbnails correlate by more than {ALIKE}):"
    ]
    lines += [f"  {seen.kind}: {seen.seen_before} of {seen.images}" for seen in kinds]
    lines += [f"  such as {test} and {train} ({value:.2f})" for test, train, value in leaks.pairs[:SHOWN]]
    if everything.image_au_roc is not None:
        lines.append(
            f"likeness to training images, by thumbnails alone, gives an image AU-ROC of {everything.image_au_roc:.3f} "
            "(0.5 is chance; large defects count in it, too)"
        )
    if everything.seen_before:
        lines.append("where it is the same part, move all its photographs to one side, or take --split-by-parts FILE")
    return "\n".join(lines)
