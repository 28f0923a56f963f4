"""AdamW with 8-bit moments, as bitsandbytes computes it.

A moment is a byte for each value, an index into a table of 256 numbers, with one scale for each
256 values (arXiv:2110.02861). Parameters under 4,096 values keep float32 moments. The tables are
constants, so a checkpoint holds bytes and scales alone.
"""

from __future__ import annotations

from typing import Any

import torch

from llmserve.quant.bnb import import_bitsandbytes

__all__ = ["make_adamw_8bit", "prepare_8bit_state"]


def make_adamw_8bit(groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW8bit. Raises `MissingDependencyError` without the package."""
    _, bitsandbytes = import_bitsandbytes("the optimizer adamw8bit")
    return bitsandbytes.optim.AdamW8bit(groups, **settings)  # type: ignore[no-any-return]


def prepare_8bit_state(optimizer: Any) -> None:
    """Make the state that the first step would make, with moments of zero."""
    optimizer.check_overrides()
    for group_index, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            if not optimizer.state[parameter]:
                optimizer.init_state(group, parameter, group_index, index)
