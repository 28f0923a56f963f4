"""How far each block's output is from the original's, on the same texts, in float32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from llmserve.model.attention import CausalAttention
from llmserve.model.transformer import Transformer

from .certificate import LayerError

__all__ = ["layer_errors"]


@torch.inference_mode()
def layer_errors(
    original: Transformer, candidate: Transformer, windows: Sequence[Sequence[int]]
) -> tuple[LayerError, ...]:
    """Relative error of the output of every block, and of the final norm."""
    errors: list[float] = []
    norms: list[float] = []
    for window in windows:
        before, after = (_outputs(model, window) for model in (original, candidate))
        errors = errors or [0.0] * len(before)
        norms = norms or [0.0] * len(before)
        for index, (one, other) in enumerate(zip(before, after, strict=True)):
            errors[index] += float((one - other).double().square().sum())
            norms[index] += float(one.double().square().sum())
    names = [f"model.layers.{index}" for index in range(len(errors) - 1)] + ["model.norm"]
    return tuple(
        LayerError(name=name, relative_error=(error / norm) ** 0.5 if norm else 0.0)
        for name, error, norm in zip(names, errors, norms, strict=False)
    )


def _outputs(model: Transformer, window: Sequence[int]) -> list[Tensor]:
    ids = torch.tensor([list(window)])
    with _recorded(model.layers) as outputs:
        hidden = model.hidden(ids, torch.arange(ids.shape[1]), CausalAttention(model.config))
    return [*outputs, hidden]


@contextmanager
def _recorded(layers: nn.ModuleList) -> Iterator[list[Tensor]]:
    """The outputs of blocks, as they are computed within."""
    outputs: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
        for layer in layers
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()
