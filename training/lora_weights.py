"""LoRA in training: low-rank matrices beside a model's frozen projections (arXiv 2106.09685).

Each adapted projection gets `scale · B A x`, with A drawn uniformly and B zero, so that training
begins with the model as it is (section 4.1). The model joins query, key and value, and gate and
input of the feed-forward; here each keeps its own pair, as the files of adapters have them.

Shapes: r rank, in and out the projection's widths.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmserve.adapters import Adapter, LoraPair, Place
from llmserve.config import ModelConfig
from llmserve.errors import ConfigError
from llmserve.layouts import expected_tensors

__all__ = ["JOINED_PROJECTIONS", "LoraWeights"]

JOINED_PROJECTIONS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "o_proj": ("o_proj",),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "up_proj": ("up_proj",),
    "down_proj": ("down_proj",),
}
"""The model's own name of a projection → the canonical ones that it joins."""


class LoraWeights:
    """Trainable pairs of a model; an `Adapt` that adds what they give."""

    def __init__(
        self,
        config: ModelConfig,
        targets: Sequence[str],
        *,
        rank: int,
        alpha: float,
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        """Draw A and set B to zero for every projection of the model that `targets` names.

        What is drawn does not depend on the device.

        Raises:
            ConfigError: the model has none of them. Experts are not adapted.
        """
        shapes = expected_tensors(config)
        places = [Place(index, target) for index in range(config.num_layers) for target in targets]
        self._shapes = {
            place: shapes[f"{place.module}.weight"]
            for place in places
            if f"{place.module}.weight" in shapes
        }
        if not self._shapes:
            raise ConfigError(f"the model has none of the projections {', '.join(targets)}")
        self._sizes = {
            place: shapes[f"{place.module}.weight"][0]
            for index in range(config.num_layers)
            for parts in JOINED_PROJECTIONS.values()
            for place in (Place(index, part) for part in parts)
            if f"{place.module}.weight" in shapes
        }
        self._alpha, self._scale = alpha, alpha / rank
        generator = torch.Generator().manual_seed(seed)
        self._a: dict[Place, nn.Parameter] = {}
        self._b: dict[Place, nn.Parameter] = {}
        for place, (out, width) in self._shapes.items():
            bound = width**-0.5
            a = torch.empty(rank, width).uniform_(-bound, bound, generator=generator)
            self._a[place] = nn.Parameter(a.to(device))
            self._b[place] = nn.Parameter(torch.zeros(out, rank, device=device))

    def parameters(self) -> dict[str, nn.Parameter]:
        """All matrices, under the names that an adapter's file has for them."""
        halves = (("A", self._a), ("B", self._b))
        return {
            place.tensor(half): matrices[place]
            for place in self._shapes
            for half, matrices in halves
        }

    def __call__(self, layer_index: int, projection: str, x: Tensor) -> Tensor | None:
        """What is added to the projection's output: x [..., in] → [..., out], or None."""
        places = [Place(layer_index, part) for part in JOINED_PROJECTIONS[projection]]
        if not any(place in self._a for place in places):
            return None
        added = [self._add(place, x) for place in places]
        return torch.cat(added, dim=-1) if len(added) > 1 else added[0]

    def adapter(self, name: str) -> Adapter:
        """A copy of the pairs as they are now, to be saved or served."""
        pairs = {
            place: LoraPair(
                a=self._a[place].detach().clone().cpu().numpy(),
                b=self._b[place].detach().clone().cpu().numpy(),
                alpha=self._alpha,
            )
            for place in self._shapes
        }
        return Adapter(name=name, pairs=pairs)

    def _add(self, place: Place, x: Tensor) -> Tensor:
        if place not in self._a:
            return x.new_zeros((*x.shape[:-1], self._sizes[place]))
        return F.linear(F.linear(x, self._a[place]), self._b[place]) * self._scale
