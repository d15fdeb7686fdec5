"""Score a folder's images with a detector that src/export_onnx.py wrote; needs onnxruntime, numpy and pillow alone.

Prints score, p-value and decision of each image, and saves its anomaly map as a float32 TIFF of the image's own size.

    python3 examples/inspect_folder.py model/carpet/detector.onnx data/carpet/test/hole --output maps
"""

import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")

options = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
options.add_argument("model", type=Path, help="the ONNX file")
options.add_argument("folder", type=Path, help="with the images")
options.add_argument("--output", type=Path, help="folder for the maps (default: FOLDER/anomaly_maps)")
options.add_argument("--false-alarm-rate", type=float, default=0.05, help="of good images (default 0.05)")
args = options.parse_args()
paths = sorted(path for path in args.folder.glob("[!.]*") if path.suffix.lower() in SUFFIXES)
if not paths or not args.model.is_file():
    options.error(f"no images in {args.folder}" if args.model.is_file() else f"{args.model} is not there")
output = args.output or args.folder / "anomaly_maps"
output.mkdir(parents=True, exist_ok=True)

session = onnxruntime.InferenceSession(args.model)
size, good_scores = (
    json.loads(session.get_modelmeta().custom_metadata_map[n]) for n in ("image_size", "calibration_scores")
)
for path in paths:
    try:
        image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")  # 8 bits; others: images/reading.py
    except OSError as error:
        print(f"not inspected: {path}: {error}")
        continue
    seen = image.resize(size[::-1], Image.Resampling.BILINEAR) if size else image
    pixels = np.asarray(seen).transpose(2, 0, 1)[None]
    (anomaly_map,), (score,) = session.run(["maps", "scores"], {"images": pixels})
    p_value = (1 + np.sum(good_scores >= score)) / (len(good_scores) + 1)
    decision = "anomalous" if p_value <= args.false_alarm_rate else "good"
    print(f"{path.name}  score {score:.3f}  p-value {p_value:.3f}  {decision}")
    shown = Image.fromarray(anomaly_map).resize(image.size, Image.Resampling.BILINEAR)
    shown.save(output / f"{path.name}.tiff")
