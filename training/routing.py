"""What routers do in training: the loss that spreads tokens over the experts, and their load.

The balance loss of a layer with X experts is X · Σ fᵢ Pᵢ, where fᵢ is the share of choices that
fell on expert i and Pᵢ its mean probability: 1 when both are even, more when the same experts are
both likely and chosen (Switch Transformer, arXiv:2101.03961, equation 4; for several choices of a
token as in Mixtral's). It is taken over the tokens of one part of a batch, so that, other than the
loss of the text, it depends a little on how the batch is cut.

Shapes: T tokens, X experts, K experts of one token.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor, nn

from llmserve.model.experts import MixtureOfExperts, route
from llmserve.model.transformer import Transformer

__all__ = ["RouterWatch"]


class RouterWatch:
    """Listens to the routers of a model while a thread computes a part of a batch."""

    def __init__(self, model: Transformer) -> None:
        self._layers = {
            module: index
            for index, block in enumerate(model.layers)
            for module in block.modules()
            if isinstance(module, MixtureOfExperts)
        }
        for module in self._layers:
            module.gate.register_forward_hook(self._hook_of(module))
        self._heard = threading.local()
        self._lock = threading.Lock()
        self._counts: dict[int, Tensor] = {}

    def start(self) -> None:
        """Listen to this thread's forward pass, which follows."""
        self._heard.losses = []

    def finish(self) -> Tensor:
        """The sum of the layers' balance losses in the pass since `start`; 0 without experts."""
        losses: list[Tensor] = self._heard.losses
        self._heard.losses = None  # a block that is computed again is not heard again
        return torch.stack(losses).sum() if losses else torch.zeros(())

    def take_counts(self) -> dict[int, Tensor]:
        """For each layer, how often every expert was chosen since last asked."""
        counts, self._counts = self._counts, {}
        return dict(sorted(counts.items()))

    def _hook_of(self, module: MixtureOfExperts) -> Callable[[nn.Module, object, Tensor], None]:
        def hear(gate: nn.Module, inputs: object, logits: Tensor) -> None:
            if not torch.is_grad_enabled():
                return
            # A block that is computed again must compute the same again, even if nobody listens.
            loss, counts = _balance(module, logits)
            if getattr(self._heard, "losses", None) is not None:
                self._heard.losses.append(loss)
                self._count(self._layers[module], counts)

        return hear

    def _count(self, layer: int, counts: Tensor) -> None:
        with self._lock:
            self._counts[layer] = self._counts.get(layer, torch.zeros_like(counts)) + counts


def _balance(module: MixtureOfExperts, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The balance loss of router logits [T, X], and how often each expert was chosen [X]."""
    num_experts = module.rules.num_experts
    chosen, _ = route(logits.detach(), module.rules)  # [T, K]
    counts = torch.bincount(chosen.flatten(), minlength=num_experts).float()
    probabilities = logits.softmax(-1, dtype=torch.float32).mean(0)  # [X]
    return num_experts * (counts / counts.sum() * probabilities).sum(), counts
