"""The files that MVTec AD 2's server measures: anomaly maps of the private test images, and what exceeds a threshold.

Several objects share a folder: FOLDER/anomaly_images/OBJECT/test_private/NAME.tiff in float16, and
FOLDER/anomaly_images_thresholded/OBJECT/test_private/NAME.png with 0 and 255; likewise for test_private_mixed. Maps
have the images' own size, and the threshold comes from good images alone, as the rules of the benchmark ask
(Heckler-Kram et al. 2025, "The MVTec AD 2 Dataset").
"""

import io
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from AnomalyDataset import AnomalyDataset
from student_teacher.detection.Detector import Detector
from student_teacher.images.layouts import PRIVATE
from student_teacher.images.reading import encoded, stem_of
from student_teacher.runtime import distributed
from student_teacher.runtime.bars import with_bar
from student_teacher.runtime.errors import UserError
from student_teacher.runtime.files import write_atomically
from student_teacher.runtime.ledger import Ledger
from student_teacher.runtime.prefetch import alone, prefetched
from student_teacher.runtime.resume_log import ResumeLog

KINDS = {"anomaly_images": ".tiff", "anomaly_images_thresholded": ".png"}  # folders and endings
HIGHEST = float(np.finfo(np.float16).max)


def private_images(category: Path, index: Path | None = None) -> AnomalyDataset:
    """The category's images without labels; `index` as of AnomalyDataset. Raises UserError if there are none."""
    dataset = AnomalyDataset(category, index=index, type=PRIVATE)
    if not dataset.rows:
        raise UserError(f"{category} has no images in {' or '.join(PRIVATE)}: only MVTec AD 2 takes submissions")
    return dataset


def files_of(folder: Path, category: str, row: dict) -> list[Path]:
    """The files of an image: its map, and its thresholded map."""
    name = Path(row["image_name"])
    return [folder / kind / category / name.with_name(stem_of(name) + suffix) for kind, suffix in KINDS.items()]


def submit(detector: Detector, threshold: float, dataset: AnomalyDataset, folder: Path, *, overwrite: bool) -> None:
    """Write both files of all images; pixels from `threshold` on are marked. Resumes after a stop.

    What was written is recorded beside the folder, as the server takes no other files in it. Raises UserError if a
    file is there that was not written by this command, unless `overwrite`.
    """
    category = dataset.root_dir.name
    dataset.least, dataset.value_range = detector.least_side, detector.value_range
    files = [files_of(folder, category, row) for row in dataset.rows]
    written = [path for each in files for path in each]
    record = folder.absolute().parent / f".{folder.name}.{category}.json"
    ledger = Ledger(folder, "private images", written, overwrite=overwrite, record=record)
    log = ResumeLog(record.with_suffix(".unfinished"), f"{detector.fingerprint} {threshold}")

    def write(found: tuple) -> None:
        number, sample, (small_map, _) = found
        of_map, of_marks = files[number]
        with alone(sample["size"][0] * sample["size"][1]):
            anomaly_map = detector.at_own_size(small_map, sample["size"])
            buffer = io.BytesIO()
            tifffile.imwrite(buffer, np.clip(anomaly_map, -HIGHEST, HIGHEST).astype(np.float16))
            write_atomically(of_map, buffer.getbuffer())
            marks = np.where(anomaly_map >= threshold, np.uint8(255), np.uint8(0))
            write_atomically(of_marks, encoded(Image.fromarray(marks), "PNG"))
        log.put(sample["path"], True)

    def is_done(number: int) -> bool:
        return bool(log.get(dataset.rows[number]["image_name"])) and all(path.exists() for path in files[number])

    wanted = distributed.share([number for number in range(len(dataset)) if not is_done(number)])
    samples = zip(wanted, prefetched(dataset.__getitem__, wanted), strict=True)
    predictions = ((number, sample, detector.predict(sample["image"])) for number, sample in samples)
    for _ in with_bar(prefetched(write, predictions, finish=True), len(wanted), "private images"):
        pass
    distributed.wait_for_all()
    log.finish()
    ledger.finish(written)
