"""An exported decoder as its check runs it: whole batches, with the caches of the ONNX runner.

Rows of different lengths are padded on the right at the prompt and decode together.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llmserve.model_files import GRAPH_FILE
from llmserve.quant.dtypes import Float32Array
from llmserve.runners.onnx_cache import GraphCache
from llmserve.runners.onnx_session import OnnxGraph

__all__ = ["OnnxDecoder"]

IntArray = npt.NDArray[np.int64]


class OnnxDecoder:
    """One loaded graph and the cache of the batch under way. Not for several threads."""

    def __init__(self, folder: Path, *, max_len: int, num_threads: int | None = None) -> None:
        """Load `folder/model.onnx`; a row has room for `max_len` tokens.

        Raises:
            CheckpointError: ONNX Runtime does not take the graph.
            MissingDependencyError: onnxruntime is not installed.
        """
        self._graph = OnnxGraph(folder / GRAPH_FILE, num_threads=num_threads)
        self._max_len = max_len
        self._cache: GraphCache | None = None
        self._lengths: IntArray = np.empty(0, np.int64)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Float32Array:
        """Begin a batch: the logits [batch, vocabulary] after each prompt (not empty)."""
        self._cache = self._graph.new_cache(len(prompts), self._max_len)
        self._lengths = np.array([len(prompt) for prompt in prompts])
        longest = int(self._lengths.max())
        ids = np.zeros((len(prompts), longest), np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = prompt
        positions = np.tile(np.arange(longest), (len(prompts), 1))
        logits = self._graph.run(self._cache, 0, ids, positions, self._lengths)
        last: Float32Array = logits[np.arange(len(prompts)), self._lengths - 1]
        return last

    def decode(self, token_ids: Sequence[int]) -> Float32Array:
        """One more token for every row: the logits [batch, vocabulary] after it."""
        return self.extend(np.array(token_ids, np.int64)[:, None])

    def extend(self, ids: IntArray) -> Float32Array:
        """More tokens, [batch, count] (count 1, or one row): the logits after the last."""
        assert self._cache is not None, "a batch begins with prefill"
        positions = self._lengths[:, None] + np.arange(ids.shape[1])
        self._lengths = self._lengths + ids.shape[1]
        return self._graph.run(self._cache, 0, ids, positions, self._lengths)[:, -1].copy()
