"""Score a folder's images with a detector that src/export_onnx.py wrote; needs onnxruntime, numpy and pillow alone.

Prints score, p-value and decision of each image, and saves its anomaly map as a float32 TIFF of the image's own size.
What it can't read as the detector was trained to see it is named; the exit status is 3 then.

    python3 examples/inspect_folder.py model/carpet/detector.onnx data/carpet/test/hole --output maps
"""

import json
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def read(path, value_range):
    """The image as RGB picture, as src/student_teacher/images/reading.py reads it, or an error that says why not."""
    with Image.open(path) as image:
        layout = str(image.tile[0].args if image.tile else "")
        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
            raise ValueError(f"{image.n_frames} pages; save them as files of their own")
        deep = image.mode == "F" or image.mode.startswith("I")
        if deep and getattr(image, "tag_v2", {}).get(262) == 0:
            raise ValueError("white is zero; save it with black as zero")
        if not deep and ";16" in layout and value_range not in (None, [0, 65535]):
            raise ValueError("16-bit colours; save it with 8 bits a colour")
        image = ImageOps.exif_transpose(image)
    if deep:
        if value_range is None and not image.mode.startswith("I;16"):
            raise ValueError("floating point or 32 bits, and the detector has learned from 8 or 16 bits; save it so")
        low, high = value_range or (0, 65535)
        levels = np.clip((np.nan_to_num(np.asarray(image, np.float64), nan=low) - low) / (high - low), 0, 1)
        return Image.fromarray(np.rint(255 * levels).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


options = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
options.add_argument("model", type=Path, help="the ONNX file")
options.add_argument("folder", type=Path, help="with the images")
options.add_argument("--output", type=Path, help="folder for the maps (default: FOLDER/anomaly_maps)")
options.add_argument(
    "--false-alarm-rate", type=float, help="of good images (default: the threshold saved with the detector, or 0.05)"
)
args = options.parse_args()
suffixes = Image.registered_extensions()
files = sorted(path for path in args.folder.glob("[!.]*") if path.is_file())
paths = [path for path in files if path.suffix.lower() in suffixes]
if not paths or not args.model.is_file():
    options.error(f"no images in {args.folder}" if args.model.is_file() else f"{args.model} is not there")
output = args.output or args.folder / "anomaly_maps"
output.mkdir(parents=True, exist_ok=True)

session = onnxruntime.InferenceSession(args.model)
size, good_scores, value_range, threshold = (
    json.loads(session.get_modelmeta().custom_metadata_map[name])
    for name in ("image_size", "calibration_scores", "value_range", "threshold")
)
missed = [f"{path}: not an image by its name" for path in files if path not in paths]
for path in paths:
    try:
        image = read(path, value_range)
    except Exception as error:  # Pillow's readers raise nearly anything on a damaged file
        missed.append(f"{path}: {error}")
        continue
    seen = image.resize(size[::-1], Image.Resampling.BILINEAR) if size else image
    pixels = np.asarray(seen).transpose(2, 0, 1)[None]
    (anomaly_map,), (score,) = session.run(["maps", "scores"], {"images": pixels})
    p_value = (1 + np.sum(good_scores >= score)) / (len(good_scores) + 1)
    by_threshold = threshold is not None and args.false_alarm_rate is None
    anomalous = score >= threshold if by_threshold else p_value <= (args.false_alarm_rate or 0.05)
    decision = "anomalous" if anomalous else "good"
    print(f"{path.name}  score {score:.3f}  p-value {p_value:.3f}  {decision}")
    shown = Image.fromarray(anomaly_map).resize(image.size, Image.Resampling.BILINEAR)
    shown.save(output / f"{path.name}.tiff")
for line in missed:
    print(f"not inspected: {line}")
sys.exit(3 if missed else 0)
