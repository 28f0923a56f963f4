"""OpenVINO GenAI as a peer: its continuous batching, stepped by hand.

The folder is one of `optimum-cli export openvino --task text-generation-with-past --weight-format
int8`, or `int4 --group-size 32 --sym --ratio 1.0`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openvino  # type: ignore[import-not-found]
import openvino_genai  # type: ignore[import-not-found]

from .peer_worker import Prompts, run_worker, versions_of

__all__ = ["OpenVinoEngine"]

_CACHE_GB = 1
_MAX_BATCHED_TOKENS = 512
_MAX_SEQUENCES = 64


class OpenVinoEngine:
    """A converted folder. Implements `TimedEngine`."""

    def __init__(self, folder: str, threads: int) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = _CACHE_GB
        scheduler.max_num_batched_tokens = _MAX_BATCHED_TOKENS
        scheduler.max_num_seqs = _MAX_SEQUENCES
        scheduler.enable_prefix_caching = False
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            folder, scheduler, "CPU", {"INFERENCE_NUM_THREADS": threads}
        )
        self._scheme = "int4" if Path(folder).name.endswith("int4") else "int8"
        self._num_requests = 0

    def describe(self) -> dict[str, Any]:
        """What runs."""
        return {
            "engine": "OpenVINO GenAI",
            "weights": f"{self._scheme}, int8 head",
            "cache": "u8",  # the CPU plug-in's default
            "versions": versions_of("openvino-genai", "openvino"),
        }

    def prefill(self, prompt: list[int]) -> float:
        """Seconds of the steps up to the prompt's first token."""
        start_s = time.perf_counter()
        [handle] = self._start([prompt], 1)
        seconds = time.perf_counter() - start_s
        self._finish([handle])
        return seconds

    def decode(self, prompts: Prompts, num_tokens: int) -> float:
        """Seconds of `num_tokens` steps once every prompt has its first token."""
        # One prompt's first token comes while others still wait: room for what it gets meanwhile.
        handles = self._start(prompts, num_tokens + len(prompts) + 1)
        _count(handles)
        start_s = time.perf_counter()
        for _ in range(num_tokens):
            self._pipeline.step()
        seconds = time.perf_counter() - start_s
        assert _count(handles) == len(prompts) * num_tokens, "not every step gave all a token"
        self._finish(handles)
        return seconds

    def _start(self, prompts: Prompts, num_tokens: int) -> list[Any]:
        """Add the prompts and step until each has a token."""
        config = openvino_genai.GenerationConfig(
            max_new_tokens=num_tokens, ignore_eos=True, do_sample=False
        )
        handles = [self._add(prompt, config) for prompt in prompts]
        while not all(handle.can_read() for handle in handles):
            self._pipeline.step()
        return handles

    def _add(self, prompt: list[int], config: Any) -> Any:
        self._num_requests += 1
        ids = openvino.Tensor(np.array([prompt], np.int64))
        return self._pipeline.add_request(self._num_requests, ids, config)

    def _finish(self, handles: list[Any]) -> None:
        for handle in handles:
            handle.stop()
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()


def _count(handles: list[Any]) -> int:
    """Tokens that came since they were counted last."""
    outputs = [output for handle in handles for output in _unread(handle)]
    return sum(len(output.generated_ids) for output in outputs)


def _unread(handle: Any) -> Iterator[Any]:
    while handle.can_read():
        yield from handle.read().values()


if __name__ == "__main__":
    run_worker(lambda: OpenVinoEngine(sys.argv[1], int(sys.argv[2])))
