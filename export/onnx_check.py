"""An exported decoder against the torch model it came from, token by token.

The graph continues prompts greedily, with its cache: one prompt alone, then batches of 3 and of 8
of different lengths. Torch reads what came out in one pass of its training forward, and every logit
of every step is compared. Beside integer weights the graph rounds activations, too, which torch
does not: there the divergence counts, not each logit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from llmserve.config import ModelConfig
from llmserve.errors import ExportError
from llmserve.model.transformer import Transformer
from llmserve.quant.dtypes import Float32Array

from .onnx_session import OnnxDecoder

__all__ = ["CHECK_STEPS", "KL_TOLERANCE", "TOLERANCE", "ParityResult", "check_parity"]

TOLERANCE = 1e-4
"""Largest absolute logit error that is accepted of float32."""

KL_TOLERANCE = 0.05
"""Largest mean divergence, in nats a token, that is accepted of rounded activations."""

CHECK_STEPS = 64
"""Tokens generated for each prompt, where the model's context allows."""

_PROMPT_LENGTHS = ((9,), (3, 12, 7), (1, 16, 5, 2, 11, 8, 13, 4))  # one batch each
_SEED = 2718


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityResult:
    """What a comparison found."""

    num_steps: int
    """Tokens generated for each prompt; of the batch that had room for the fewest."""
    num_prompts: int
    """Prompts over all batches."""
    max_logit_error: float
    """Largest absolute difference of two logits."""
    mean_kl: float
    """Mean divergence of the graph's predictions from torch's, nats per token."""
    top1_agreement: float
    """Share of predictions at which both think the same token likeliest."""


def check_parity(
    model: Transformer, decoder: OnnxDecoder, config: ModelConfig, *, is_exact: bool = True
) -> ParityResult:
    """Compare the graph with the model it was made from.

    Args:
        model: with the weights that the graph has.
        decoder: the graph.
        config: the model's.
        is_exact: whether the graph computes in float32 throughout.

    Raises `ExportError` if a logit is further off than `TOLERANCE` or a greedy choice differs; two
    tokens of equal standing (within twice the tolerance) may change places. Where activations are
    rounded: if the mean divergence is above `KL_TOLERANCE`.
    """
    random = np.random.default_rng(_SEED)
    sums = _Sums()
    for lengths in _PROMPT_LENGTHS:
        fitting = [min(length, max(1, config.max_seq_len // 2)) for length in lengths]
        steps = max(1, min(CHECK_STEPS, config.max_seq_len - max(fitting)))
        prompts = [random.integers(0, config.vocab_size, length).tolist() for length in fitting]
        sums.num_steps = min(sums.num_steps, steps)
        sums.num_prompts += len(prompts)
        for step, (wanted, found) in enumerate(_steps(model, decoder, prompts, steps)):
            if is_exact:
                _check_step(wanted, found, step)
            sums.add(wanted, found)
    result = sums.result()
    if not result.mean_kl <= KL_TOLERANCE and not is_exact:  # NaN must fail too
        raise ExportError(
            f"the exported graph differs from the model by {result.mean_kl:.3g} nats a token, "
            f"accepted are {KL_TOLERANCE:g}; nothing was written"
        )
    return result


def _steps(
    model: Transformer, decoder: OnnxDecoder, prompts: Sequence[list[int]], steps: int
) -> Iterator[tuple[Float32Array, Float32Array]]:
    """The logits [batch, vocabulary] of torch and of the graph, of one batch at each step."""
    found = [decoder.prefill(prompts)]
    texts = [list(prompt) for prompt in prompts]
    for _ in range(1, steps):
        tokens = found[-1].argmax(-1).tolist()
        for text, token in zip(texts, tokens, strict=True):
            text.append(token)
        found.append(decoder.decode(tokens))
    wanted = np.stack([_last_logits(model, text, steps) for text in texts], axis=1)
    yield from zip(wanted, found, strict=True)


@torch.inference_mode()
def _last_logits(model: Transformer, text: list[int], count: int) -> Float32Array:
    """Torch's logits at the last places of a text, in one pass and without a cache."""
    logits: Float32Array = model(torch.tensor([text]))[0, -count:].numpy()
    return logits


def _check_step(wanted: Float32Array, found: Float32Array, step: int) -> None:
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


@dataclass(slots=True)
class _Sums:
    num_steps: int = CHECK_STEPS
    num_prompts: int = 0
    num_rows: int = 0
    agreements: int = 0
    kl: float = 0.0
    max_logit_error: float = 0.0

    def add(self, wanted: Float32Array, found: Float32Array) -> None:
        error = np.abs(wanted - found).max()
        self.max_logit_error = float(np.maximum(self.max_logit_error, error))  # NaN stays
        log_wanted, log_found = (
            torch.from_numpy(logits).double().log_softmax(-1) for logits in (wanted, found)
        )
        self.kl += float((log_wanted.exp() * (log_wanted - log_found)).sum())
        self.agreements += int((wanted.argmax(-1) == found.argmax(-1)).sum())
        self.num_rows += len(wanted)

    def result(self) -> ParityResult:
        return ParityResult(
            num_steps=self.num_steps,
            num_prompts=self.num_prompts,
            max_logit_error=self.max_logit_error,
            mean_kl=self.kl / self.num_rows,
            top1_agreement=self.agreements / self.num_rows,
        )
