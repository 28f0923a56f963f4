"""The torch runner: the reference for every feature, on CPUs and CUDA.

It computes the scratch-built Transformer with the paged cache as its attention. Quantized folders
are dequantized at load: it shows what a quantized model answers, not how fast integers could be.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..checkpoint import Checkpoint
from ..config import ModelConfig
from ..errors import ConfigError, EngineError
from ..failpoints import hit
from ..model.attention import Attend
from ..model.transformer import Transformer
from ..model.weights import load_model
from .protocol import (
    Batch,
    CacheGroup,
    DoubleArray,
    HiddenSum,
    PromptRows,
    RunnerInfo,
    StepResult,
    TokenLogprobs,
)
from .sampler import prompt_logprobs, sample
from .torch_attention import PagedAttention, PagedCache

__all__ = ["TorchRunner", "use_threads"]

PROMPT_SLICE = 64
"""Rows of logits made at once for the log-probabilities of a prompt."""

Floats = npt.NDArray[np.float32]


class TorchRunner:
    """Executes steps of one model in torch. Implements `Runner`; synchronous."""

    overlaps = False

    def __init__(
        self, checkpoint: Checkpoint, *, dtype: str | None = None, device: str = "cpu"
    ) -> None:
        """Load the weights.

        Args:
            checkpoint: An open model folder.
            dtype: `float32`, `bfloat16` or `float16`; None: as the folder says.
            device: `cpu`, `cuda` or `cuda:N`.
        """
        self._device = torch.device(device)
        self._dtype = _dtype_named(dtype or checkpoint.config.dtype)
        self._model = load_model(checkpoint, dtype=self._dtype, device=device)
        if self._device.type == "cpu" and self._dtype is torch.float32:
            _lay_out_for_one_row(self._model)
        config = checkpoint.config
        windows = [config.window_of(index) for index in range(config.num_layers)]
        self._windows = sorted(set(windows), key=lambda window: (window is not None, window))
        # Layer → its group, and its place within it.
        self._places = [
            (self._windows.index(window), windows[:index].count(window))
            for index, window in enumerate(windows)
        ]
        self._caches: list[PagedCache] = []
        self._block_size = 0
        self._result: StepResult | None = None
        self.info = self._describe(checkpoint)

    def allocate_cache(self, num_blocks: tuple[int, ...], block_size: int) -> None:
        """Make the KV cache, in the type of the arithmetic."""
        config = self._model.config
        self._block_size = block_size
        self._caches = [
            PagedCache(
                num_layers=group.num_layers,
                num_slots=count * block_size,
                num_kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                dtype=self._dtype,
                device=self._device,
            )
            for group, count in zip(self.info.cache_groups, num_blocks, strict=True)
        ]

    @torch.inference_mode()
    def submit(self, batch: Batch) -> None:
        """Compute one step."""
        if not self._caches:
            raise EngineError("the runner has no cache yet: call allocate_cache first")
        hit("engine.forward")
        token_ids = torch.from_numpy(batch.token_ids).to(self._device)
        positions = torch.from_numpy(batch.positions).to(self._device)
        hidden = self._model.hidden(token_ids, positions, self._attend(batch))
        result = StepResult(token_ids=np.empty(0, dtype=np.int64))
        if batch.sampling:
            rows = hidden
            if len(batch.logits_indices) != len(hidden):
                rows = hidden[torch.from_numpy(batch.logits_indices).to(self._device)]
            result = sample(self._logits(rows), batch.sampling)
        result.prompt_logprobs = [
            self._prompt_logprobs(hidden, asked) for asked in batch.prompt_rows
        ]
        result.hidden_sums = [_hidden_sum(hidden, asked) for asked in batch.hidden_sums]
        self._result = result

    def _attend(self, batch: Batch) -> Attend:
        """Attention of the step, layer by layer, each over its group's cache."""
        groups = [
            PagedAttention(batch, tables, cache, block_size=self._block_size, window=window)
            for tables, cache, window in zip(batch.groups, self._caches, self._windows, strict=True)
        ]
        if len(groups) == 1:
            return groups[0]

        def attend(layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            group, place = self._places[layer_index]
            return groups[group](place, q, k, v)

        return attend

    def _logits(self, hidden: Tensor) -> Floats:
        logits: Floats = self._model.logits(hidden).cpu().numpy()
        return logits

    def _prompt_logprobs(self, hidden: Tensor, asked: PromptRows) -> list[TokenLogprobs]:
        """In slices, so that the logits of a long prompt are never held at once."""
        found: list[TokenLogprobs] = []
        for start in range(0, len(asked.targets), PROMPT_SLICE):
            targets = asked.targets[start : start + PROMPT_SLICE]
            first = asked.start + start
            logits = self._logits(hidden[first : first + len(targets)])
            found += prompt_logprobs(logits, targets, asked.num_top)
        return found

    def collect(self) -> StepResult:
        """The outcome of the last `submit`."""
        if self._result is None:
            raise EngineError("no step is under way: call submit first")
        result, self._result = self._result, None
        return result

    def close(self) -> None:
        """Drop weights and cache."""
        self._caches = []
        del self._model

    def _describe(self, checkpoint: Checkpoint) -> RunnerInfo:
        config = checkpoint.config
        parameters = list(self._model.parameters())
        name = str(self._dtype).removeprefix("torch.")
        stored = checkpoint.quantization
        return RunnerInfo(
            vocab_size=config.vocab_size,
            max_seq_len=config.max_seq_len,
            eos_token_ids=config.eos_token_ids,
            cache_groups=self._cache_groups(config),
            runner="torch",
            executed_form=f"{stored.scheme} weights as {name}" if stored is not None else name,
            cache_dtype=name,
            num_parameters=sum(parameter.numel() for parameter in parameters),
            weight_bytes=sum(parameter.numel() * parameter.itemsize for parameter in parameters),
            fingerprint=checkpoint.fingerprint,
            hidden_size=config.hidden_size,
        )

    def _cache_groups(self, config: ModelConfig) -> tuple[CacheGroup, ...]:
        counts = [
            sum(place[0] == group for place in self._places) for group in range(len(self._windows))
        ]
        return tuple(
            CacheGroup(
                num_layers=count,
                window=window,
                bytes_per_token=2 * count * config.kv_size * self._dtype.itemsize,
            )
            for count, window in zip(counts, self._windows, strict=True)
        )


def _lay_out_for_one_row(model: Transformer) -> None:
    """Store matrices with more outputs than inputs input by input, their shape unchanged.

    In float32 a product with one row is then up to twice as fast, and no slower for many rows; in
    bfloat16 it would be slower (docs/lab-log.md, 2026-11-23).
    """
    for parameter in model.parameters():
        if parameter.ndim == 2 and parameter.shape[0] > parameter.shape[1]:
            parameter.data = parameter.data.t().contiguous().t()


def _hidden_sum(hidden: Tensor, asked: HiddenSum) -> DoubleArray:
    """The sum, token after token in float64, so that chunks of any size give the same bits."""
    states = hidden[asked.start : asked.stop].double().cpu().numpy()
    if asked.carry is not None:
        states = np.concatenate([asked.carry[None], states])
    total: DoubleArray = np.add.accumulate(states, axis=0)[-1]
    return total


def use_threads(threads: int) -> None:
    """Compute every step of this process with that many threads."""
    torch.set_num_threads(threads)


def _dtype_named(name: str) -> torch.dtype:
    dtypes = {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }
    if name not in dtypes:
        raise ConfigError(f"dtype must be one of {', '.join(dtypes)}, got {name!r}")
    return dtypes[name]
