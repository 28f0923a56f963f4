"""A feed-forward of several experts, of which each token goes through a few.

Source: Mixtral, arXiv 2401.04088, section 2.1; the expert for every token, and its gate, are those
of Qwen1.5-MoE.

Shapes: T tokens, E hidden_size, X experts, K experts of one token; leading axes are free.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Experts, ModelConfig
from .half_blocks import Mlp
from .layers import Linear

__all__ = ["Gate", "MixtureOfExperts", "route"]


_WHOLE_VECTOR = 16
"""Outputs that a product is filled up to: MKL rounds a row of 5 or 6 by its place among others."""


class Gate(Linear):
    """A product with few outputs, which decide."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__(width, out, bias=False)
        self._filled: Tensor | None = None

    def fill_up(self) -> None:
        """From now on compute whole vectors of outputs, with the weights that are there now."""
        weight = self.weight.detach()
        filled = F.pad(weight, (0, 0, 0, -len(weight) % _WHOLE_VECTOR))
        self._filled = filled.t().contiguous().t()

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out]."""
        weight = self.weight if self._filled is None else self._filled
        return F.linear(x, weight)[..., : len(self.weight)]


class MixtureOfExperts(nn.Module):
    """Router, experts, and the shared expert where there is one."""

    def __init__(self, config: ModelConfig, layer_index: int) -> None:
        super().__init__()
        rules = config.experts
        assert rules is not None, "a layer with experts in a model without"
        self.rules = rules
        self._has_fixed_shapes = False
        width = config.hidden_size
        self.gate = Gate(width, rules.num_experts)
        self.experts = nn.ModuleList(
            Mlp(config, layer_index, rules.intermediate_size) for _ in range(rules.num_experts)
        )
        self.shared_expert = self.shared_expert_gate = None
        if rules.shared_intermediate_size is not None:
            self.shared_expert = Mlp(config, layer_index, rules.shared_intermediate_size)
            self.shared_expert_gate = Gate(width, 1)

    def fix_shapes(self) -> None:
        """From now on let every expert compute all rows of a call.

        A row's bits then do not depend on how many others share its expert.
        """
        self._has_fixed_shapes = True
        for gate in (self.gate, self.shared_expert_gate):
            if gate is not None:
                gate.fill_up()

    def forward(self, x: Tensor) -> Tensor:
        """[..., E] → [..., E]."""
        rows = x.reshape(-1, x.shape[-1])  # [T, E]
        out = self._routed(rows)
        if self.shared_expert is not None and self.shared_expert_gate is not None:
            out = out + self.shared_expert_gate(rows).sigmoid() * self.shared_expert(rows)
        return out.view(x.shape)

    def _routed(self, x: Tensor) -> Tensor:
        """The experts' outputs with their weights, added by ascending expert.

        The host waits once, for how many tokens each expert has.
        """
        chosen, weights = route(self.gate(x), self.rules)
        weights = weights.to(x.dtype).flatten()  # [T * K]
        flat = chosen.flatten()
        counts = flat.new_zeros(len(self.experts)).scatter_add_(0, flat, torch.ones_like(flat))
        order, start = flat.argsort(stable=True), 0
        out = torch.zeros_like(x)
        for expert, count in zip(self.experts, counts.tolist(), strict=True):
            if not count:
                continue
            places = order[start : start + count]
            start += count
            rows = places // chosen.shape[1]
            if self._has_fixed_shapes:
                part = expert(x).index_select(0, rows)
            else:
                part = expert(x.index_select(0, rows))
            out = out.index_add(0, rows, part * weights[places, None])
        return out


def route(logits: Tensor, rules: Experts) -> tuple[Tensor, Tensor]:
    """Which experts each token goes through, likeliest first, and their float32 weights.

    Router logits [T, X] → [T, K] and [T, K]. Of equally likely experts the first are taken.
    """
    probabilities = logits.softmax(-1, dtype=torch.float32)
    weights, chosen = probabilities.sort(dim=-1, descending=True, stable=True)
    count = rules.num_experts_per_token
    weights, chosen = weights[:, :count], chosen[:, :count]
    if rules.normalize_weights:
        weights = weights / weights.sum(-1, keepdim=True)
    return chosen, weights
