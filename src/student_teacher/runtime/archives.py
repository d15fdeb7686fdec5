"""One category out of an archive of many."""

import lzma
import shutil
import tarfile
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from student_teacher.runtime.errors import UserError

PARTS = ("train", "validation", "test", "ground_truth", "test_public", "test_private", "test_private_mixed")


def unpack_category(archive: Path, category: str, destination: Path) -> None:
    """Take one category out of a tar.xz archive that may hold others.

    A category is the folder that holds `train`, `test` and others of PARTS, at any depth; an archive with those at its
    top level counts as the category asked for. Only plain files are unpacked, as new files that the user can write,
    whatever the archive's permissions. The folder appears complete or not at all.

    Args:
        archive: the tar.xz file.
        category: its folder's name in the archive.
        destination: the folder to make; must not exist, or be empty.

    Raises:
        UserError: the archive is damaged or lacks the category, or the disk does not take it.
    """
    unfinished = destination.parent / f".{destination.name}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    found = set()
    try:
        for member, content in _files(archive):
            folder, inside = _place(PurePosixPath(member.name), category)
            if folder is None:
                continue
            found.add(folder)
            if folder == category:
                target = unfinished / inside
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("wb") as file:
                    shutil.copyfileobj(content, file)
        if category not in found:
            held = ", ".join(sorted(found)) or "no category (a folder with train/good in it)"
            raise UserError(f"{archive}: does not hold {category}; it holds {held}")
        if destination.exists():
            destination.rmdir()  # Windows renames nothing to an empty folder's name
        unfinished.rename(destination)
    except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
        raise UserError(f"{archive}: broken or not a tar.xz archive ({error}); delete it and fetch it again") from None
    except OSError as error:
        raise UserError(f"{archive}: cannot be unpacked to {destination} ({error.strerror or error})") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _files(archive):
    """Every plain file of the archive with its content, in the archive's order; the archive is read once."""
    bar = tqdm(total=archive.stat().st_size, desc=archive.name, unit="B", unit_scale=True, disable=None)
    with bar, archive.open("rb") as raw, lzma.open(_Counted(raw, bar)) as plain:
        with tarfile.open(fileobj=plain, mode="r|") as tar:
            for member in tar:
                if member.isreg():
                    yield member, tar.extractfile(member)
        # tarfile takes an archive cut off between two files for complete: read the compressed stream to its end.
        while plain.read(2**20):
            pass


class _Counted:
    """A file that advances a progress bar as it is read."""

    def __init__(self, raw, bar):
        self.raw, self.bar = raw, bar

    def read(self, size):
        block = self.raw.read(size)
        self.bar.update(len(block))
        return block


def _place(name, asked):
    """The category that a file of the archive belongs to (None if none), and its path in the category's folder."""
    steps = [step for step in name.parts if step not in ("/", ".")]
    if ".." in steps or any(Path(step).name != step for step in steps):  # on Windows, a step such as ..\..\name
        return None, None
    for depth, step in enumerate(steps[:-1]):
        if step in PARTS:
            return (steps[depth - 1] if depth else asked), Path(*steps[depth:])
    if len(steps) > 1 and steps[-2] == asked:  # a licence or readme beside train and test
        return asked, Path(steps[-1])
    return None, None
