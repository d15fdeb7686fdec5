"""The one way to save and load a model."""

import os
import pickle
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from command_line import UserError

VERSION = 1


def save(path: Path, kind: str, category: str, content: Mapping[str, Any]) -> None:
    """Write `content` (tensors, numbers, texts, lists, dicts) to `path`, labelled with its kind and category.

    The file appears under its name whole or not at all. Raises UserError where it can't be written.
    """
    labelled = {"version": VERSION, "kind": kind, "category": category, **content}
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "wb") as file:
            torch.save(labelled, file)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror or error}") from error
    finally:
        if temporary:
            Path(temporary).unlink(missing_ok=True)


def load(path: Path, kind: str, **expected: Any) -> dict[str, Any]:
    """Read what `save` wrote, on the CPU.

    Raises UserError, naming the file, where it is missing or broken, of another kind or version, or where an entry
    differs from `expected` (patch_size=65, say).
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} is not there") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, not a checkpoint") from None
    except PermissionError:
        raise UserError(f"{path} can't be read: permission denied") from None
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, AttributeError):
        raise UserError(
            f"{path} is no checkpoint of this project, or it is broken: remove it and train again"
        ) from None
    if not isinstance(content, dict) or "kind" not in content:
        raise UserError(f"{path} is no checkpoint of this project (a state dict of another one?)")
    if content["version"] != VERSION:
        raise UserError(f"{path} has version {content['version']}, this program reads {VERSION}: train again")
    for name, value in {"kind": kind, **expected}.items():
        if content.get(name) != value:
            found = content.get(name)
            raise UserError(f"{path} has {name.replace('_', ' ')} {found}, wanted is {value}: choose another file")
    return content
