"""Saving and loading models."""

import hashlib
import io
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from student_teacher.runtime import distributed
from student_teacher.runtime.errors import UserError
from student_teacher.runtime.files import remove_unfinished, write_atomically

VERSION = 1
# What torch.load and load_state_dict raise for files with other content.
BROKEN = (
    RuntimeError,
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    struct.error,
)


def save(path: Path, kind: str, category: str, content: Mapping[str, Any]) -> None:
    """Write `content` (tensors, numbers, texts, lists, dicts) to `path`, labelled with its kind and category.

    The file appears complete or not at all. Raises UserError if it can't be written. Of several processes only the
    first writes; the others wait for it.
    """
    if distributed.is_first():
        remove_unfinished([path])
        buffer = io.BytesIO()
        torch.save({"version": VERSION, "kind": kind, "category": category, **content}, buffer)
        write_atomically(path, buffer.getvalue())
    distributed.wait_for_all()


def load(path: Path, kind: str, **expected: Any) -> dict[str, Any]:
    """Read what `save` wrote, on the CPU.

    Raises UserError, naming the file, if it is missing or broken, has another kind or version, or if an entry differs
    from `expected` (such as patch_size=65).
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} is not there") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, not a checkpoint") from None
    except PermissionError:
        raise UserError(f"{path} can't be read: permission denied") from None
    except BROKEN:
        raise UserError(
            f"{path} is not a checkpoint of this project, or it is broken: remove it and train again"
        ) from None
    if not isinstance(content, dict) or "kind" not in content:
        raise UserError(f"{path} is not a checkpoint of this project (perhaps a state dict of another one)")
    if content.get("version") != VERSION:
        raise UserError(f"{path} has version {content.get('version')}, this program reads {VERSION}: train again")
    for name, value in {"kind": kind, **expected}.items():
        if content.get(name) != value:
            found = content.get(name)
            raise UserError(f"{path} has {name.replace('_', ' ')} {found}, not {value}: choose another file")
    return content


def fingerprint(state: Mapping[str, torch.Tensor]) -> str:
    """Digest of a network's weights, to notice when students and teacher don't belong together."""
    digest = hashlib.sha256()
    for value in state.values():
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
