"""Masks drawn in labelme: NAME.json beside the image, with the outlines of its defects."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from student_teacher.runtime.errors import UserError

SUFFIX = ".json"


def is_labelme(path: Path) -> bool:
    """Whether a file is labelme's by its ending and content; a broken .json counts, too: drawing it names it."""
    if path.suffix.lower() != SUFFIX:
        return False
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return True
    return isinstance(content, dict) and "shapes" in content


def drawn_mask(path: Path) -> np.ndarray:
    """What the shapes of a labelme file cover, (H,W) of bool, drawn as labelme's own shape_to_mask does.

    Polygons, rectangles and circles; what lies beyond the image is cut.

    Raises:
        UserError: the file is missing, is not labelme's, lacks the image's size, or has a shape without an area.
    """
    try:
        content = json.loads(path.read_bytes())
        size = content["imageWidth"], content["imageHeight"]
        if not all(isinstance(side, int) and side > 0 for side in size):
            raise ValueError("imageWidth and imageHeight are no numbers of pixels")
        mask = Image.new("1", size)
        for shape in content["shapes"]:
            _draw(ImageDraw.Draw(mask), shape.get("shape_type") or "polygon", shape["points"])
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except KeyError as error:
        raise UserError(f"{path}: lacks {error}; save it in labelme again") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not as labelme writes it ({error}); save it in labelme again") from None
    return np.array(mask)


def _draw(draw: ImageDraw.ImageDraw, kind: str, points: Any) -> None:
    """Draw a shape; raises ValueError or TypeError where it can't be."""
    corners = [(float(x), float(y)) for x, y in points]
    if not np.isfinite(corners).all():
        raise ValueError("a point is not finite")
    if kind == "polygon" and len(corners) >= 3:
        draw.polygon(corners, fill=1, outline=1)
    elif kind == "rectangle" and len(corners) in (2, 4):  # two opposite corners, or all
        xs, ys = zip(*corners, strict=True)
        draw.rectangle([min(xs), min(ys), max(xs), max(ys)], fill=1, outline=1)
    elif kind == "circle" and len(corners) == 2:  # its centre and a point on it
        (x, y), radius = corners[0], math.dist(*corners)
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=1, outline=1)
    else:
        raise ValueError(f"a {kind} with {len(corners)} points has no area; draw a polygon, rectangle or circle")
