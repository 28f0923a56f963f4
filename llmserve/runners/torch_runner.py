"""The torch runner: the reference for every feature, on CPUs and CUDA.

It computes the scratch-built Transformer with the paged cache as its attention. On CPUs quantized
folders are dequantized at load: it shows what a quantized model answers, not how fast integers
could be. On CUDA quantized weights stay as stored (`torch_integer_layers.py`), and elementwise
operations are joined (`torch_gpu_layers.py`).
In deterministic mode (CPUs) a token's logits do not depend, to the bit, on how it was batched.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..adapters import Adapter
from ..checkpoint import Checkpoint
from ..errors import ConfigError, EngineError
from ..failpoints import hit
from ..model.transformer import Transformer
from ..model.weights import load_model
from .cache_groups import group_layers
from .freed_memory import keep_freed_memory
from .model_facts import cache_groups_of, fingerprint_of, sum_hidden
from .protocol import Batch, PromptRows, RunnerInfo, StepResult, TokenLogprobs
from .sampler import prompt_logprobs, sample
from .torch_cache import PagedCache
from .torch_cache_form import choose_cache_form
from .torch_forward import Forward, TiledForward, WholeForward, attention_for, has_kernels
from .torch_lora import LoraSet

__all__ = ["DEFAULT_THREADS", "TorchRunner", "use_threads"]

DEFAULT_THREADS = torch.get_num_threads()
"""The library's own choice, before anybody made another."""

_PROMPT_SLICE = 64
"""Rows of logits made at once for the log-probabilities of a prompt."""


class TorchRunner:
    """Executes steps of one model in torch. Implements `Runner`; synchronous."""

    overlaps = False

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: str | None = None,
        device: str = "cpu",
        deterministic: bool = False,
        cache_dtype: str = "auto",
        adapters: Sequence[Adapter] = (),
    ) -> None:
        """Load the weights. On a CPU this process keeps freed memory from now on.

        Args:
            checkpoint: An open model folder.
            dtype: `float32`, `bfloat16` or `float16`; None: as the folder says.
            device: `cpu`, `cuda` or `cuda:N`.
            deterministic: Give every token the same bits whatever else is in its step. Slower;
                on CPUs only.
            cache_dtype: Type of keys and values: `int8`, `fp8`, the arithmetic's, or `auto`: int8
                where the folder asks for it, else the arithmetic's.
            adapters: LoRA adapters that requests may name.

        Raises:
            ConfigError: an unknown type, or a mode that the device does not have.
            CheckpointError: an adapter does not fit the model.
        """
        self._device = torch.device(device)
        if self._device.type == "cpu":
            keep_freed_memory()
        self._dtype = _dtype_named(dtype or checkpoint.config.dtype)
        if deterministic and self._device.type != "cpu":
            raise ConfigError(f"the deterministic mode runs on cpu, not on {device}")
        stored = checkpoint.quantization
        self._cache_form = choose_cache_form(
            cache_dtype,
            dtype=str(self._dtype).removeprefix("torch."),
            folder_asks_int8=stored is not None and stored.has_int8_cache,
        )
        replace_layers = None
        if has_kernels(self._device):
            from .torch_gpu_layers import use_kernels

            replace_layers = partial(
                use_kernels, checkpoint=checkpoint, device=self._device, dtype=self._dtype
            )
        self._model = load_model(
            checkpoint, dtype=self._dtype, device=device, replace_layers=replace_layers
        )
        if self._device.type == "cpu" and self._dtype is torch.float32:
            _lay_out_by_input(self._model, every_matrix=deterministic)
        lora = None
        if adapters:
            lora = LoraSet(
                checkpoint.config,
                adapters,
                dtype=self._dtype,
                device=device,
                deterministic=deterministic,
            )
        self._forward: Forward
        if deterministic:
            self._forward = TiledForward(self._model, lora)
        else:
            attention = attention_for(self._device)
            self._forward = WholeForward(self._model, lora, attention=attention)
        self._groups = group_layers(checkpoint.config)
        self._cache: PagedCache | None = None
        self._hidden: Tensor | None = None
        self._result: StepResult | None = None
        self.info = self._describe(checkpoint, deterministic, adapters)

    @torch.inference_mode()
    def allocate_cache(self, num_blocks: tuple[int, ...], block_size: int) -> None:
        """Make the KV cache.

        Raises:
            ConfigError: the deterministic mode does not hold with the threads now in use.
        """
        self._forward.check()
        config = self._model.config
        self._cache = PagedCache(
            self._groups,
            num_blocks=num_blocks,
            block_size=block_size,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=self._dtype,
            device=self._device,
            form=self._cache_form,
        )

    @torch.inference_mode()
    def submit(self, batch: Batch) -> None:
        """Compute one step."""
        if self._cache is None:
            raise EngineError("the runner has no cache yet: call allocate_cache first")
        hit("engine.forward")
        for index, group in enumerate(batch.groups):
            if len(group.block_copies):
                self._cache.copy_blocks(index, group.block_copies)
        hidden = self._hidden = self._forward.hidden(batch, self._cache)
        result = self._sample(batch, hidden)
        result.prompt_logprobs = [self._prompt_logprobs(hidden, rows) for rows in batch.prompt_rows]
        result.hidden_sums = [
            sum_hidden(hidden[wanted.start : wanted.stop].double().cpu().numpy(), wanted)
            for wanted in batch.hidden_sums
        ]
        result.head_scores = [
            self._head_scores(hidden[rows.start : rows.stop]) for rows in batch.head_rows
        ]
        self._result = result

    def collect(self) -> StepResult:
        """The outcome of the last `submit`."""
        if self._result is None:
            raise EngineError("no step is under way: call submit first")
        result, self._result = self._result, None
        return result

    def close(self) -> None:
        """Drop weights and cache."""
        self._cache = self._hidden = None
        del self._forward, self._model

    @torch.inference_mode()
    def logits(self, tokens: range) -> npt.NDArray[np.float32]:
        """Raw logits of tokens of the last step, by packed index, [n, V]. For who compares models:
        a server's never leave the runner."""
        assert self._hidden is not None, "no step was computed yet"
        return self._logits(self._hidden[tokens.start : tokens.stop : tokens.step])

    def _sample(self, batch: Batch, hidden: Tensor) -> StepResult:
        if not batch.sampling:
            return StepResult(token_ids=np.empty(0, dtype=np.int64))
        if len(batch.logits_indices) != len(hidden):
            hidden = hidden[torch.from_numpy(batch.logits_indices).to(self._device)]
        return sample(self._logits(hidden), batch.sampling)

    def _prompt_logprobs(self, hidden: Tensor, rows: PromptRows) -> list[TokenLogprobs]:
        """In slices, so that the logits of a long prompt are never held at once."""
        entries: list[TokenLogprobs] = []
        for place in range(0, len(rows.targets), _PROMPT_SLICE):
            targets = rows.targets[place : place + _PROMPT_SLICE]
            start = rows.start + place
            logits = self._logits(hidden[start : start + len(targets)])
            entries += prompt_logprobs(logits, targets, rows.num_top)
        return entries

    def _head_scores(self, hidden: Tensor) -> list[list[float]]:
        """Row by row: a score does not depend on how many are asked for at once."""
        scores: list[list[float]] = [self._model.scores(row).tolist() for row in hidden]
        return scores

    def _logits(self, hidden: Tensor) -> npt.NDArray[np.float32]:
        logits: npt.NDArray[np.float32] = self._forward.logits(hidden).cpu().numpy()
        return logits

    def _describe(
        self, checkpoint: Checkpoint, deterministic: bool, adapters: Sequence[Adapter]
    ) -> RunnerInfo:
        config = checkpoint.config
        parameters = list(self._model.parameters())
        integers = list(self._model.buffers())  # of layers that keep the folder's
        num_integers = sum(getattr(module, "num_weights", 0) for module in self._model.modules())
        name = str(self._dtype).removeprefix("torch.")
        stored = checkpoint.quantization
        form = name
        if stored is not None:
            form = f"{stored.scheme} weights {'times' if integers else 'as'} {name}"
        cache_form = self._cache_form
        head_bytes = config.head_dim * self._dtype.itemsize
        if cache_form is not None:
            head_bytes = cache_form.head_bytes(config.head_dim)
        layer_bytes = 2 * config.num_kv_heads * head_bytes
        return RunnerInfo(
            vocab_size=config.vocab_size,
            max_seq_len=config.max_seq_len,
            eos_token_ids=config.eos_token_ids,
            cache_groups=cache_groups_of(self._groups, layer_bytes),
            runner="torch",
            executed_form=f"{form}, deterministic" if deterministic else form,
            cache_dtype=name if cache_form is None else cache_form.name,
            num_parameters=sum(parameter.numel() for parameter in parameters) + num_integers,
            weight_bytes=sum(tensor.nbytes for tensor in (*parameters, *integers)),
            fingerprint=fingerprint_of(checkpoint, adapters),
            hidden_size=config.hidden_size,
            adapters=tuple(adapter.name for adapter in adapters),
            head=None if config.head is None else config.head.kind,
            labels=() if config.head is None else config.head.labels,
        )


def _lay_out_by_input(model: Transformer, *, every_matrix: bool) -> None:
    """Store matrices input by input, their shape unchanged: those with more outputs than inputs.

    In float32 a product with one row is then up to twice as fast, and no slower for many rows; in
    bfloat16 it would be slower (docs/lab-log.md, 2026-11-23). The deterministic mode asks it of
    every matrix: products of the other layout can round rows of a tile differently (decision 6).
    """
    for parameter in model.parameters():
        if parameter.ndim == 2 and (every_matrix or parameter.shape[0] > parameter.shape[1]):
            parameter.data = parameter.data.t().contiguous().t()


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
