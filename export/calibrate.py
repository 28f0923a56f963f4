"""What each linear layer reads, seen block by block over a calibration text.

One block has weights at a time; the rest of the model is on torch's device `meta`, where it takes
no memory. So the work needs one block above the hidden states of the text. A block's inputs are
those that the blocks before it make after they were quantized.

Shapes: N tokens of the text, E hidden_size, K the width of a layer's input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from llmserve.checkpoint import Checkpoint
from llmserve.model.attention import CausalAttention
from llmserve.model.layers import Linear
from llmserve.model.transformer import Transformer
from llmserve.model.weights import canonical_tensors, load_parameters
from llmserve.quant.dtypes import Float32Array

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


class ActivationStream:
    """The hidden states of a text on their way through the model, one block after another."""

    def __init__(self, source: Checkpoint, windows: Sequence[Sequence[int]]) -> None:
        """Embed the windows, each a row of token ids from position 0 on."""
        self._source = source
        with torch.device("meta"):
            self._model = Transformer(source.config)
        self._model.eval()
        self._attend = CausalAttention(source.config)
        for prefix in ("embed_tokens.", "embed_positions."):
            load_parameters(self._model, source, prefix, dtype=torch.float32)
        self._states = [self._embed(window) for window in windows]  # each [1, N, E]
        self._model.embed_tokens.to("meta")

    @torch.inference_mode()
    def observe(self, index: int) -> dict[str, InputStatistics]:
        """Fill block `index` with the original's weights and run it: layer → its inputs.

        Layers that read the same input share their statistics. `advance` must follow.
        """
        self._fill(index)
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

    @torch.inference_mode()
    def advance(self, index: int, weights: Mapping[str, Float32Array]) -> None:
        """Put `weights` (canonical names) into block `index`, run it, keep its output."""
        self._fill(index)
        targets = canonical_tensors(self._model)
        for name, weight in weights.items():
            targets[name].copy_(torch.tensor(weight))
        self._states = self._run(index)
        self._block(index).to("meta")

    def _block(self, index: int) -> nn.Module:
        return self._model.layers[index]

    def _fill(self, index: int) -> None:
        load_parameters(self._model, self._source, f"layers.{index}.", dtype=torch.float32)

    @torch.inference_mode()
    def _embed(self, window: Sequence[int]) -> Tensor:
        return self._model.embed(torch.tensor([list(window)]), torch.arange(len(window)))

    def _run(self, index: int) -> list[Tensor]:
        outputs = []
        for states in self._states:
            positions = torch.arange(states.shape[1])
            rotation = self._model.rotations(positions, states.dtype)[index]
            outputs.append(self._block(index)(states, rotation, self._attend))
        return outputs


def _count(statistics: InputStatistics, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    statistics.add(inputs[0])


def _canonical_names(index: int, path: str) -> list[str]:
    """Names of the linear layers that a module of block `index` computes; none for a router."""
    parent, _, last = path.rpartition(".")
    if not last.endswith("_proj"):
        return []
    return [f"model.layers.{index}.{parent}.{part}" for part in _JOINED.get(last, (last,))]
