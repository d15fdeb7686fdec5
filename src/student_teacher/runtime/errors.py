"""Errors that the user can mend, and the exit status of commands."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn


class UserError(Exception):
    """Something that the user can mend; its text names the file or value and the way out."""


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
