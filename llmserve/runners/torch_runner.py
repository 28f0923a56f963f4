"""The torch runner: the reference for every feature, on CPUs and CUDA.

It computes the scratch-built Transformer with the paged cache as its attention. Quantized folders
are dequantized at load: it shows what a quantized model answers, not how fast integers could be.
"""

from __future__ import annotations

import torch

from ..checkpoint import Checkpoint
from ..errors import ConfigError, EngineError
from ..failpoints import hit
from ..model.transformer import Transformer
from ..model.weights import load_model
from .protocol import Batch, RunnerInfo, StepResult
from .sampler import sample
from .torch_attention import PagedAttention, PagedCache

__all__ = ["TorchRunner", "use_threads"]


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
        self._cache: PagedCache | None = None
        self._block_size = 0
        self._result: StepResult | None = None
        self.info = self._describe(checkpoint)

    def allocate_cache(self, num_blocks: int, block_size: int) -> None:
        """Make the KV cache, in the type of the arithmetic."""
        config = self._model.config
        self._block_size = block_size
        self._cache = PagedCache(
            num_layers=config.num_layers,
            num_slots=num_blocks * block_size,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=self._dtype,
            device=self._device,
        )

    @torch.inference_mode()
    def submit(self, batch: Batch) -> None:
        """Compute one step."""
        if self._cache is None:
            raise EngineError("the runner has no cache yet: call allocate_cache first")
        hit("engine.forward")
        attend = PagedAttention(batch, self._cache, block_size=self._block_size)
        token_ids = torch.from_numpy(batch.token_ids).to(self._device)
        positions = torch.from_numpy(batch.positions).to(self._device)
        hidden = self._model.hidden(token_ids, positions, attend)
        if not batch.sampling:
            self._result = StepResult([])
            return
        if len(batch.logits_indices) != len(hidden):
            hidden = hidden[torch.from_numpy(batch.logits_indices).to(self._device)]
        logits = self._model.logits(hidden).cpu().numpy()
        self._result = StepResult(sample(logits, batch.sampling))

    def collect(self) -> StepResult:
        """The outcome of the last `submit`."""
        if self._result is None:
            raise EngineError("no step is under way: call submit first")
        result, self._result = self._result, None
        return result

    def close(self) -> None:
        """Drop weights and cache."""
        self._cache = None
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
            cache_bytes_per_token=2 * config.num_layers * config.kv_size * self._dtype.itemsize,
            runner="torch",
            executed_form=f"{stored.scheme} weights as {name}" if stored is not None else name,
            cache_dtype=name,
            num_parameters=sum(parameter.numel() for parameter in parameters),
            weight_bytes=sum(parameter.numel() * parameter.itemsize for parameter in parameters),
        )


def _lay_out_for_one_row(model: Transformer) -> None:
    """Store matrices with more outputs than inputs input by input, their shape unchanged.

    In float32 a product with one row is then up to twice as fast, and no slower for many rows; in
    bfloat16 it would be slower (docs/lab-log.md, 2026-11-23).
    """
    for parameter in model.parameters():
        if parameter.ndim == 2 and parameter.shape[0] > parameter.shape[1]:
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
