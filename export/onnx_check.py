"""An exported decoder against the torch model it came from, token by token.

Both continue the same prompts, greedily, with their caches: one prompt alone, then three of
different lengths in one batch, which the graph sees padded on the left and torch row by row. At
every step the graph is given torch's token, and every logit is compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from llmserve.config import ModelConfig
from llmserve.errors import ExportError
from llmserve.model.attention import DenseCache
from llmserve.model.transformer import Transformer
from llmserve.quant.dtypes import Float32Array

from .onnx_session import OnnxDecoder

__all__ = ["CHECK_STEPS", "TOLERANCE", "ParityResult", "check_parity"]

TOLERANCE = 1e-4
"""Largest absolute logit error that is accepted."""

CHECK_STEPS = 32
"""Tokens generated for each prompt, where the model's context allows."""

_PROMPT_LENGTHS = ((9,), (3, 12, 7))  # one batch each
_SEED = 2718


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityResult:
    """What a comparison found."""

    num_steps: int
    """Tokens generated for each prompt."""
    num_prompts: int
    """Prompts over all batches."""
    max_logit_error: float
    """Largest absolute difference of two logits."""


def check_parity(model: Transformer, decoder: OnnxDecoder, config: ModelConfig) -> ParityResult:
    """Compare the graph with the model it was made from.

    Raises `ExportError` if a logit is further off than `TOLERANCE` or a greedy choice differs; two
    tokens of equal standing (within twice the tolerance) may change places.
    """
    random = np.random.default_rng(_SEED)
    largest = 0.0
    steps = num_prompts = 0
    for lengths in _PROMPT_LENGTHS:
        fitting = [min(length, max(1, config.max_seq_len // 2)) for length in lengths]
        steps = max(1, min(CHECK_STEPS, config.max_seq_len - max(fitting)))
        prompts = [random.integers(0, config.vocab_size, length).tolist() for length in fitting]
        num_prompts += len(prompts)
        largest = max(largest, _compare(model, decoder, prompts, steps))
    return ParityResult(num_steps=steps, num_prompts=num_prompts, max_logit_error=largest)


def _compare(
    model: Transformer, decoder: OnnxDecoder, prompts: Sequence[list[int]], steps: int
) -> float:
    """Largest logit error of one batch over all steps."""
    rows = [_TorchRow(model, len(prompt) + steps) for prompt in prompts]
    wanted = np.stack([row.run(prompt) for row, prompt in zip(rows, prompts, strict=True)])
    found = decoder.prefill(prompts)
    largest = _check_step(wanted, found, 0)
    for step in range(1, steps):
        tokens = wanted.argmax(-1).tolist()
        wanted = np.stack([row.run([token]) for row, token in zip(rows, tokens, strict=True)])
        found = decoder.decode(tokens)
        largest = max(largest, _check_step(wanted, found, step))
    return largest


def _check_step(wanted: Float32Array, found: Float32Array, step: int) -> float:
    error = float(np.abs(wanted - found).max())
    if not error <= TOLERANCE:  # NaN must fail too
        raise ExportError(
            f"the exported graph differs from the model at step {step}: a logit is off by "
            f"{error:.3g}, accepted are {TOLERANCE:g}; nothing was written"
        )
    chosen = np.take_along_axis(wanted, found.argmax(-1)[:, None], axis=-1)[:, 0]
    if (wanted.max(-1) - chosen > 2 * TOLERANCE).any():
        raise ExportError(
            f"the exported graph chose another token than the model at step {step}; "
            "nothing was written"
        )
    return error


class _TorchRow:
    """One sequence on the torch model, with its cache."""

    def __init__(self, model: Transformer, max_len: int) -> None:
        self._model = model
        self._cache = DenseCache(model.config, max_len=max_len)

    @torch.inference_mode()
    def run(self, token_ids: Sequence[int]) -> Float32Array:
        """The logits [vocabulary] after `token_ids`, which continue what was run before."""
        start = self._cache.length
        positions = torch.arange(start, start + len(token_ids))
        hidden = self._model.hidden(torch.tensor([list(token_ids)]), positions, self._cache)
        logits: Float32Array = self._model.logits(hidden[0, -1]).numpy()
        return logits
