"""The place where a low-rank adapter acts: beside each projection of the model.

Who adapts which rows is the caller's business, as attention's cache is: the model hands over the
input of every projection and adds what comes back. Source: LoRA, arXiv 2106.09685, section 4.1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

__all__ = ["Adapt", "project"]


class Adapt(Protocol):
    """What adapters add to the output of a projection, for the tokens of one call."""

    def __call__(self, layer_index: int, projection: str, x: Tensor) -> Tensor | None:
        """The projection's input x [..., in] → what is added [..., out], in its type, or None.

        `projection` is the model's own name, of the joined ones where it joins several: `qkv_proj`,
        `o_proj`, `gate_up_proj` or `up_proj`, `down_proj`.
        """


def project(
    linear: Callable[[Tensor], Tensor],
    x: Tensor,
    adapt: Adapt | None,
    layer_index: int,
    projection: str,
) -> Tensor:
    """`linear(x)`, with what `adapt` adds to it."""
    y = linear(x)
    if adapt is None:
        return y
    added = adapt(layer_index, projection, x)
    return y if added is None else y + added
