"""`transformers` as a peer: `generate` in bfloat16, all prompts of a run as one batch."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList

from .peer_worker import Prompts, run_worker, versions_of

__all__ = ["TransformersEngine"]


class TransformersEngine:
    """A model folder. Implements `TimedEngine`."""

    def __init__(self, folder: str, threads: int) -> None:
        torch.set_num_threads(threads)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        self._model = model.eval()

    def describe(self) -> dict[str, Any]:
        """What runs."""
        return {
            "engine": "transformers",
            "weights": "bf16, bf16 head",
            "cache": "bf16",
            "versions": versions_of("transformers", "torch"),
        }

    @torch.inference_mode()
    def prefill(self, prompt: list[int]) -> float:
        """Seconds of one pass over the prompt with the logits of its last token."""
        ids = torch.tensor([prompt])
        start_s = time.perf_counter()
        self._model(ids, use_cache=True, logits_to_keep=1).logits.argmax(-1)
        return time.perf_counter() - start_s

    @torch.inference_mode()
    def decode(self, prompts: Prompts, num_tokens: int) -> float:
        """Seconds from the first token of all prompts to `num_tokens` more of each."""
        clock = _Clock()
        ids = torch.tensor(prompts)
        self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=num_tokens + 1,  # past the end token
            max_new_tokens=num_tokens + 1,
            logits_processor=LogitsProcessorList([clock]),
        )
        assert len(clock.times_s) == num_tokens + 1, "a run ended early"
        return clock.times_s[-1] - clock.times_s[0]


class _Clock(LogitsProcessor):
    """Notes when each token's logits are there."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.times_s.append(time.perf_counter())
        return scores


if __name__ == "__main__":
    run_worker(lambda: TransformersEngine(sys.argv[1], int(sys.argv[2])))
