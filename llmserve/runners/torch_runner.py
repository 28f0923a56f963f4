"""The torch runner: the reference for every feature, on CPUs and CUDA.

It computes the scratch-built Transformer with the paged cache as its attention. On CPUs quantized
folders are dequantized at load: it shows what a quantized model answers, not how fast integers
could be. On CUDA quantized weights stay as stored (`torch_integer_layers.py`), and elementwise
operations are joined (`torch_gpu_layers.py`).
In deterministic mode a token's logits do not depend, to the bit, on how it was batched.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..adapters import Adapter
from ..errors import ConfigError, EngineError
from ..failpoints import hit
from ..model.transformer import Transformer
from ..model.weights import load_model
from ..weight_source import WeightSource
from .cache_groups import LayerGroup, group_layers
from .freed_memory import keep_freed_memory
from .model_facts import cache_groups_of, fingerprint_of
from .protocol import Batch, RunnerInfo, StepResult
from .torch_answers import Answers, DeviceAnswers, HostAnswers, OutputLayers, works_ahead
from .torch_cache import PagedCache
from .torch_cache_form import choose_cache_form
from .torch_devices import checked_device
from .torch_forward import (
    Forward,
    TiledForward,
    WholeForward,
    attention_for,
    has_kernels,
    obstacle_to_graphs,
    tile_attention_for,
)
from .torch_lora import LoraSet

__all__ = ["DEFAULT_THREADS", "TorchRunner", "dtype_named", "use_threads", "with_graphs"]

_log = logging.getLogger("llmserve.engine")

DEFAULT_THREADS = torch.get_num_threads()
"""The library's own choice, before anybody made another."""


class TorchRunner:
    """Executes steps of one model in torch. Implements `Runner`."""

    def __init__(
        self,
        checkpoint: WeightSource,
        *,
        dtype: str | None = None,
        device: str = "cpu",
        deterministic: bool = False,
        cache_dtype: str = "auto",
        adapters: Sequence[Adapter] = (),
        enforce_eager: bool = False,
    ) -> None:
        """Load the weights. On a CPU this process keeps freed memory from now on.

        Args:
            checkpoint: An open model folder.
            dtype: `float32`, `bfloat16` or `float16`; None: as the folder says.
            device: `cpu`, `cuda` or `cuda:N`.
            deterministic: Give every token the same bits whatever else is in its step. Slower; on
                CUDA it needs Triton.
            cache_dtype: Type of keys and values: `int8`, `fp8`, the arithmetic's, or `auto`: int8
                where the folder asks for it, else the arithmetic's.
            adapters: LoRA adapters that requests may name.
            enforce_eager: Start the kernels of every step one by one, where decode steps would be
                captured as CUDA graphs.

        Raises:
            ConfigError: an unknown type or device, or a mode that the device does not have.
            CheckpointError: an adapter does not fit the model.
        """
        self._device = checked_device(device)
        if self._device.type == "cpu":
            keep_freed_memory()
        self._dtype = dtype_named(dtype or checkpoint.config.dtype)
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
            tile_attention = tile_attention_for(self._device)
            self._forward = TiledForward(self._model, lora, attention=tile_attention)
        else:
            attention = attention_for(self._device)
            self._forward = WholeForward(self._model, lora, attention=attention)
            if not enforce_eager:
                self._forward = with_graphs(self._model, self._forward, self._device)
        # Sums of log-probabilities on a device may round by how many rows there are.
        self.overlaps = works_ahead(self._device) and not deterministic
        """Whether `submit` only starts a step; else it computes it."""
        layers = OutputLayers(self._logits, self._model.scores)
        self._answers: Answers = HostAnswers(layers)
        if self.overlaps:
            self._answers = DeviceAnswers(layers, self._device)
        self._groups = group_layers(checkpoint.config)
        self._cache: PagedCache | None = None
        self._hidden: Tensor | None = None
        self._under_way: deque[Callable[[], StepResult]] = deque()
        self.info = self._describe(checkpoint, deterministic, adapters)

    @torch.inference_mode()
    def allocate_cache(self, num_blocks: tuple[int, ...], block_size: int) -> None:
        """Make the KV cache.

        Raises:
            ConfigError: the deterministic mode does not hold with the threads now in use.
        """
        self._cache = None  # there may not be room for both
        self._forward.check()
        config = self._model.config
        if self.overlaps:
            count = _num_positions(self._groups, num_blocks, block_size, config.max_seq_len)
            self._model.complete_rotations(count, self._device)
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
        """Compute one step, or start it where the runner overlaps."""
        if self._cache is None:
            raise EngineError("the runner has no cache yet: call allocate_cache first")
        hit("engine.forward")
        if batch.fed_rows is None:
            self._under_way.clear()
        try:
            self._under_way.append(self._begin(batch, self._cache))
        except Exception:
            self._under_way.clear()
            raise

    def _begin(self, batch: Batch, cache: PagedCache) -> Callable[[], StepResult]:
        if self._device.index is not None:
            torch.cuda.set_device(self._device)  # where kernels and events go
        for index, group in enumerate(batch.groups):
            if len(group.block_copies):
                cache.copy_blocks(index, group.block_copies)
        fed = None if batch.fed_rows is None else self._answers.drawn(batch.fed_rows)
        hidden = self._hidden = self._forward.hidden(batch, cache, fed)
        return self._answers.begin(batch, hidden)

    def collect(self) -> StepResult:
        """The outcome of the first `submit` not collected yet; errors of a device that overlaps
        are raised here."""
        if not self._under_way:
            raise EngineError("no step is under way: call submit first")
        finish = self._under_way.popleft()
        try:
            return finish()
        except Exception:
            self._under_way.clear()
            raise

    def close(self) -> None:
        """Drop weights and cache."""
        self._cache = self._hidden = None
        self._under_way.clear()
        del self._answers, self._forward, self._model

    @torch.inference_mode()
    def logits(self, tokens: range) -> npt.NDArray[np.float32]:
        """Raw logits of tokens of the last step, by packed index, [n, V]. For who compares models:
        a server's never leave the runner."""
        assert self._hidden is not None, "no step was computed yet"
        chosen = self._hidden[tokens.start : tokens.stop : tokens.step]
        logits: npt.NDArray[np.float32] = self._logits(chosen).cpu().numpy()
        return logits

    def _logits(self, hidden: Tensor) -> Tensor:
        return self._forward.logits(hidden)

    def _describe(
        self, checkpoint: WeightSource, deterministic: bool, adapters: Sequence[Adapter]
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
            feeds_tokens=self.overlaps,
            adapters=tuple(adapter.name for adapter in adapters),
            head=None if config.head is None else config.head.kind,
            labels=() if config.head is None else config.head.labels,
        )


def _num_positions(
    groups: Sequence[LayerGroup], num_blocks: Sequence[int], block_size: int, max_seq_len: int
) -> int:
    """A bound on the positions of a sequence: a pool without a window holds all of them."""
    pools = zip(groups, num_blocks, strict=True)
    held = [count * block_size for group, count in pools if group.window is None]
    return min([max_seq_len, *held])


def with_graphs(model: Transformer, forward: Forward, device: torch.device) -> Forward:
    """On CUDA `forward` with its plain decodes captured as graphs, or why not in the log."""
    if device.type != "cuda":
        return forward
    obstacle = obstacle_to_graphs(model.config, device)
    if obstacle is not None:
        _log.info("decode steps are not captured as CUDA graphs: %s", obstacle)
        return forward
    from .torch_graphs import CudaGraphs, GraphedForward

    return GraphedForward(model, forward, CudaGraphs())


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


def dtype_named(name: str) -> torch.dtype:
    """The type of the arithmetic. Raises `ConfigError` for a name that is none."""
    dtypes = {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }
    if name not in dtypes:
        raise ConfigError(f"dtype must be one of {', '.join(dtypes)}, got {name!r}")
    return dtypes[name]
