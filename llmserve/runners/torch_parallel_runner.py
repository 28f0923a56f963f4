"""One model on several processes: the torch runner of rank 0, which the engine has.

Each step is told to the other ranks (`torch_rank.py`), and all compute it in lock-step, each its
part (`tensor_parallel.py`). Rank 0 alone samples. A rank that is lost makes the step an error, and
the runner of no use: the ranks' caches may hold parts of different steps then.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from ..adapters import Adapter
from ..checkpoint import Checkpoint
from ..config import ModelConfig
from ..errors import CheckpointError, ConfigError, EngineError
from .model_facts import num_parameters_of
from .protocol import Batch, RunnerInfo, StepResult
from .rank_messages import Allocate, Load, Loaded, Logits, Meet, Step, step_of
from .rank_processes import PEER_TIMEOUT_S, RankProcess, Ranks
from .tensor_parallel import Rank, check_ranks
from .torch_cache import PagedCache
from .torch_forward import Forward
from .torch_rank_runner import RankRunner

__all__ = ["ParallelRunner"]


class ParallelRunner(RankRunner):
    """Rank 0 with all the others behind it. Implements `Runner`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        num_ranks: int,
        threads: int,
        dtype: str | None = None,
        cache_dtype: str = "auto",
        device: str = "cpu",
        adapters: Sequence[Adapter] = (),
        start: Callable[[int], RankProcess] = RankProcess.start,
    ) -> None:
        """Start the other ranks, and load the model with them.

        Args:
            checkpoint: An open model folder.
            num_ranks: Processes that compute together, this one included; 2 or more.
            threads: Threads of a step in each of the others.
            dtype: As `TorchRunner`'s.
            cache_dtype: As `TorchRunner`'s.
            device: `cpu`, or `cuda` or `cuda:N`: a device for each rank, from the first or N on.
            adapters: LoRA adapters that were read from folders.
            start: Starts the rank of that index.

        Raises:
            ConfigError: the model or the machine does not have what so many ranks need.
            CheckpointError: an adapter does not fit the model, or a file was changed meanwhile.
            EngineError: another rank could not load its part.
        """
        check_ranks(checkpoint.config, num_ranks)
        devices = _devices(device, num_ranks)
        folders = {adapter.name: _folder_of(adapter) for adapter in adapters}
        commands = [
            Load(
                folder=str(checkpoint.path.resolve()),
                rank=index,
                count=num_ranks,
                dtype=dtype,
                cache_dtype=cache_dtype,
                device=devices[index],
                threads=threads,
                adapters=folders,
            )
            for index in range(1, num_ranks)
        ]
        self._ranks = Ranks(num_ranks, start)
        self._meeting = TemporaryDirectory(prefix="llmserve-ranks-")
        try:
            self._ranks.load(commands)
            first = Rank(0, num_ranks)
            super().__init__(
                checkpoint, first, dtype=dtype, cache_dtype=cache_dtype, device=devices[0],
                adapters=adapters,
            )  # fmt: skip
            loaded = self._ranks.wait_loaded()
            _check_alike(checkpoint, self.fingerprint, loaded)
            self._meet()
        except BaseException:
            self._part()
            raise
        self._forward = _LeadingForward(self._forward, self._ranks)
        self.info = _info_of_all(self.info, checkpoint.config, self.fingerprint, loaded)

    def allocate_cache(self, num_blocks: tuple[int, ...], block_size: int) -> None:
        """Make the KV cache, on every rank that of its own heads."""
        self._ranks.tell(Allocate(tuple(num_blocks), block_size))
        super().allocate_cache(num_blocks, block_size)

    def collect(self) -> StepResult:
        """The outcome of the last `submit`.

        Raises:
            EngineError: a rank was lost meanwhile, so that there is none.
        """
        result = super().collect()
        self._ranks.check()
        return result

    def close(self) -> None:
        """Drop weights and cache, and end the other ranks."""
        self._part()
        super().close()

    def _meet(self) -> None:
        meeting = Path(self._meeting.name, "ranks")
        self._ranks.tell(Meet(str(meeting), PEER_TIMEOUT_S))
        group = self.join(meeting, timeout_s=PEER_TIMEOUT_S)
        if self._device.type == "cuda":
            self._ranks.watch(group.abort)
        else:
            self._meeting.cleanup()  # gloo has met for good

    def _part(self) -> None:
        self._ranks.close()
        self._meeting.cleanup()


class _LeadingForward:
    """`Forward` of rank 0: has the others begin what it computes with them."""

    def __init__(self, own: Forward, ranks: Ranks) -> None:
        self._own, self._ranks = own, ranks

    def hidden(self, batch: Batch, cache: PagedCache, fed: Tensor | None = None) -> Tensor:
        """See `Forward`. Raises `EngineError` if a rank is lost."""
        assert fed is None, "the other ranks would not know these tokens"
        with self._together(step_of(batch)):
            return self._own.hidden(batch, cache)

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Forward`. Raises `EngineError` if a rank is lost."""
        with self._together(Logits(len(hidden))):
            return self._own.logits(hidden)

    def check(self) -> None:
        """See `Forward`."""
        self._own.check()

    @contextmanager
    def _together(self, command: Step | Logits) -> Iterator[None]:
        """Whatever stops this rank in the midst of a step leaves the others waiting: they end."""
        self._ranks.tell(command)
        try:
            yield
        except EngineError as error:
            raise self._ranks.lost(error) from error
        except BaseException as error:
            self._ranks.give_up(f"a step was broken off by {type(error).__name__}: {error}")
            raise


def _devices(device: str, num_ranks: int) -> list[str]:
    """The device of each rank."""
    if device == "cpu":
        return ["cpu"] * num_ranks
    first, present = torch.device(device).index or 0, torch.cuda.device_count()
    if first + num_ranks > present:
        raise ConfigError(
            f"{num_ranks} ranks need as many CUDA devices from {first} on; this machine has "
            f"{present}"
        )
    return [f"cuda:{index}" for index in range(first, first + num_ranks)]


def _folder_of(adapter: Adapter) -> str:
    if adapter.source is None:
        raise ConfigError(
            f"adapter {adapter.name!r} was not read from a folder, from which other ranks could "
            "read it too: save it first"
        )
    return str(adapter.source.parent.resolve())


def _check_alike(checkpoint: Checkpoint, fingerprint: str, loaded: Sequence[Loaded]) -> None:
    if any(one.fingerprint != fingerprint for one in loaded):
        raise CheckpointError(
            f"{checkpoint.path}: files of the model or its adapters were changed while its ranks "
            "loaded them: load it anew"
        )


def _info_of_all(
    own: RunnerInfo, config: ModelConfig, fingerprint: str, loaded: Sequence[Loaded]
) -> RunnerInfo:
    """What is true of all ranks together, from what rank 0 says of itself.

    Ranks that have the same key head each keep it: the cache's bytes are those that it takes.
    """
    count = 1 + len(loaded)
    return dataclasses.replace(
        own,
        vocab_size=config.vocab_size,
        eos_token_ids=config.eos_token_ids,
        cache_groups=tuple(
            dataclasses.replace(group, bytes_per_token=count * group.bytes_per_token)
            for group in own.cache_groups
        ),
        executed_form=f"{own.executed_form} on {count} ranks",
        feeds_tokens=False,  # only rank 0 draws, and the others are told numbers of the host
        num_parameters=num_parameters_of(config),
        weight_bytes=own.weight_bytes + sum(one.weight_bytes for one in loaded),
        fingerprint=fingerprint,
    )
