"""The native runner: the model's program on the C++ kernels, for CPUs, without torch.

A token's logits do not depend, to the bit, on its neighbours, its chunk, or the number of threads:
always, not as a mode. Integer weights are multiplied as integers (docs/decisions/0010).
"""

from __future__ import annotations

import mmap
import os
from array import array
from collections.abc import Sequence
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from ..adapters import Adapter
from ..checkpoint import Checkpoint
from ..errors import ConfigError, EngineError
from ..failpoints import hit
from ..layouts import expected_tensors
from ..native.describe import NativeModel, describe
from ..native.kernels import choose_path, load_kernels
from ..native.positions import rotary_rows
from ..native.program import Number, address_of
from ..native.weights import Form
from .cache_groups import group_layers
from .model_facts import cache_groups_of, fingerprint_of, sum_hidden
from .native_options import BLOCK_TOKENS, NativeOptions, obstacle_to_native
from .native_sampling import DrawnRows, LogprobArrays, PackedRows, pack_rows
from .protocol import (
    Batch,
    HeadRows,
    HiddenSum,
    PromptRows,
    RunnerInfo,
    StepResult,
    TokenLogprobs,
)
from .rounds import common_ends

__all__ = ["NativeRunner", "default_threads"]

_PROMPT_SLICE = 64
"""Rows of logits made at once for the log-probabilities of a prompt."""
_FIRST_ROTARY_ROWS = 4096
_NO_ENDS = array("q")
_CACHE_SLACK_BYTES = 256  # that kernels may read behind the last block
_CACHE_KINDS = {"float32": Number.FLOAT32, "bfloat16": Number.BFLOAT16, "int8": Number.INT8}
_CACHE_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


class NativeRunner:
    """Executes steps of one model in C++. Implements `Runner`; synchronous."""

    overlaps = False

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: NativeOptions | None = None,
        *,
        dtype: str | None = None,
        threads: int | None = None,
        adapters: Sequence[Adapter] = (),
    ) -> None:
        """Pack the weights.

        Args:
            checkpoint: An open model folder.
            options: How it is to be executed.
            dtype: Type of the matrices that the folder does not quantize; None: as it says.
            threads: Threads of a step, the caller's included; None: one for each core.
            adapters: LoRA adapters that requests may name.

        Raises:
            ConfigError: an option that this model or this processor does not have.
            CheckpointError: weights that cannot be used, or an adapter that does not fit.
        """
        options = options or NativeOptions()
        obstacle = obstacle_to_native(checkpoint, dtype=dtype, device="cpu")
        if obstacle is not None:
            raise ConfigError(f"the native runner cannot run this model: {obstacle}")
        if options.cache_dtype == "fp8":
            raise ConfigError(
                "the native runner keeps keys and values as float32, bfloat16 or int8, got fp8: "
                "choose one of these, or --runner torch"
            )
        self._kernels = cast(Any, load_kernels())
        path = choose_path(options.instruction_set)
        self._config = checkpoint.config
        threads = threads or default_threads()
        floats = _float_type(checkpoint, dtype)
        form = Form(
            floats=floats,
            has_integer_activations=options.activations != "float32",
            head=options.head_weights,
        )
        self._groups = group_layers(checkpoint.config)
        self._group_of = {
            layer: index for index, group in enumerate(self._groups) for layer in group.layers
        }
        self._model: NativeModel = describe(
            checkpoint,
            form,
            layer_groups=[self._group_of[layer] for layer in range(checkpoint.config.num_layers)],
            threads=threads,
            adapters=adapters,
        )
        self._path = path
        self._threads = threads
        self._handle: Any = None
        self._cache_dtype = options.cache_dtype
        if options.cache_dtype == "auto":
            self._cache_dtype = _cache_type(checkpoint, floats, dtype)
        self._cache: list[npt.NDArray[np.uint8]] = []
        self._block_size = BLOCK_TOKENS
        self._rotary_rows = 0
        self._result: StepResult | None = None
        checkpoint.drop_pages()
        self.info = self._describe(checkpoint, path, adapters)

    def allocate_cache(self, num_blocks: tuple[int, ...], block_size: int) -> None:
        """Make the KV cache; its memory becomes resident as it is written.

        Raises:
            ConfigError: a block size that is no multiple of 16.
        """
        if block_size % BLOCK_TOKENS:
            raise ConfigError(
                f"the native runner takes blocks of a multiple of {BLOCK_TOKENS} tokens, got "
                f"{block_size}"
            )
        self._make_executor()
        self._block_size = block_size
        config = self._config
        self._cache = []
        for layer in range(config.num_layers):
            size = num_blocks[self._group_of[layer]] * block_size * self._layer_bytes()
            self._cache.append(np.frombuffer(mmap.mmap(-1, size + _CACHE_SLACK_BYTES), np.uint8))
        addresses = np.array([address_of(array) for array in self._cache], np.int64)
        self._kernels.set_cache(
            self._handle, addresses, _CACHE_KINDS[self._cache_dtype], block_size,
            config.num_kv_heads, config.head_dim,
        )  # fmt: skip

    def cache_blocks(self) -> list[list[npt.NDArray[np.uint8]]]:
        """As in `CacheReader`. A block's keys, values and scales lie together (types.h)."""
        block_bytes = self._block_size * self._layer_bytes()
        views: list[list[npt.NDArray[np.uint8]]] = [[] for _ in self._groups]
        for layer, cache in enumerate(self._cache):
            blocks = cache[: len(cache) - _CACHE_SLACK_BYTES].reshape(-1, block_bytes)
            views[self._group_of[layer]].append(blocks)
        return views

    def submit(self, batch: Batch) -> None:
        """Compute one step."""
        if not self._cache:
            raise EngineError("the runner has no cache yet: call allocate_cache first")
        hit("engine.forward")
        self._grow_rotary(int(batch.context_lens.max()) + batch.num_rounds - 1)
        packed = drawn = None
        if batch.sampling:
            packed = pack_rows(batch.sampling)
            drawn = DrawnRows(packed, self._config.vocab_size, batch.num_rounds)
        ends = _NO_ENDS if batch.num_rounds == 1 else array("q", common_ends(batch.sampling))
        num_rounds = self._kernels.step(
            self._handle, *_arrays(batch), self._config.vocab_size, _sampling(packed, drawn),
            batch.num_rounds, ends,
        )  # fmt: skip
        if drawn is not None and num_rounds < batch.num_rounds:
            drawn.keep(num_rounds * len(batch.sampling))
        result = StepResult(token_ids=np.empty(0, np.int64)) if drawn is None else drawn.result()
        result.prompt_logprobs = [self._prompt_logprobs(rows) for rows in batch.prompt_rows]
        result.hidden_sums = [
            sum_hidden(self._hidden(wanted).astype(np.float64), wanted)
            for wanted in batch.hidden_sums
        ]
        result.head_scores = [self._head_scores(rows) for rows in batch.head_rows]
        self._result = result

    def collect(self) -> StepResult:
        """The outcome of the last `submit`."""
        if self._result is None:
            raise EngineError("no step is under way: call submit first")
        result, self._result = self._result, None
        return result

    def close(self) -> None:
        """Drop weights and cache."""
        self._cache = []
        self._handle = None
        del self._model

    def logits(self, tokens: range) -> npt.NDArray[np.float32]:
        """Raw logits of tokens of the last step, by packed index, [n, V]. For who compares models:
        a server's never leave the runner."""
        indices = np.arange(tokens.start, tokens.stop, tokens.step)
        view = self._kernels.head(self._handle, indices, self._model.logits)
        return self._rows(view, self._config.vocab_size).copy()

    def _make_executor(self) -> None:
        """Not before the cache: a process that loads a model may fork until then, and its threads
        would not follow."""
        if self._handle is None:
            tables = self._model.program.tables()
            self._handle = self._kernels.new(self._path, self._threads, *tables)
            self._grow_rotary(min(self._config.max_seq_len, _FIRST_ROTARY_ROWS))

    def _prompt_logprobs(self, rows: PromptRows) -> list[TokenLogprobs]:
        """In slices, so that the logits of a long prompt are never held at once."""
        entries: list[TokenLogprobs] = []
        width = self._config.vocab_size
        for place in range(0, len(rows.targets), _PROMPT_SLICE):
            targets = np.array(rows.targets[place : place + _PROMPT_SLICE], np.int64)
            start = rows.start + place
            logits = self.logits(range(start, start + len(targets)))
            out = LogprobArrays(len(targets), rows.num_top, width)
            self._kernels.prompt_logprobs(
                self._path, logits, targets, rows.num_top,
                out.logprobs, out.num_top, out.top_ids, out.top_logprobs,
            )  # fmt: skip
            entries += out.entries(range(len(targets)))
        return entries

    def _head_scores(self, rows: HeadRows) -> list[list[float]]:
        """What the head makes of tokens of the last step, [n, labels]."""
        indices = np.arange(rows.start, rows.stop)
        view = self._kernels.head(self._handle, indices, self._model.logits)
        width = len(self.info.labels) or self._config.hidden_size
        scores: list[list[float]] = self._rows(view, width).tolist()
        return scores

    def _hidden(self, wanted: HiddenSum) -> npt.NDArray[np.float32]:
        """The normalized hidden states of tokens of the last step, [n, E]; a view."""
        indices = np.arange(wanted.start, wanted.stop)
        view = self._kernels.hidden(self._handle, indices, self._model.final_hidden)
        return self._rows(view, self._config.hidden_size)

    @staticmethod
    def _rows(view: memoryview, width: int) -> npt.NDArray[np.float32]:
        padded = -(-width // 16) * 16
        return np.frombuffer(view, np.float32).reshape(-1, padded)[:, :width]

    def _grow_rotary(self, num_positions: int) -> None:
        if num_positions <= self._rotary_rows or self._config.positions != "rope":
            return
        rows = min(self._config.max_seq_len, max(num_positions, 2 * self._rotary_rows))
        for index, is_local in enumerate((False, True)):
            if is_local and self._config.local_rope_theta is None:
                continue
            table = rotary_rows(self._config, rows, is_local=is_local)
            self._kernels.set_rope_table(self._handle, index, address_of(table))
            self._rotary = {**getattr(self, "_rotary", {}), index: table}
        self._rotary_rows = rows

    def _layer_bytes(self) -> int:
        """KV cache bytes for one token of one layer."""
        config = self._config
        scales = 2 * 4 * config.num_kv_heads if self._cache_dtype == "int8" else 0
        return 2 * config.kv_size * _CACHE_BYTES[self._cache_dtype] + scales

    def _describe(
        self, checkpoint: Checkpoint, path: str, adapters: Sequence[Adapter]
    ) -> RunnerInfo:
        config = checkpoint.config
        return RunnerInfo(
            vocab_size=config.vocab_size,
            max_seq_len=config.max_seq_len,
            eos_token_ids=config.eos_token_ids,
            cache_groups=cache_groups_of(self._groups, self._layer_bytes()),
            runner="native",
            executed_form=f"{', '.join(self._model.forms)} ({path})",
            cache_dtype=self._cache_dtype,
            num_parameters=sum(int(np.prod(shape)) for shape in expected_tensors(config).values()),
            weight_bytes=self._model.weight_bytes,
            fingerprint=fingerprint_of(checkpoint, adapters),
            hidden_size=config.hidden_size,
            repeats_decodes=True,
            head=None if config.head is None else config.head.kind,
            labels=() if config.head is None else config.head.labels,
            adapters=tuple(adapter.name for adapter in adapters),
        )


def _arrays(batch: Batch) -> tuple[Any, ...]:
    """The step's arrays as C++ takes them: contiguous int64."""
    arrays = (
        batch.token_ids, batch.positions, batch.cu_seqlens, batch.context_lens,
        batch.logits_indices,
    )  # fmt: skip
    groups = tuple(
        tuple(map(np.ascontiguousarray, (one.slot_mapping, one.block_tables, one.block_copies)))
        for one in batch.groups
    )
    adapter_ids = None if batch.adapter_ids is None else np.ascontiguousarray(batch.adapter_ids)
    return (*map(np.ascontiguousarray, arrays), groups, adapter_ids)


def _sampling(packed: PackedRows | None, drawn: DrawnRows | None) -> tuple[Any, ...] | None:
    if packed is None or drawn is None:
        return None
    out = drawn.logprobs
    return (
        packed.constants, packed.positions, packed.edits, drawn.token_ids, drawn.is_usable,
        out.logprobs, out.num_top, out.top_ids, out.top_logprobs,
    )  # fmt: skip


def default_threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cache_type(
    checkpoint: Checkpoint, floats: str, dtype: str | None
) -> Literal["float32", "bfloat16", "int8"]:
    """int8 where the folder asks for it, float32 for float32 models, else bfloat16."""
    stored = checkpoint.quantization
    if stored is not None and stored.has_int8_cache:
        return "int8"
    is_float32 = floats == "float32" and stored is None
    is_float32 |= checkpoint.config.dtype == "float32" and dtype is None
    return "float32" if is_float32 else "bfloat16"


def _float_type(checkpoint: Checkpoint, dtype: str | None) -> Literal["float32", "bfloat16"]:
    name = dtype or checkpoint.config.dtype
    if name in ("float32", "bfloat16"):
        return name  # type: ignore[return-value]
    if dtype is None and name == "float16":
        return "float32"
    raise ConfigError(f"the native runner computes in float32 or bfloat16, not in {name!r}")
