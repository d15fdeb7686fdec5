"""The optimisers of teachers and students."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from student_teacher.runtime import distributed
from student_teacher.runtime.settings import option

OPTIMISERS = ("muon", "adam")
WEIGHT_DECAY = 1e-5  # the paper, section 4
MUON_WEIGHT_DECAY = 1e-2
ADAM_FRACTION = 0.05  # of Muon's learning rate, for the parameters that Adam updates beside Muon


class Optimiser:
    """Adam for all parameters, or Muon for the convolution kernels and Adam for the rest.

    Muon (Jordan et al. 2024) replaces each update of a weight matrix by the nearest orthogonal matrix, so that
    directions with small gradients are learned as fast as others: students learn more in 300 steps than with Adam in
    1,000. A kernel (out,in,h,w) is treated as a matrix with `out` rows. Adam updates the first layer (3 input
    channels), biases and normalisation, with a fixed fraction of the learning rate.

    `kind` is one of OPTIMISERS, `learning_rate` the peak of the schedule, `weight_decay` that of Adam. Raises
    ValueError for another `kind`.
    """

    def __init__(
        self, modules: Iterable[nn.Module], kind: str, learning_rate: float, weight_decay: float = WEIGHT_DECAY
    ):
        if kind not in OPTIMISERS:
            raise ValueError(f"optimiser {kind}: choose one of {', '.join(OPTIMISERS)}")
        parameters = [parameter for module in modules for parameter in module.parameters()]
        self._kernels = [p for p in parameters if kind == "muon" and p.ndim == 4 and p.shape[1] > 3]
        self._parameters = parameters
        taken = {id(parameter) for parameter in self._kernels}
        rest = [parameter for parameter in parameters if id(parameter) not in taken]
        rest_rate = learning_rate * (ADAM_FRACTION if kind == "muon" else 1)
        self._optimisers: list[torch.optim.Optimizer] = [torch.optim.Adam(rest, rest_rate, weight_decay=weight_decay)]
        # torch's Muon accepts only matrices, so it updates copies with that shape.
        self._matrices = [nn.Parameter(kernel.detach().flatten(1).clone()) for kernel in self._kernels]
        if self._matrices:
            self._optimisers.append(torch.optim.Muon(self._matrices, learning_rate, weight_decay=MUON_WEIGHT_DECAY))
        self._peaks = [[group["lr"] for group in optimiser.param_groups] for optimiser in self._optimisers]

    def zero_grad(self) -> None:
        """Reset the gradients."""
        self._optimisers[0].zero_grad()
        for kernel in self._kernels:
            kernel.grad = None

    @torch.no_grad()
    def step(self, fraction: float) -> None:
        """Update the weights with this `fraction` of the peak learning rate.

        Gradients are summed over all processes: each process has the gradient of its part of the loss.
        """
        distributed.sum_gradients(self._parameters)
        for matrix, kernel in zip(self._matrices, self._kernels, strict=True):
            matrix.copy_(kernel.flatten(1))
            matrix.grad = kernel.grad.flatten(1)
        for optimiser, peaks in zip(self._optimisers, self._peaks, strict=True):
            for group, peak in zip(optimiser.param_groups, peaks, strict=True):
                group["lr"] = peak * fraction
            optimiser.step()
        for matrix, kernel in zip(self._matrices, self._kernels, strict=True):
            kernel.copy_(matrix.view_as(kernel))

    def state_dict(self) -> list[dict[str, Any]]:
        """The optimisers' state, without the weights, which belong to the modules."""
        return [optimiser.state_dict() for optimiser in self._optimisers]

    def load_state_dict(self, state: list[dict[str, Tensor]]) -> None:
        """Restore the result of `state_dict`."""
        for optimiser, part in zip(self._optimisers, state, strict=True):
            optimiser.load_state_dict(part)


def optimiser_option(default: str | None = OPTIMISERS[0]) -> Any:
    """A field for --optimiser."""
    return option(
        default,
        "muon learns several times faster; adam is the paper's (default muon)",
        identity=True,
        choices=OPTIMISERS,
    )
