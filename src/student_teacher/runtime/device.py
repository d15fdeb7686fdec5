"""Choice of device and precision, and seeded random numbers."""

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch.nn import Module

from student_teacher.runtime import distributed
from student_teacher.runtime.errors import UserError

PRECISIONS = ("auto", "float32", "bfloat16")
KINDS = ("cpu", "cuda")  # others are untested; Apple's mps has no float64, in which statistics are computed


def choose(name: str) -> torch.device:
    """The device called `name`; "auto" is the first CUDA device, else the CPU. Raises UserError if it isn't available.

    With several processes on a machine, each takes its own CUDA device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and distributed.active():
        name = f"cuda:{distributed.local_rank()}"
    try:
        device = torch.device(name)
        if device.type in KINDS:
            torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, ImportError):
        raise UserError(f"--device {name} is not available here: take auto or cpu") from None
    if device.type not in KINDS:
        raise UserError(
            f"--device {name} is not available here: only CPUs and GPUs that PyTorch calls cuda are; take auto or cpu"
        )
    return device


def computes_bfloat16_faster(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices faster than float32 ones.

    On CPUs that needs AMX, or AMD's AVX-512 (twice as fast as float32, measured on an EPYC). On a Xeon without usable
    AMX a product took 1.9 times as long as in float32 (benchmarks/dense_extraction.py).
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        found = torch.cpu.get_capabilities()
        return bool(found.get("amx_bf16") or (found.get("avx512_bf16") and "Intel" not in found.get("cpu_name", "")))
    return False


def dtype_of(device: torch.device, precision: str) -> torch.dtype:
    """The data type in which the networks compute; `precision` is one of PRECISIONS."""
    if precision == "auto":
        precision = "bfloat16" if computes_bfloat16_faster(device) else "float32"
    return getattr(torch, precision)


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Context in which the networks compute in `precision`: one of PRECISIONS.

    "auto" takes bfloat16 if the hardware computes it faster. Parameters stay in float32. On a GPU "float32" is not
    rounded to TF32.
    """
    if dtype_of(device, precision) == torch.float32:
        return _exact_float32() if device.type == "cuda" else nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


@contextmanager
def _exact_float32() -> Iterator[None]:
    """Let a GPU convolve and multiply in full float32: PyTorch's default rounds to TF32 for convolutions."""
    backends = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def memory_format(device: torch.device) -> torch.memory_format:
    """Memory layout in which the device convolves fastest: channels_last if it has AVX-512 or matrix units.

    Measured: with AVX2 only, training takes a quarter less time in the contiguous layout; on a Xeon with AVX-512 but no
    matrix units, a fifth more.
    """
    wide = device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_f")
    return torch.channels_last if wide or computes_bfloat16_faster(device) else torch.contiguous_format


@dataclass(frozen=True)
class Compute:
    """Where and how precisely to compute, and the seed of all random numbers.

    Attributes:
        where: the device.
        precision: one of PRECISIONS.
        seed: a whole number from 0.
    """

    where: torch.device
    precision: str = "auto"
    seed: int = 0

    def autocast(self) -> AbstractContextManager:
        """Context in which the networks compute in the `precision`."""
        return autocast(self.where, self.precision)

    def place(self, net: Module) -> Module:
        """The network on the device, in the memory layout in which that convolves fastest."""
        return net.to(self.where, memory_format=memory_format(self.where))


def seed_of(*numbers: int | str) -> int:
    """One seed derived from several numbers and names.

    Each step of a training has its own seed, so that a resumed training draws the same random numbers.
    """
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*numbers: int | str) -> torch.Generator:
    """A generator on the CPU, seeded by `seed_of(*numbers)`."""
    return torch.Generator().manual_seed(seed_of(*numbers))
