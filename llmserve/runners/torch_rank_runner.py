"""The part of a model that one rank computes, by the torch runner."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ..adapters import Adapter
from ..checkpoint import Checkpoint
from .model_facts import fingerprint_of
from .rank_checkpoint import RankCheckpoint
from .tensor_parallel import Rank, adapter_of_rank
from .torch_collectives import Collectives
from .torch_parallel_model import RankForward, join_model
from .torch_runner import TorchRunner

__all__ = ["RankRunner"]


class RankRunner(TorchRunner):
    """A `TorchRunner` of its rank's sizes, which is of use once it has joined the others."""

    def __init__(
        self, checkpoint: Checkpoint, rank: Rank, *, dtype: str | None, cache_dtype: str,
        device: str, adapters: Sequence[Adapter],
    ) -> None:  # fmt: skip
        """Load the part of a model that can be dealt out. Arguments and errors: `TorchRunner`'s."""
        config = checkpoint.config
        super().__init__(
            RankCheckpoint(checkpoint, rank),
            dtype=dtype,
            cache_dtype=cache_dtype,
            device=device,
            adapters=[adapter_of_rank(adapter, config, rank) for adapter in adapters],
            # A graph that one rank captures and another cannot would leave the others waiting.
            enforce_eager=True,
        )
        self.rank = rank
        self.fingerprint = fingerprint_of(checkpoint, adapters)
        """Of what was loaded, adapters included."""
        self._vocab_size, self._width = config.vocab_size, config.hidden_size

    def join(self, meeting: Path, *, timeout_s: float) -> Collectives:
        """Meet the other ranks, and compute with them from now on. Arguments: `Collectives`'."""
        group = Collectives(self.rank, self._device, meeting=meeting, timeout_s=timeout_s)
        join_model(self._model, group)
        self._forward = RankForward(self._forward, group, self._vocab_size)
        return group

    @torch.inference_mode()
    def take_part_in_logits(self, num_rows: int) -> None:
        """Compute this rank's columns of so many rows of logits; rank 0 has the rows."""
        rows = torch.empty(num_rows, self._width, dtype=self._dtype, device=self._device)
        self._forward.logits(rows)
