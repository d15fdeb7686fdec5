"""Several processes that work as one, started by PyTorch's launcher: torchrun --nproc-per-node N SCRIPT ...

Each process takes its share of the images, and their results are merged: the outcome is that of one process. Without
torchrun every function here does what a single process needs, without waiting.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from student_teacher.runtime import errors
from student_teacher.runtime.errors import UserError

Item = TypeVar("Item")


def active() -> bool:
    """Whether there are several processes."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """The number of this process among all, from 0."""
    return dist.get_rank() if active() else 0


def local_rank() -> int:
    """The number of this process among those of its machine, from 0; also the number of its GPU."""
    return int(os.environ["LOCAL_RANK"]) if active() else 0


def processes() -> int:
    """How many processes there are."""
    return dist.get_world_size() if active() else 1


def is_first() -> bool:
    """Whether this is the process that prints and writes files."""
    return rank() == 0


def run(main: Callable[[], int | None]) -> NoReturn:
    """Call `main()` and exit, as errors.run does; under torchrun as one of several processes.

    Only the first process prints. If several fail, the first to fail says why.
    """
    if not dist.is_available() or not dist.is_torchelastic_launched() or os.environ["WORLD_SIZE"] == "1":
        errors.run(main)
    try:
        errors.run(lambda: _as_one_of_several(main))
    except SystemExit as ending:
        # Not by the interpreter's normal exit: a thread of Gloo that frees a tensor then would abort the process.
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(ending.code or 0)


def _as_one_of_several(main: Callable[[], int | None]) -> int | None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # torchrun's, when another process has ended
    store, number, total = next(rendezvous("env://"))
    # Tensors on a GPU go through NCCL, the rest through Gloo, without waiting for the GPU.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        with contextlib.ExitStack() as quiet:
            if number:
                nowhere = quiet.enter_context(Path(os.devnull).open("w", encoding="utf-8", errors="replace"))
                quiet.enter_context(contextlib.redirect_stdout(nowhere))
                quiet.enter_context(contextlib.redirect_stderr(nowhere))
            _collective(partial(dist.init_process_group, backend, store=store, rank=number, world_size=total))
            status = main()
    except (UserError, OSError, KeyboardInterrupt) as error:
        for each in (signal.SIGINT, signal.SIGTERM):  # torchrun sends them before our line is printed
            signal.signal(each, signal.SIG_IGN)
        if _said_already(store):
            sys.exit(130 if isinstance(error, KeyboardInterrupt) else 2)
        raise
    dist.destroy_process_group()
    return status


def _said_already(store: dist.Store) -> bool:
    try:
        return store.add("failed", 1) > 1
    except RuntimeError:  # the machine that kept the store is gone
        return False


def _collective(operation: Callable, *arguments: Any) -> Any:
    try:
        return operation(*arguments)
    except RuntimeError as error:
        raise UserError(
            "another process has ended or can't be reached: the same command, without --restart, goes on from the last "
            "checkpoint"
        ) from error


def share(items: Sequence[Item]) -> Sequence[Item]:
    """The `items` that this process takes: every n-th, with n processes. May be empty."""
    return items[rank() :: processes()]


def gathered(value: Item) -> list[Item]:
    """The `value` of each process, in the order of their ranks. Values are pickled; tensors should be on the CPU."""
    if not active():
        return [value]
    values: list[Any] = [None] * processes()
    _collective(dist.all_gather_object, values, value)
    return values


def in_order(results: Sequence[Item]) -> list[Item]:
    """The results of all processes, each for the items of its `share`, in the order of the items."""
    parts = gathered(results)
    return [parts[place % len(parts)][place // len(parts)] for place in range(sum(map(len, parts)))]


def summed(value: float) -> float:
    """The sum of the values of all processes, the same on each."""
    return all_reduce(torch.tensor(value, dtype=torch.float64)).item() if active() else value


def any_of(*flags: bool) -> tuple[bool, ...]:
    """For each flag, whether it is set in any process."""
    if not active():
        return flags
    return tuple(all_reduce(torch.tensor(flags, dtype=torch.uint8), dist.ReduceOp.MAX).bool().tolist())


def wait_for_all() -> None:
    """Wait until all processes have called this."""
    any_of(False)


def all_reduce(values: Tensor, operation: dist.ReduceOp = dist.ReduceOp.SUM) -> Tensor:
    """Combine `values`, in place, with those of the other processes. Returns them."""
    if active():
        _collective(dist.all_reduce, values, operation)
    return values


def rows_of_all(rows: Tensor) -> Tensor:
    """The rows (n,C) of all processes, which may have different n: (N,C), the same on each.

    For losses between rows, which every process computes on all rows: the gradient flows to its own rows only.
    """
    return _RowsOfAll.apply(rows) if active() else rows


class _RowsOfAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows):
        counts = gathered(len(rows))
        start = sum(counts[: rank()])
        ctx.own = slice(start, start + len(rows))
        whole = rows.new_zeros(sum(counts), rows.shape[1])
        whole[ctx.own] = rows
        return all_reduce(whole)

    @staticmethod
    def backward(ctx, gradient):
        return gradient[ctx.own]


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its sum over all processes, in one all-reduce.

    Not DistributedDataParallel: it expects one forward call of the module and one backward pass per step. Here networks
    run through FDFEAnomalyNet, and a step adds up several backward passes, one for each image size.
    """
    if not active():
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = all_reduce(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view(gradient.shape))
