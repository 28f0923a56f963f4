"""AdamW (arXiv:1711.05101) on torch's fused kernel: `torch.optim.AdamW(fused=True)`, to the bit.

torch's own class imports torch's compiler when it is made, which takes a second and 70 MB that a
run without `compile` has no use for.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from .distributed_weights import local

__all__ = ["AdamW"]

_EPS = 1e-8


class AdamW:
    """Groups of parameters, each with its rate and decay, and the moments of every parameter."""

    def __init__(
        self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float]
    ) -> None:
        """A group holds `params` and `weight_decay`; it may be given another `lr` before a step."""
        self.param_groups = [{"lr": lr, **group} for group in groups]
        self.state: defaultdict[nn.Parameter, dict[str, Tensor]] = defaultdict(dict)
        """`exp_avg`, `exp_avg_sq` and `step` of each parameter that has had a gradient."""
        self._betas = betas

    def step(self) -> None:
        """Change the weights by their gradients."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._step_group(parameters, group["lr"], group["weight_decay"])

    def zero_grad(self, *, set_to_none: bool = True) -> None:
        """Forget the gradients, or make them zero."""
        for parameter in self._parameters():
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.zero_()

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @torch.no_grad()
    def _step_group(self, parameters: list[nn.Parameter], rate: float, decay: float) -> None:
        states = [self._state_of(parameter) for parameter in parameters]
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, 1)
        torch._fused_adamw_(
            [local(parameter) for parameter in parameters],
            [local(parameter.grad) for parameter in parameters if parameter.grad is not None],
            [local(state["exp_avg"]) for state in states],
            [local(state["exp_avg_sq"]) for state in states],
            [],
            steps,
            lr=rate,
            beta1=self._betas[0],
            beta2=self._betas[1],
            weight_decay=decay,
            eps=_EPS,
            amsgrad=False,
            maximize=False,
        )

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
            state["step"] = torch.zeros((), device=parameter.device)
        return state
