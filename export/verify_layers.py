"""How far each block's output is from the original's, on the same texts, in float32."""

from __future__ import annotations

import torch

from .block_stream import BlockStream
from .certificate import LayerError

__all__ = ["layer_errors"]


@torch.inference_mode()
def layer_errors(original: BlockStream, candidate: BlockStream) -> tuple[LayerError, ...]:
    """Relative error of the output of every block, and of the final norm; runs both to the end."""
    return tuple(
        LayerError(name=name, relative_error=_relative_error(before, after))
        for (name, before), (_, after) in zip(original.outputs(), candidate.outputs(), strict=True)
        if before
    )


def _relative_error(before: list[torch.Tensor], after: list[torch.Tensor]) -> float:
    error = norm = 0.0
    for one, other in zip(before, after, strict=True):
        error += float((one - other).double().square().sum())
        norm += float(one.double().square().sum())
    return (error / norm) ** 0.5 if norm else 0.0
