"""onnxruntime-genai as a peer: its generator, all prompts of a run as one batch.

The folder is one of `llmserve export onnx`, or of its own tool: `python -m
onnxruntime_genai.models.builder -e cpu -p int8 --extra_options accuracy_level=4 block_size=32`, or
`-p int4` with `algo_config=rtn_last` (int8 head) added.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai  # type: ignore[import-not-found]

from .peer_worker import Prompts, run_worker, versions_of

__all__ = ["OnnxRuntimeEngine"]


class OnnxRuntimeEngine:
    """A folder with `genai_config.json`. Implements `TimedEngine`."""

    def __init__(self, folder: str, threads: int) -> None:
        config = onnxruntime_genai.Config(folder)
        session = {"session_options": {"intra_op_num_threads": threads}}
        config.overlay(json.dumps({"model": {"decoder": session}}))
        self._model = onnxruntime_genai.Model(config)
        self._scheme = Path(folder).name.rpartition("-")[2]

    def describe(self) -> dict[str, Any]:
        """What runs."""
        return {
            "engine": "onnxruntime-genai",
            "weights": self._scheme if self._scheme == "fp32" else f"{self._scheme}, int8 head",
            "cache": "f32",
            "versions": versions_of("onnxruntime-genai", "onnxruntime"),
        }

    def prefill(self, prompt: list[int]) -> float:
        """Seconds from a prompt to its first token."""
        generator = self._generator([prompt], 1)
        start_s = time.perf_counter()
        generator.append_tokens(np.array([prompt], np.int32))
        generator.generate_next_token()
        return time.perf_counter() - start_s

    def decode(self, prompts: Prompts, num_tokens: int) -> float:
        """Seconds from the first token of all prompts to `num_tokens` more of each."""
        generator = self._generator(prompts, num_tokens + 1)
        generator.append_tokens(np.array(prompts, np.int32))
        generator.generate_next_token()
        start_s = time.perf_counter()
        for _ in range(num_tokens):
            generator.generate_next_token()
        return time.perf_counter() - start_s

    def _generator(self, prompts: Prompts, num_tokens: int) -> Any:
        length = len(prompts[0]) + num_tokens
        params = onnxruntime_genai.GeneratorParams(self._model)
        params.set_search_options(
            batch_size=len(prompts), min_length=length, max_length=length, do_sample=False
        )
        return onnxruntime_genai.Generator(self._model, params)


if __name__ == "__main__":
    run_worker(lambda: OnnxRuntimeEngine(sys.argv[1], int(sys.argv[2])))
