"""A text on its way through a model, one block after another.

One block has weights at a time; the rest of the model is on torch's device `meta`, where it takes
no memory. So the work needs one block, or the embedding, above the hidden states of the text.

Shapes: N tokens of a window, E hidden_size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor, nn

from llmserve.checkpoint import Checkpoint
from llmserve.config import ModelConfig
from llmserve.model.attention import CausalAttention
from llmserve.model.transformer import Transformer
from llmserve.model.weights import canonical_tensors, load_parameters
from llmserve.quant.dtypes import Float32Array

__all__ = ["BlockStream", "Described", "WeightSource"]

WeightSource = Callable[[str], Float32Array]
"""Gives a tensor by its canonical name."""

_NO_WEIGHTS: Mapping[str, Float32Array] = MappingProxyType({})


class Described(Protocol):
    """What has a configuration."""

    @property
    def config(self) -> ModelConfig:
        """Of the model."""
        ...


class BlockStream:
    """The hidden states of some windows, in float32."""

    def __init__(
        self, source: Checkpoint | Described, windows: Sequence[Sequence[int]], *,
        weights: WeightSource | None = None, attend: CausalAttention | None = None,
    ) -> None:  # fmt: skip
        """Embed the windows.

        Args:
            source: the model; a folder, or whatever has a configuration beside `weights`.
            windows: rows of token ids, each from position 0 on.
            weights: where its tensors come from; None: from the folder.
            attend: attention; None: the model's own.
        """
        self._source, self._weights = source, weights
        with torch.device("meta"):
            self._model = Transformer(source.config)
        self._model.eval()
        self._attend = attend or CausalAttention(source.config)
        self._num_done = 0
        self._fill("embed_tokens.")
        self._fill("embed_positions.")
        self.states = [self._embed(window) for window in windows]
        """Of each window, [1, N, E]: what the next block reads, at last the final norm's output."""
        self._model.embed_tokens.to("meta")

    @torch.inference_mode()
    def advance(self, index: int, weights: Mapping[str, Float32Array] = _NO_WEIGHTS) -> None:
        """Fill block `index`, put `weights` (canonical names) into it, run it, keep its output."""
        assert index == self._num_done, "blocks follow one another"
        self._fill(f"layers.{index}.")
        targets = canonical_tensors(self._model)
        for name, weight in weights.items():
            targets[name].copy_(torch.tensor(weight))
        self.states = self._run(index)
        self._block(index).to("meta")
        self._num_done += 1

    @torch.inference_mode()
    def outputs(self) -> Iterator[tuple[str, list[Tensor]]]:
        """Run what is left, piece by piece: names of blocks and of the final norm, new states."""
        while self._num_done < len(self._model.layers):
            index = self._num_done
            self.advance(index)
            yield f"model.layers.{index}", self.states
        if self._num_done == len(self._model.layers):
            self._fill("norm.")
            self.states = [self._model.norm(states) for states in self.states]
            self._num_done += 1
            yield "model.norm", self.states

    def finish(self) -> None:
        """Run what is left."""
        for _ in self.outputs():
            pass

    @torch.inference_mode()
    def logits(self) -> Iterator[Tensor]:
        """Of each window, [N, V]. Everything must have run."""
        assert self._num_done > len(self._model.layers), "the final norm has not run"
        self._fill("embed_tokens." if self._model.lm_head is None else "lm_head.")
        for states in self.states:
            yield self._model.logits(states)[0]

    def _block(self, index: int) -> nn.Module:
        return self._model.layers[index]

    def _fill(self, prefix: str) -> None:
        """Give the parameters whose names begin so their values."""
        if self._weights is None:
            assert isinstance(self._source, Checkpoint), "weights come from a folder or a function"
            load_parameters(self._model, self._source, prefix, dtype=torch.float32)
            return
        own = {n: p for n, p in self._model.named_parameters() if n.startswith(prefix)}
        empty = {name: torch.empty(old.shape) for name, old in own.items()}
        self._model.load_state_dict(empty, strict=False, assign=True)
        for name, target in canonical_tensors(self._model).items():
            if name.removeprefix("model.").startswith(prefix):
                target.copy_(torch.tensor(self._weights(name)))

    @torch.inference_mode()
    def _embed(self, window: Sequence[int]) -> Tensor:
        return self._model.embed(torch.tensor([list(window)]), torch.arange(len(window)))

    def _run(self, index: int) -> list[Tensor]:
        outputs = []
        for states in self.states:
            positions = torch.arange(states.shape[1])
            rotation = self._model.rotations(positions, states.dtype)[index]
            outputs.append(self._block(index)(states, rotation, self._attend))
        return outputs
