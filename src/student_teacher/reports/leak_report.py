"""How many test images show a part that is in training, and what knowing that alone is worth."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from AnomalyDataset import AnomalyDataset
from student_teacher.evaluation.metrics import au_roc
from student_teacher.images.index import LEARNED, kind_of
from student_teacher.images.leaks import ALIKE, correlations, grey_thumbnail, thumbnails
from student_teacher.runtime.errors import UserError

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


def find_leaks(category: Path) -> Leaks:
    """Compare each test image with all training images, by `images.leaks`.

    The image score of "not seen before" is 1 minus the highest correlation with a training image.

    Raises:
        UserError: the category has no index, or no test images; an image is broken.
    """
    good, test = (AnomalyDataset(category, grey_thumbnail, type=part) for part in (LEARNED, "test"))
    if not test.rows:
        raise UserError(f"{category} has no test images that training could know")
    of_good, of_test = thumbnails(good, test)
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
        lines.append("where it is the same part, move all its photographs to one side: train/good or test/good")
    return "\n".join(lines)
