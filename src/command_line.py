"""What all commands share: folders, one-line errors and exit statuses."""

import os
import sys
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
PRETRAINED = "pretrained"  # the folder in model/ of the teachers that ship


class UserError(Exception):
    """Something that the user can mend; its text names the file or value and the way out."""


def category_name(text: str) -> str:
    """A category as the user names it, without the slash that completion leaves. Raises UserError for a path."""
    name = text.rstrip("/")
    if not name or name.startswith((".", "-")) or "/" in name:
        raise UserError(f"'{text}': wants a category's plain name, such as carpet")
    return name


def add_folders(options: ArgumentParser, *folders: str) -> None:
    """Add an option for each of the project's folders named, to take another in its place."""
    for folder in folders:
        options.add_argument(
            f"--{folder}",
            type=Path,
            default=ROOT / folder,
            metavar="DIR",
            help=f"in place of the project's folder {folder}/",
        )


def run(main: Callable[[], int | None], resumes: bool = True) -> NoReturn:
    """Call `main()` and exit: what the user can mend becomes one line and status 2, Ctrl-C one line and status 130.

    The former are a UserError, an OSError and want of memory. `resumes`: the same command goes on after a stop.
    """
    command = Path(sys.argv[0]).name
    try:
        status = main()
    except UserError as error:
        print(f"{command}: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        same = "the same command, without --restart," if "--restart" in sys.argv else "the same command"
        print(f"\n{command}: stopped{f'; {same} goes on where it stopped' if resumes else ''}", file=sys.stderr)
        status = 130
    except BrokenPipeError:  # the reader of our output has gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    except OSError as error:  # a full disk, a folder that takes no files
        print(f"{command}: {error}", file=sys.stderr)
        status = 2
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        print(
            f"{command}: memory ran out; a smaller --image-size or --batch-size, or a larger --stride, takes less",
            file=sys.stderr,
        )
        status = 2
    sys.exit(status)


def out_of_memory(error: Exception) -> bool:
    """Whether that is what an error says; PyTorch's come as RuntimeErrors."""
    return isinstance(error, MemoryError) or any(
        words in str(error) for words in ("out of memory", "can't allocate memory")
    )
