"""Functions recorded once as a CUDA graph: a GPU then runs them without waiting for Python to start each kernel."""

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

WARM_UPS = 3  # calls before recording: the first ones choose algorithms and allocate memory
Result = TypeVar("Result")


class Recorded(Generic[Result]):
    """A function of one tensor on a GPU, always of the same shape: recorded at the first call, then replayed.

    Each call overwrites the result of the previous one.
    """

    def __init__(self, work: Callable[[Tensor], Result]):
        self._work = work
        self._graph: torch.cuda.CUDAGraph | None = None

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Result:
        """The function's result for `images`, on the same device."""
        if self._graph is None:
            self._record(images)
        self._images.copy_(images)
        self._graph.replay()
        return self._result

    def _record(self, images):
        self._images = images.clone()
        stream = torch.cuda.Stream(images.device)
        stream.wait_stream(torch.cuda.current_stream(images.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._work(self._images)
        torch.cuda.current_stream(images.device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._result = self._work(self._images)
