"""An exported decoder on ONNX Runtime's CPU provider; the one door to the package onnxruntime.

The caches (`onnx_cache.py`) are our own memory, given to the graph as past and as present:
GroupQueryAttention then writes new keys and values in place. So are the inputs and logits of a step
that gives each row one token: all of it is bound once, and a step only writes numbers into it.

Shapes: B rows of a call, S tokens of a call in each row, C tokens of room in a row of the cache, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import CheckpointError, MissingDependencyError
from .onnx_cache import GraphCache
from .protocol import IntArray

__all__ = ["EXPORT_FILE", "OnnxGraph", "open_session"]

EXPORT_FILE = "export.json"
"""Name of the file beside a graph that says what the graph is."""

Floats = npt.NDArray[np.float32]


def open_session(path: Path, *, num_threads: int | None = None) -> Any:
    """A session over the graph at `path`; `num_threads` None: ONNX Runtime's own choice.

    Raises:
        CheckpointError: ONNX Runtime does not take the graph.
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
    # Threads spin from one operator to the next; between two calls they would slow down others.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if num_threads is not None:
        options.intra_op_num_threads = num_threads
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common base of their own
        raise CheckpointError(f"{path}: ONNX Runtime refuses the graph: {error}") from error


class OnnxGraph:
    """One loaded decoder. Not for several threads."""

    def __init__(self, path: Path, *, num_threads: int | None = None) -> None:
        """Load the graph at `path`. Raises as `open_session`, and `CheckpointError` for a graph
        that is no decoder of ours."""
        self._session = open_session(path, num_threads=num_threads)
        inputs = {value.name: value for value in self._session.get_inputs()}
        self._pasts = [name for name in inputs if name.startswith("past_key_values.")]
        outputs = {value.name: value for value in self._session.get_outputs()}
        if not self._pasts or "logits" not in outputs or "input_ids" not in inputs:
            raise CheckpointError(
                f"{path}: is no decoder with a cache; write one with llmserve export onnx"
            )
        self._has_positions = "position_ids" in inputs
        _, self.num_kv_heads, _, self.head_dim = inputs[self._pasts[0]].shape
        self.vocab_size: int = outputs["logits"].shape[-1]
        self._bindings: dict[tuple[int, int], Any] = {}
        self._steps: dict[tuple[int, int], _Step] = {}
        self._last: _Step | None = None
        self._bound: npt.NDArray[np.float32] | None = None

    @property
    def num_layers(self) -> int:
        """Layers with a cache."""
        return len(self._pasts) // 2

    def new_cache(
        self, num_rows: int, num_tokens: int, *, is_growing: bool = False, num_kept: int = 0
    ) -> GraphCache:
        """A cache with room for `num_tokens` in each row, at once or as it is needed; `num_kept`
        as in `GraphCache`."""
        shape = (num_rows, self.num_kv_heads, num_tokens, self.head_dim)
        return GraphCache(len(self._pasts), shape, is_growing=is_growing, num_kept=num_kept)

    def run(
        self, cache: GraphCache, first_row: int, ids: IntArray, positions: IntArray,
        lengths: IntArray,
    ) -> Floats:  # fmt: skip
        """Add tokens to rows of the cache and give their logits.

        Args:
            cache: of this graph, with room for the tokens.
            first_row: row of the first text; the others follow it.
            ids: [B, S]. Several tokens beside a past need B = 1.
            positions: [B, S] of the tokens in their texts.
            lengths: [B] tokens of each row, the new ones included; with B > 1 and no past a row may
                have fewer than S: its first ones count.

        Returns:
            [B, S, V]; with S = 1 valid until the next call of that kind.
        """
        self._forget_bindings_of_others(cache)
        if ids.shape[1] == 1:
            return self._step(cache, first_row, ids, positions, lengths)
        binding = self._binding(cache, first_row, len(ids))
        mask = np.arange(int(lengths.max())) < lengths[:, None]
        logits = np.empty((*ids.shape, self.vocab_size), np.float32)
        # A binding has addresses only: what it names lives until the call is over.
        feed = [np.ascontiguousarray(values, np.int64) for values in (ids, positions, mask)]
        self._bind(binding, *feed)
        _bind_output(binding, "logits", logits)
        self._session.run_with_iobinding(binding)
        return logits

    def _step(
        self, cache: GraphCache, first_row: int, ids: IntArray, positions: IntArray,
        lengths: IntArray,
    ) -> Floats:  # fmt: skip
        """One token for each row, in memory that stays bound."""
        key = (first_row, len(ids))
        step = self._steps.get(key)
        if step is None:
            step = self._steps[key] = self._new_step(cache, *key)
        self._last = step
        step.ids[:] = ids
        step.positions[:] = positions
        np.less(step.places, lengths[:, None], out=step.mask)
        self._session.run_with_iobinding(step.binding)
        return step.logits

    def likeliest_rounds(
        self, lengths: IntArray, num_rounds: int
    ) -> Iterator[tuple[IntArray, Floats]]:
        """The likeliest tokens [B] after the last call, which gave each row one token, and their
        logits [B]; then, up to `num_rounds` times in all, those after these.

        Few calls, as each of them finds caches that the graph has filled.

        Args:
            lengths: [B] tokens of each row of the last call; the cache has room for all rounds.
            num_rounds: 1 or more.

        Yields arrays of their own.
        """
        step = self._last
        assert step is not None, "no call gave each row one token"
        logits, ids, positions = step.logits[:, 0], step.ids[:, 0], step.positions
        mask = step.mask.reshape(-1)
        rows = np.arange(len(lengths))
        places = rows * len(step.places) + lengths
        for ahead in range(num_rounds):
            if ahead:
                mask[places] = 1
                places += 1
                positions += 1
                self._session.run_with_iobinding(step.binding)
            logits.argmax(axis=1, out=ids)
            yield ids.copy(), logits[rows, ids]

    def _new_step(self, cache: GraphCache, first_row: int, count: int) -> _Step:
        """The mask is as wide as a row's room: the operator counts a row's tokens itself."""
        step = _Step(
            binding=self._new_binding(cache, first_row, count),
            ids=np.zeros((count, 1), np.int64),
            positions=np.zeros((count, 1), np.int64),
            mask=np.zeros((count, cache.room), np.int64),
            places=np.arange(cache.room),
            logits=np.empty((count, 1, self.vocab_size), np.float32),
        )
        self._bind(step.binding, step.ids, step.positions, step.mask)
        _bind_output(step.binding, "logits", step.logits)
        return step

    def _bind(self, binding: Any, ids: IntArray, positions: IntArray, mask: IntArray) -> None:
        feed = {"input_ids": ids, "attention_mask": mask}
        if self._has_positions:
            feed["position_ids"] = positions
        for name, values in feed.items():
            binding.bind_input(name, "cpu", 0, np.int64, values.shape, values.ctypes.data)

    def _binding(self, cache: GraphCache, first_row: int, count: int) -> Any:
        key = (first_row, count)
        if key not in self._bindings:
            self._bindings[key] = self._new_binding(cache, *key)
        return self._bindings[key]

    def _new_binding(self, cache: GraphCache, first_row: int, count: int) -> Any:
        """Past and present of `count` rows as the same memory."""
        binding = self._session.io_binding()
        for past, tensor in zip(self._pasts, cache.tensors, strict=True):
            rows = tensor[first_row : first_row + count]
            binding.bind_input(past, "cpu", 0, np.float32, rows.shape, rows.ctypes.data)
            _bind_output(binding, past.replace("past_key_values", "present"), rows)
        return binding

    def _forget_bindings_of_others(self, cache: GraphCache) -> None:
        """What is bound is of one cache, and of the room that its rows had."""
        if self._bound is not cache.tensors[0]:
            self._bindings, self._steps = {}, {}
            self._bound = cache.tensors[0]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Step:
    """A call with one token in each row, [B, 1] except where said."""

    binding: Any
    ids: IntArray
    positions: IntArray
    mask: IntArray
    """[B, C]"""
    places: IntArray
    """[C], ascending."""
    logits: Floats
    """[B, 1, V]"""


def _bind_output(binding: Any, name: str, values: Floats) -> None:
    binding.bind_output(name, "cpu", 0, np.float32, values.shape, values.ctypes.data)
