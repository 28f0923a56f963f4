"""Runners by name. What a runner needs is imported only when it is chosen."""

from __future__ import annotations

from importlib.util import find_spec

from ..checkpoint import Checkpoint
from ..errors import ConfigError, MissingDependencyError
from .protocol import Runner

__all__ = ["RUNNERS", "load_runner"]

RUNNERS = ("auto", "torch")
"""Names that `load_runner` takes."""


def load_runner(
    name: str,
    checkpoint: Checkpoint,
    *,
    dtype: str | None = None,
    device: str = "cpu",
    threads: int | None = None,
) -> Runner:
    """Load a model folder into the runner called `name`.

    Args:
        name: One of `RUNNERS`; `auto` takes the best one installed for the device.
        checkpoint: An open model folder.
        dtype: Type of the arithmetic; None: as the folder says.
        device: `cpu`, `cuda` or `cuda:N`.
        threads: Threads for one step; None: the library's own choice.

    Raises:
        ConfigError: an unknown runner, type or device.
        MissingDependencyError: the runner's package is not installed.
    """
    if name not in RUNNERS:
        raise ConfigError(f"runner must be one of {', '.join(RUNNERS)}, got {name!r}")
    if threads is not None and threads < 1:
        raise ConfigError(f"threads must be at least 1, got {threads}")
    if find_spec("torch") is None:
        raise MissingDependencyError("torch", extra="torch", feature="the torch runner")
    import torch

    from .torch_runner import TorchRunner

    if threads is not None:
        torch.set_num_threads(threads)
    return TorchRunner(checkpoint, dtype=dtype, device=device)
