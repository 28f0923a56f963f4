"""An exported decoder on ONNX Runtime's CPU provider; the one door to the package onnxruntime.

The caches are our own memory, given to the graph as past and as present: GroupQueryAttention then
writes new keys and values in place. Memory is reserved for rows of full length and becomes real as
it is written.

Shapes: R rows of the cache, B rows of a call, KV key heads, C tokens of room in a row, D values of
a head, S tokens of a call in each row, V vocabulary.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import CheckpointError, ConfigError, MissingDependencyError
from .protocol import IntArray

__all__ = ["EXPORT_FILE", "GraphCache", "OnnxGraph", "open_session"]

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
    # Idle threads that spin would slow down whatever else runs here.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if num_threads is not None:
        options.intra_op_num_threads = num_threads
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common base of their own
        raise CheckpointError(f"{path}: ONNX Runtime refuses the graph: {error}") from error


class GraphCache:
    """Keys and values of every layer, [R, KV, C, D] each."""

    def __init__(self, num_tensors: int, shape: tuple[int, int, int, int]) -> None:
        """Reserve `num_tensors` tensors of `shape`; what was never written is zero.

        Raises `ConfigError` where so much address space is not to be had.
        """
        size = 4 * int(np.prod(shape))
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        try:
            memory = [mmap.mmap(-1, size, flags=flags) for _ in range(num_tensors)]
        except (OSError, OverflowError, ValueError) as error:
            raise ConfigError(
                f"{num_tensors} caches of {size} bytes cannot be reserved ({error}): give the "
                "engine a shorter context or a smaller KV cache"
            ) from error
        self.tensors: list[Floats] = [
            np.frombuffer(one, np.float32).reshape(shape) for one in memory
        ]
        self.shape = shape
        self._memory = memory
        self._row_bytes = size // shape[0]

    def move(self, source: int, target: int, num_tokens: int) -> None:
        """Copy the first tokens of one row to another."""
        for tensor in self.tensors:
            tensor[target, :, :num_tokens] = tensor[source, :, :num_tokens]

    def forget(self, row: int) -> None:
        """Give the memory of a row back to the system, whole pages of it."""
        page = mmap.PAGESIZE
        start = -(-row * self._row_bytes // page) * page
        length = (row + 1) * self._row_bytes // page * page - start
        if length > 0:
            for memory in self._memory:
                memory.madvise(mmap.MADV_DONTNEED, start, length)

    def swap(self, one: int, other: int, num_tokens: int) -> None:
        """Exchange the first tokens of two rows."""
        for tensor in self.tensors:
            kept = tensor[one, :, :num_tokens].copy()
            tensor[one, :, :num_tokens] = tensor[other, :, :num_tokens]
            tensor[other, :, :num_tokens] = kept


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
        self._single: dict[int, Floats] = {}

    @property
    def num_layers(self) -> int:
        """Layers with a cache."""
        return len(self._pasts) // 2

    def new_cache(self, num_rows: int, num_tokens: int) -> GraphCache:
        """A cache with room for `num_tokens` in each row; earlier ones can no longer be used."""
        self._bindings, self._single = {}, {}
        return GraphCache(
            len(self._pasts), (num_rows, self.num_kv_heads, num_tokens, self.head_dim)
        )

    def run(
        self, cache: GraphCache, first_row: int, ids: IntArray, positions: IntArray,
        lengths: IntArray,
    ) -> Floats:  # fmt: skip
        """Add tokens to rows of the cache and give their logits.

        Args:
            cache: of this graph.
            first_row: row of the first text; the others follow it.
            ids: [B, S]. Several tokens beside a past need B = 1.
            positions: [B, S] of the tokens in their texts.
            lengths: [B] tokens of each row, the new ones included; with B > 1 and no past a row may
                have fewer than S: its first ones count.

        Returns:
            [B, S, V]; with S = 1 valid until the next call of that kind.
        """
        count = len(ids)
        binding = self._binding(cache, first_row, count)
        mask = (np.arange(int(lengths.max())) < lengths[:, None]).astype(np.int64)
        feed = {
            "input_ids": np.ascontiguousarray(ids, np.int64),
            "attention_mask": mask,
        }
        if self._has_positions:
            feed["position_ids"] = np.ascontiguousarray(positions, np.int64)
        for name, values in feed.items():
            binding.bind_cpu_input(name, values)
        logits = self._room(ids.shape)
        binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        self._session.run_with_iobinding(binding)
        return logits

    def _room(self, shape: tuple[int, ...]) -> Floats:
        """Memory for logits; that of single tokens is kept, as new pages would cost every step."""
        count, length = shape
        if length > 1:
            return np.empty((count, length, self.vocab_size), np.float32)
        if count not in self._single:
            self._single[count] = np.empty((count, 1, self.vocab_size), np.float32)
        return self._single[count]

    def _binding(self, cache: GraphCache, first_row: int, count: int) -> Any:
        """Past and present of `count` rows as the same memory."""
        binding = self._bindings.get((first_row, count))
        if binding is not None:
            return binding
        binding = self._session.io_binding()
        shape = (count, *cache.shape[1:])
        for past, tensor in zip(self._pasts, cache.tensors, strict=True):
            address = tensor[first_row].ctypes.data
            present = past.replace("past_key_values", "present")
            binding.bind_input(past, "cpu", 0, np.float32, shape, address)
            binding.bind_output(present, "cpu", 0, np.float32, shape, address)
        self._bindings[(first_row, count)] = binding
        return binding
