"""The optimisers of teachers and students."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from student_teacher.runtime import distributed
from student_teacher.runtime.settings import option

OPTIMISERS = ("muon", "adam")
WEIGHT_DECAY = 1e-5  # the paper, section 4
MUON_WEIGHT_DECAY = 1e-2
MOMENTUM = 0.95  # of Muon
NEWTON_SCHULZ = (3.4445, -4.775, 2.0315)  # its coefficients, as published
ITERATIONS = 5
ADAM_FRACTION = 0.05  # of Muon's learning rate, for the parameters that Adam updates beside Muon


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for convolution kernels (out,in,h,w), each taken as a matrix with `out` rows.

    It replaces each update by the nearest orthogonal matrix, nearly, so that directions with small gradients are
    learned as fast as others. It computes in float32; torch.optim.Muon takes bfloat16, which CPUs without matrix units
    only emulate, and matrices alone.
    """

    def __init__(self, kernels: Iterable[nn.Parameter], learning_rate: float, *, weight_decay: float):
        super().__init__(kernels, {"lr": learning_rate, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """Update the kernels, with Nesterov momentum."""
        for group in self.param_groups:
            for kernel in group["params"]:
                gradient = kernel.grad.flatten(1)
                momentum = self.state[kernel].setdefault("momentum_buffer", torch.zeros_like(gradient))
                momentum.lerp_(gradient, 1 - MOMENTUM)
                update = orthogonal(gradient.lerp(momentum, MOMENTUM)).view_as(kernel)
                tall = math.sqrt(max(1.0, gradient.shape[0] / gradient.shape[1]))
                kernel.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"] * tall)


def orthogonal(matrix: Tensor) -> Tensor:
    """About the nearest orthogonal matrix: singular values become 0.7 to 1.2, by Newton-Schulz iterations."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    found = wide / wide.norm().clamp_min(1e-7)
    first, second, third = NEWTON_SCHULZ
    for _ in range(ITERATIONS):
        gram = found @ found.T
        found = torch.addmm(found, torch.addmm(gram, gram, gram, beta=second, alpha=third), found, beta=first)
    return found if wide is matrix else found.T


class Optimiser:
    """Adam for all parameters, or Muon for the convolution kernels and Adam for the rest.

    With Muon, students learn more in 300 steps than with Adam in 1,000. Adam updates the first layer (3 input
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
        kernels = [p for p in parameters if kind == "muon" and p.ndim == 4 and p.shape[1] > 3]
        self._parameters = parameters
        taken = {id(parameter) for parameter in kernels}
        rest = [parameter for parameter in parameters if id(parameter) not in taken]
        rest_rate = learning_rate * (ADAM_FRACTION if kind == "muon" else 1)
        self._optimisers: list[torch.optim.Optimizer] = [torch.optim.Adam(rest, rest_rate, weight_decay=weight_decay)]
        if kernels:
            self._optimisers.append(Muon(kernels, learning_rate, weight_decay=MUON_WEIGHT_DECAY))
        self._peaks = [[group["lr"] for group in optimiser.param_groups] for optimiser in self._optimisers]

    def zero_grad(self) -> None:
        """Reset the gradients."""
        for optimiser in self._optimisers:
            optimiser.zero_grad()

    @torch.no_grad()
    def step(self, fraction: float) -> None:
        """Update the weights with this `fraction` of the peak learning rate.

        Gradients are summed over all processes: each process has the gradient of its part of the loss.
        """
        distributed.sum_gradients(self._parameters)
        for optimiser, peaks in zip(self._optimisers, self._peaks, strict=True):
            for group, peak in zip(optimiser.param_groups, peaks, strict=True):
                group["lr"] = peak * fraction
            optimiser.step()

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
