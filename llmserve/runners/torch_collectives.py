"""What the ranks of a model say to each other in the midst of a step: sums, copies, parts joined.

One process group for each model, of torch's own backends: gloo over the loopback interface on CPUs,
NCCL between CUDA devices. Only tensors are exchanged. A rank that is gone, or does not come in
time, makes the others' call an `EngineError`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store

from ..errors import EngineError
from .tensor_parallel import Rank

__all__ = ["Collectives"]


class _Work(Protocol):
    def wait(self) -> object:
        """On CPUs until it is done; on CUDA the current stream waits, and not the host."""


class _Group(Protocol):
    """What is used of torch's backends, whose own declarations leave it out."""

    def allreduce(self, tensors: list[Tensor]) -> _Work: ...

    def broadcast(self, tensors: list[Tensor], options: dist.BroadcastOptions) -> _Work: ...

    def gather(
        self, parts: list[list[Tensor]], tensors: list[Tensor], options: dist.GatherOptions
    ) -> _Work: ...

    def abort(self) -> None: ...


class Collectives:
    """One rank's place in the group. Every method must be called by all, in one order."""

    def __init__(
        self, rank: Rank, device: torch.device, *, meeting: Path, timeout_s: float
    ) -> None:
        """Meet the other ranks, which do the same.

        Args:
            rank: This one.
            device: That of the tensors to come.
            meeting: A file that does not exist yet, in a folder that nobody else may read; all
                ranks give the same. It is used until the group is closed.
            timeout_s: Longest time to wait for another rank, now and later.

        Raises:
            EngineError: another rank does not come.
        """
        self.rank = rank
        self.device = device
        timeout = timedelta(seconds=timeout_s)
        with _peers_needed():
            store = dist.FileStore(str(meeting), rank.count)  # type: ignore[attr-defined]
            store.set_timeout(timeout)
            make = _gloo if device.type == "cpu" else _nccl
            self._group = make(store, rank, device, timeout)
            self.sum(torch.zeros(1, device=device))  # all are there when this returns

    def sum(self, part: Tensor) -> Tensor:
        """The sum of everyone's tensors of one shape, the same bits on all; `part` is used up."""
        part = part.contiguous()
        with _peers_needed():
            self._group.allreduce([part]).wait()
        return part

    def from_first(self, values: Tensor) -> Tensor:
        """Rank 0's values; the others give a tensor of that shape and type, which is used up."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        values = values.contiguous()
        with _peers_needed():
            self._group.broadcast([values], options).wait()
        return values

    def joined(self, part: Tensor) -> Tensor:
        """Everyone's parts [..., n] one behind the other, [..., ranks * n], on rank 0.

        The other ranks get their own part back.
        """
        options = dist.GatherOptions()
        options.rootRank = 0
        part = part.contiguous()
        parts = [torch.empty_like(part) for _ in range(self.rank.count)]
        is_first = self.rank.index == 0
        with _peers_needed():
            self._group.gather([parts] if is_first else [], [part], options).wait()
        return torch.cat(parts, dim=-1) if is_first else part

    def abort(self) -> None:
        """End what waits for a rank that is gone; from any thread. For NCCL: gloo notices."""
        self._group.abort()


def _gloo(store: Store, rank: Rank, device: torch.device, timeout: timedelta) -> _Group:
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    # The default would be the interface of the host's name: others could reach it, or none.
    options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._timeout = timeout
    return cast(_Group, dist.ProcessGroupGloo(store, rank.index, rank.count, options))


def _nccl(store: Store, rank: Rank, device: torch.device, timeout: timedelta) -> _Group:
    if not dist.is_nccl_available():
        raise EngineError("this build of torch has no NCCL, which several CUDA devices need")
    from torch.distributed import ProcessGroupNCCL

    options = ProcessGroupNCCL.Options()
    options._timeout = timeout
    group = ProcessGroupNCCL(store, rank.index, rank.count, options)
    group.eager_connect_single_device(device)
    return cast(_Group, group)


@contextlib.contextmanager
def _peers_needed() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # of torch's distributed errors too
        raise EngineError(f"another rank of the model is gone or hangs: {error}") from error
