"""Errors that the user can fix, and the exit status of commands."""

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn


class UserError(Exception):
    """Something that the user can fix; the text names the file or value and says what to do."""


def run(main: Callable[[], int | None], resumes: bool = True) -> NoReturn:
    """Call `main()` and exit. An error that the user can fix prints one line, status 2; Ctrl-C one line, status 130.

    The former are UserError, OSError and running out of memory. `resumes`: the same command continues after a stop.
    Characters that the terminal's or the file's encoding lacks are printed as escapes.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # else without encoding, or replaced by the caller
            stream.reconfigure(errors="backslashreplace")
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
    except BrokenPipeError:  # the reader of the output has ended, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    except OSError as error:  # such as a full disk, or a folder that can't be written
        print(f"{command}: {error}", file=sys.stderr)
        status = 2
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        print(
            f"{command}: out of memory; a smaller --image-size or --batch-size, or a larger --stride, needs less",
            file=sys.stderr,
        )
        status = 2
    sys.exit(status)


def shown(name: object) -> str:
    """A file's name for a line of text: control characters, such as ends of lines, and broken ones as escapes."""
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape", "surrogatepass").decode() for each in str(name)
    )


def out_of_memory(error: Exception) -> bool:
    """Whether the error means out of memory; PyTorch raises RuntimeErrors for that."""
    return isinstance(error, MemoryError) or any(
        words in str(error) for words in ("out of memory", "can't allocate memory")
    )
