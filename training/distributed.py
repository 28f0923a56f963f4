"""Several processes that make one run together, as `torchrun` starts them.

Every process computes its share of each batch. What they tell each other are tensors: sums, flags
and the name of a folder as bytes, never objects, which would have to be unpickled.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from llmserve.errors import TrainingError

from .devices import training_device
from .recipe_fields import DeviceName

__all__ = ["ALONE", "Processes", "join_processes", "shared_folder"]

_MAX_PATH_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Processes:
    """This process's place among those of the run. With one alone nothing is sent.

    Every method but `leave` must be called by all of them; a process that is gone raises
    `TrainingError`.
    """

    rank: int = 0
    """Which this is, from 0."""
    count: int = 1
    """How many there are."""
    local_rank: int = 0
    """Which this is on its machine, from 0: it has the GPU of that number."""
    parent: int | None = None
    """The process that started it; None: it does not matter whether that is still there."""

    @property
    def is_first(self) -> bool:
        """Whether this one writes what is written once."""
        return self.rank == 0

    @property
    def is_left_alone(self) -> bool:
        """Whether torchrun is gone, by SIGKILL say: this process would go on unseen, and keep the
        run's folder."""
        return self.parent is not None and os.getppid() != self.parent

    def sum(self, value: Tensor) -> Tensor:
        """The sum of everyone's tensors of one shape."""
        if self.count > 1:
            value = value.clone()
            with _peers_needed():
                dist.all_reduce(value)
        return value

    def any(self, number: int) -> int:
        """The largest of everyone's numbers."""
        if self.count == 1:
            return number
        largest = torch.tensor(number, dtype=torch.int64)
        with _peers_needed():
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest)

    def wait(self) -> None:
        """Return when all have come here."""
        self.any(0)

    def leave(self, status: int) -> int:
        """This process's last act, with the exit status; returns it when the process is alone.

        One of several ends here and now, without the interpreter's own end. DDP keeps gloo's
        threads alive for good (torch 2.13), and one that is late to drop a tensor then asks an
        interpreter that is being torn down for its lock, which aborts the process.
        """
        if self.count > 1:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        return status

    def path_of_first(self, path: Path | None) -> Path:
        """The path that the first process gives."""
        if self.count == 1 and path is not None:
            return path
        text = bytes(str(path or ""), "utf-8").ljust(_MAX_PATH_BYTES, b"\0")
        row = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        with _peers_needed():
            dist.broadcast(row, src=0)
        return Path(bytes(row.tolist()).rstrip(b"\0").decode())


ALONE = Processes()
"""A run of one process."""


@contextlib.contextmanager
def join_processes(device: DeviceName = "cpu") -> Iterator[Processes]:
    """Meet the other processes, if torchrun started this one; part from them at the end.

    Tensors of the host go over gloo, those of GPUs over NCCL.

    Raises:
        ConfigError: this process is to have a GPU, and there is none left for it.
    """
    if not dist.is_torchelastic_launched():
        yield ALONE
        return
    local_rank = int(os.environ["LOCAL_RANK"])
    own = training_device(device, local_rank=local_rank)
    if own.type == "cuda":
        torch.cuda.set_device(own)  # what NCCL and FSDP2 take where nobody names a device
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=own)
    else:
        dist.init_process_group("gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), local_rank, os.getppid())
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def shared_folder(
    processes: Processes, make: Callable[[], AbstractContextManager[Path]]
) -> Iterator[Path]:
    """A folder that the first process makes and all write into; it is whole when all are done.

    `make` is called by the first process alone, and what it made is closed after the last has left.
    """
    with ExitStack() as stack:
        made = stack.enter_context(make()) if processes.is_first else None
        yield processes.path_of_first(made)
        processes.wait()
    processes.wait()


@contextlib.contextmanager
def _peers_needed() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise TrainingError(
            "another process of this training is gone; the last checkpoint is kept: run the same "
            "command again"
        ) from error
