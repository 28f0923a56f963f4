"""What each linear layer reads, seen block by block over a calibration text.

A block's inputs are those that the blocks before it make after they were quantized.

Shapes: K the width of a layer's input.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from llmserve.model.layers import Linear
from llmserve.quant.dtypes import Float32Array

from .block_stream import BlockStream

__all__ = ["ActivationStream", "InputStatistics"]

_SAMPLE_ROWS = 512
_JOINED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


@dataclass(slots=True)
class InputStatistics:
    """The inputs of one linear layer, over all tokens that came to it."""

    gram: Tensor  # [K, K] float32: the sum of x xᵀ
    largest: Tensor  # [K]: largest magnitude of each input
    total: Tensor  # [K]: sum of magnitudes
    sample: Tensor  # [up to 512, K]: the first rows
    num_rows: int = 0

    @classmethod
    def of_width(cls, width: int) -> InputStatistics:
        """Statistics of nothing yet."""
        return cls(
            torch.zeros(width, width), torch.zeros(width), torch.zeros(width),
            torch.zeros(0, width),
        )  # fmt: skip

    def add(self, x: Tensor) -> None:
        """Count rows [..., K]."""
        rows = x.reshape(-1, x.shape[-1]).float()
        self.gram.addmm_(rows.T, rows)
        if len(rows):
            self.largest = torch.maximum(self.largest, rows.abs().amax(0))
        self.total += rows.abs().sum(0)
        if len(self.sample) < _SAMPLE_ROWS:
            self.sample = torch.cat((self.sample, rows[: _SAMPLE_ROWS - len(self.sample)]))
        self.num_rows += len(rows)

    @property
    def mean_magnitude(self) -> Tensor:
        """[K]: mean magnitude of each input; 0 where no token came."""
        return self.total / max(1, self.num_rows)

    @property
    def importance(self) -> Float32Array | None:
        """[K]: mean square of each input, which weighs a weight's error; None: no token came."""
        if self.num_rows == 0:
            return None
        squares: Float32Array = (self.gram.diagonal() / self.num_rows).numpy()
        return squares


class ActivationStream(BlockStream):
    """A calibration text on its way through the model; a block may be looked into first."""

    @torch.inference_mode()
    def observe(self, index: int) -> dict[str, InputStatistics]:
        """Fill block `index` with the original's weights and run it: layer → its inputs.

        Layers that read the same input share their statistics. `advance` must follow.
        """
        self._fill(f"layers.{index}.")
        found: dict[str, InputStatistics] = {}
        handles = []
        for path, module in self._block(index).named_modules():
            names = _canonical_names(index, path)
            if isinstance(module, Linear) and names:
                statistics = InputStatistics.of_width(module.weight.shape[1])
                found |= dict.fromkeys(names, statistics)
                hook = partial(_count, statistics)
                handles.append(module.register_forward_pre_hook(hook))
        self._run(index)
        for handle in handles:
            handle.remove()
        return found


def _count(statistics: InputStatistics, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    statistics.add(inputs[0])


def _canonical_names(index: int, path: str) -> list[str]:
    """Names of the linear layers that a module of block `index` computes; none for a router."""
    parent, _, last = path.rpartition(".")
    if not last.endswith("_proj"):
        return []
    return [f"model.layers.{index}.{parent}.{part}" for part in _JOINED.get(last, (last,))]
