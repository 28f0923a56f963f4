"""An exported decoder on ONNX Runtime's CPU provider; the one door to the package onnxruntime.

It runs batches of rows of different lengths the way the graph expects them: padded on the left,
with positions that count tokens only.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmserve.config import ModelConfig
from llmserve.errors import ExportError, MissingDependencyError
from llmserve.quant.dtypes import Float32Array

from .onnx_decoder import cache_names
from .onnx_files import MODEL_FILE

__all__ = ["OnnxDecoder"]

IntArray = npt.NDArray[np.int64]


class OnnxDecoder:
    """One loaded graph and the cache of the batch under way. Not for several threads."""

    def __init__(
        self, folder: Path, config: ModelConfig, *, num_threads: int | None = None
    ) -> None:
        """Load `folder/model.onnx`; `num_threads` None: ONNX Runtime's own choice.

        Raises:
            ExportError: ONNX Runtime does not take the graph.
            MissingDependencyError: onnxruntime is not installed.
        """
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingDependencyError(
                "onnxruntime", extra="onnx", feature="running an exported model"
            ) from error
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # Idle threads that spin would slow down whatever else runs here.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if num_threads is not None:
            options.intra_op_num_threads = num_threads
        try:
            self._session: Any = onnxruntime.InferenceSession(
                str(folder / MODEL_FILE), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # its exceptions have no common base of their own
            raise ExportError(f"ONNX Runtime refuses the exported graph: {error}") from error
        self._config = config
        self._past: list[Float32Array] = []
        self._mask: IntArray = np.zeros((0, 0), np.int64)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Float32Array:
        """Begin a batch: the logits [batch, vocabulary] after each prompt (not empty)."""
        length = max(map(len, prompts))
        ids = np.zeros((len(prompts), length), np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, length - len(prompt) :] = prompt
            mask[row, length - len(prompt) :] = 1
        self._mask = mask
        config = self._config
        empty = (len(prompts), config.num_kv_heads, 0, config.head_dim)
        self._past = [np.zeros(empty, np.float32) for _ in range(2 * config.num_layers)]
        return self._run(ids)

    def decode(self, token_ids: Sequence[int]) -> Float32Array:
        """One more token for every row: the logits [batch, vocabulary] after it."""
        ids = np.array(token_ids, np.int64)[:, None]
        self._mask = np.concatenate([self._mask, np.ones_like(ids)], axis=1)
        return self._run(ids)

    def _run(self, ids: IntArray) -> Float32Array:
        positions = np.maximum(np.cumsum(self._mask, axis=1) - 1, 0)[:, -ids.shape[1] :]
        feed = {"input_ids": ids, "attention_mask": self._mask, "position_ids": positions}
        for index in range(self._config.num_layers):
            key, value, *_ = cache_names(index)
            feed[key], feed[value] = self._past[2 * index : 2 * index + 2]
        logits, *self._past = self._session.run(None, feed)
        last: Float32Array = logits[:, -1]
        return last
