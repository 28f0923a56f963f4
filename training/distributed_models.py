"""How several processes share a model: copies of it (DDP), or a part of each tensor (FSDP2).

With DDP (arXiv:2006.15704) every process holds all weights; gradients are averaged while the
backward pass runs. With FSDP2 (arXiv:2304.11277, per parameter) a process keeps its rows of every
tensor, of the gradients and of the optimizer's state; a block's rows are gathered just before it
runs and dropped behind it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from llmserve.model.transformer import Transformer

from .devices import device_of
from .distributed import Processes
from .distributed_weights import is_sharded

__all__ = ["SharedModel", "shard_model"]


def shard_model(model: Transformer, processes: Processes) -> None:
    """Leave each process its rows of every tensor, with one gathering for a block and the rest.

    Between two passes every parameter is in its rows, after a pass without gradients too.
    """
    # Left to itself, torch shards over GPUs wherever it finds some.
    mesh = init_device_mesh(device_of(model).type, (processes.count,))
    for block in model.layers:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


class SharedModel:
    """Backward passes whose gradients become everyone's mean."""

    def __init__(self, model: Transformer, processes: Processes) -> None:
        """`model` is sharded already, or is wrapped here."""
        self._model = model
        has_experts = model.config.experts is not None  # some of which see no token in a batch
        self._wrapped = (
            None
            if is_sharded(model)
            else DistributedDataParallel(model, find_unused_parameters=has_experts)
        )
        self._count = processes.count

    @property
    def forward(self) -> Callable[..., Tensor]:
        """What stands for the model in training."""
        return self._model if self._wrapped is None else self._wrapped

    def backward(self, objective: Tensor) -> None:
        """Add the gradients of this process's part; the mean of parts is made their sum."""
        (objective * self._count).backward()  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def part(self, *, is_last: bool) -> Iterator[None]:
        """Around the passes of a part of the batch: gradients are exchanged with the last one."""
        if isinstance(self._model, FSDPModule):
            self._model.set_requires_gradient_sync(is_last)
            yield
        elif self._wrapped is not None:
            with contextlib.nullcontext() if is_last else self._wrapped.no_sync():
                yield
