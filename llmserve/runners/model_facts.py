"""What every runner says of its model and adds up of its hidden states, in one place.

Shapes: E hidden_size, n tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..adapters import Adapter
from ..config import ModelConfig
from ..layouts import expected_tensors
from ..weight_source import WeightSource
from .cache_groups import LayerGroup
from .protocol import CacheGroup, DoubleArray, HiddenSum

__all__ = ["cache_groups_of", "fingerprint_of", "num_parameters_of", "sum_hidden"]


def cache_groups_of(groups: Sequence[LayerGroup], layer_bytes: int) -> tuple[CacheGroup, ...]:
    """The groups as the engine is told of them; `layer_bytes`: of one token in one layer."""
    return tuple(
        CacheGroup(
            num_layers=len(group.layers),
            window=group.window,
            bytes_per_token=layer_bytes * len(group.layers),
        )
        for group in groups
    )


def fingerprint_of(checkpoint: WeightSource, adapters: Sequence[Adapter]) -> str:
    """Root of the keys of the prefix cache. Blocks are named by it and an adapter's name: the
    adapter's content counts."""
    return "|".join(
        [checkpoint.fingerprint, *(f"{one.name}={one.fingerprint}" for one in adapters)]
    )


def num_parameters_of(config: ModelConfig) -> int:
    """Parameters of a model, shared ones once."""
    return sum(map(math.prod, expected_tensors(config).values()))


def sum_hidden(hidden: npt.NDArray[np.float64], wanted: HiddenSum) -> DoubleArray:
    """Rows [n, E] added to what `wanted` carries, one after another: chunks of any size give the
    same bits."""
    if wanted.carry is not None:
        hidden = np.concatenate([wanted.carry[None], hidden])
    total: DoubleArray = np.add.accumulate(hidden, axis=0)[-1]
    return total
