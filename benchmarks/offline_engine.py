"""llmserve's engine as a contender of the offline comparison: `LLM`, as anybody would use it.

Greedy, end ids ignored, one fixed configuration for every row of the table.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from llmserve.checkpoint import Checkpoint
from llmserve.engine.request import FinishReason, Request
from llmserve.errors import EngineError
from llmserve.llm import LLM
from llmserve.sampling import SamplingParams

from .machine import versions
from .peer_worker import Prompts, run_worker

__all__ = ["LlmEngine"]

CACHE_BYTES = 512 << 20


class LlmEngine:
    """A model folder in `LLM`. Implements `TimedEngine`."""

    def __init__(
        self,
        folder: str,
        *,
        runner: str = "auto",
        threads: int | None = None,
        device: str = "cpu",
        dtype: str | None = None,
        num_cached: int = 0,
    ) -> None:
        """`num_cached` tokens at least have room in the cache, and 512 MiB of them."""
        self.config = Checkpoint.open(folder, verify=False).config
        """The model's."""
        self._itemsize = 4 if (dtype or self.config.dtype) == "float32" else 2
        most = 2 * 4 * self.config.num_layers * self.config.kv_size * num_cached
        self.llm = LLM(
            folder,
            runner=runner,
            threads=threads,
            device=device,
            dtype=dtype,
            cache_bytes=max(CACHE_BYTES, most),
        )
        self._num_requests = 0

    def describe(self) -> dict[str, Any]:
        """What runs."""
        info = self.llm.info
        return {
            "engine": f"llmserve {info.runner}",
            "weights": info.executed_form,
            "cache": info.cache_dtype,
            "versions": versions(("numpy", "torch")),
            **self._step_bytes(),
        }

    def _step_bytes(self) -> dict[str, int]:
        """What a step reads: all weights it multiplies with, and for each token of a sequence its
        keys and values. Graphs do not tell the first, nor do experts, of which some rest."""
        info, config = self.llm.info, self.config
        if info.runner == "onnx" or config.experts is not None:
            return {}
        num_bytes = info.weight_bytes
        if info.runner == "torch" and not config.tie_word_embeddings:
            # One row of it is looked up.
            num_bytes -= self._itemsize * config.vocab_size * config.hidden_size
        return {"weight_bytes": num_bytes, "token_bytes": info.cache_bytes_per_token}

    def prefill(self, prompt: list[int]) -> float:
        """Seconds from a prompt to its first token."""
        start_s = time.perf_counter()
        self._start([prompt], 1)
        return time.perf_counter() - start_s

    def decode(self, prompts: Prompts, num_tokens: int) -> float:
        """Seconds of `num_tokens` tokens of each prompt once all have their first one.

        The last step may bring more; then it is their share of the time.
        """
        # One prompt's first token comes while others still wait: room for what it gets meanwhile.
        ids = self._start(prompts, num_tokens + len(prompts) + 1)
        made, wanted = 0, len(prompts) * num_tokens
        start_s = time.perf_counter()
        while made < wanted:
            came = self._step()
            made += sum(came.values())
            if len(came) < len(prompts):
                raise EngineError(f"a step of {len(prompts)} brought tokens of {len(came)}")
        seconds = (time.perf_counter() - start_s) * wanted / made
        for request_id in ids:
            self.llm.engine.abort(request_id)
        while self.llm.engine.has_work:
            self._step()
        return seconds

    def _start(self, prompts: Prompts, num_tokens: int) -> list[str]:
        """Add the prompts and step until each has a token; the requests' ids."""
        params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=num_tokens)
        ids = []
        for prompt in prompts:
            self._num_requests += 1
            ids.append(f"bench-{self._num_requests}")
            request = Request(
                request_id=ids[-1], prompt_token_ids=prompt, sampling_params=params, seed=0
            )
            self.llm.engine.add_request(request)
        waiting = set(ids)
        while waiting:
            waiting -= self._step().keys()
        return ids

    def _step(self) -> dict[str, int]:
        """One step; request → tokens that came. Raises `EngineError` for one that failed."""
        outputs = self.llm.engine.step(time.monotonic())
        for output in outputs:
            if output.finish_reason not in (None, FinishReason.LENGTH, FinishReason.ABORT):
                raise EngineError(f"a request ended as {output.finish_reason}: {output.error}")
        return {output.request_id: len(output.token_ids) for output in outputs if output.token_ids}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--runner", default="auto")
    parser.add_argument("--threads", type=int)
    return parser.parse_args()


def _load() -> LlmEngine:
    args = _parse()
    return LlmEngine(args.folder, runner=args.runner, threads=args.threads)


if __name__ == "__main__":
    run_worker(_load)
