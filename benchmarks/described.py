"""Shared by the benchmarks of the default detector: the teacher's maps of whole data sets, and what maps are worth."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from AnomalyDataset import AnomalyDataset
from student_teacher.detection.BackboneDetector import KINDS, BackboneDetector, Errors
from student_teacher.detection.Detector import at_own_size
from student_teacher.evaluation.Evaluation import Evaluation
from student_teacher.images import preprocessing
from student_teacher.images.store import ImageStore
from student_teacher.runtime.device import Compute
from student_teacher.teachers import backbone_weights
from student_teacher.teachers.backbones import Backbone
from student_teacher.teachers.BackboneTeacher import BackboneTeacher
from student_teacher.training import backbone_students
from student_teacher.training.loop import evenly_spread


def teacher_and_maps(
    sets: Sequence[AnomalyDataset], size: tuple[int, int], compute: Compute, backbone: Backbone | None = None
) -> tuple[BackboneTeacher, list[Tensor]]:
    """The teacher, fitted to the first set as in students_training.py, and its maps of all sets' images.

    Maps are (n,K,h,w) per level. Images are resized to `size`. The default backbone is EfficientNet-Lite0.
    """
    transform = preprocessing.image_transform(size)
    rows = [(dataset, index) for dataset in sets for index in range(len(dataset))]
    store = ImageStore(lambda number: transform(rows[number][0][rows[number][1]]["image"]), len(rows))
    backbone = backbone or backbone_weights.backbone("efficientnet_lite0", "imagenet")
    backbone = compute.place(backbone)
    learned = evenly_spread(list(range(len(sets[0]))), backbone_students.STATISTICS_IMAGES)
    teacher = backbone_students.fit_teacher(backbone, size, store, compute, indices=learned)
    return teacher, backbone_students.teacher_maps(teacher, store, list(range(len(rows))), compute)


@torch.inference_mode()
def errors(networks: BackboneDetector, maps: Sequence[Tensor], compute: Compute) -> Errors:
    """The errors of all students on the teacher's maps, (n,K,h,w) per level."""
    batches = zip(*(level.split(backbone_students.BATCH) for level in maps), strict=True)
    parts = [networks.errors_of([level.to(compute.where) for level in batch]) for batch in batches]
    return Errors(
        *(
            {
                kind: [torch.cat(level) for level in zip(*(part[place][kind] for part in parts), strict=True)]
                for kind in KINDS
            }
            for place in range(len(Errors._fields))
        )
    )


def measures(maps: Sequence[Tensor], scores: Sequence[float], samples: Sequence[Mapping]) -> dict:
    """All measures, at the images' own sizes, of anomaly maps (h,w) of any sizes and image scores.

    Of the `samples`, items of an AnomalyDataset, `label`, `mask` and `size` are used.
    """
    own = [at_own_size(anomaly_map, sample["size"]) for anomaly_map, sample in zip(maps, samples, strict=True)]
    labels = np.array([sample["label"] for sample in samples])
    masks = [np.asarray(sample["mask"]) > 0 if sample["label"] else None for sample in samples]
    return Evaluation(own, masks, np.array(scores), labels, kinds=[str(label) for label in labels]).measures()
