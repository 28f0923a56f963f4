"""Random LoRA adapters for a model, and the model with them merged in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from llmserve.adapters import Adapter, LoraPair, Place
from llmserve.config import ModelConfig
from llmserve.layouts import expected_tensors

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def random_adapter(
    config: ModelConfig,
    name: str = "a",
    *,
    projections: Sequence[str] = (*ATTENTION, *MLP),
    layers: Sequence[int] | None = None,
    rank: int = 4,
    alpha: float = 8.0,
    seed: int = 0,
) -> Adapter:
    """Matrices N(0, 0.2), B too, so that it changes the model; every rank one more than the last.

    Projections that the model does not have are left out.
    """
    generator = np.random.default_rng(seed)
    shapes = expected_tensors(config)
    pairs = {}
    for layer_index in range(config.num_layers) if layers is None else layers:
        for more, projection in enumerate(projections):
            place = Place(layer_index, projection)
            if f"{place.module}.weight" not in shapes:
                continue
            out, width = shapes[f"{place.module}.weight"]
            a = generator.normal(0.0, 0.2, (rank + more, width)).astype(np.float32)
            b = generator.normal(0.0, 0.2, (out, rank + more)).astype(np.float32)
            pairs[place] = LoraPair(a=a, b=b, alpha=alpha)
    return Adapter(name=name, pairs=pairs)


def merged_tensors(
    tensors: dict[str, npt.NDArray[np.float32]], adapter: Adapter
) -> dict[str, npt.NDArray[np.float32]]:
    """W + scale · B A for every adapted layer, summed in float64; the rest unchanged."""
    merged = dict(tensors)
    for place, pair in adapter.pairs.items():
        product = pair.b.astype(np.float64) @ pair.a.astype(np.float64)
        weight = merged[f"{place.module}.weight"] + pair.alpha / len(pair.a) * product
        merged[f"{place.module}.weight"] = weight.astype(np.float32)
    return merged
