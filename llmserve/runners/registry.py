"""Runners by name. What a runner needs is imported only when it is chosen."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from ..adapters import load_adapter
from ..checkpoint import Checkpoint
from ..errors import ConfigError, MissingDependencyError
from .protocol import Runner

__all__ = ["RUNNERS", "load_runner"]

RUNNERS = ("auto", "torch")
"""Names that `load_runner` takes."""

_SMALL_MODEL = 16_000_000
"""Parameters under which a model runs on one thread. On an idle machine a second one gains nothing
for one stream and some for prefill and large batches; beside another busy process it costs most
of the speed (decision 4)."""


def load_runner(
    name: str,
    checkpoint: Checkpoint,
    *,
    dtype: str | None = None,
    device: str = "cpu",
    threads: int | None = None,
    deterministic: bool = False,
    adapters: Mapping[str, Path] | None = None,
) -> Runner:
    """Load a model folder into the runner called `name`.

    Args:
        name: One of `RUNNERS`; `auto` takes the best one installed for the device.
        checkpoint: An open model folder.
        dtype: Type of the arithmetic; None: as the folder says.
        device: `cpu`, `cuda` or `cuda:N`.
        threads: Threads for one step; None: one for a small model, else one for each core.
        deterministic: Give every token the same bits whatever else is in its step (decision 6).
        adapters: LoRA adapters by the name that requests give, each a folder in PEFT's format.

    Raises:
        ConfigError: an unknown runner, type or device.
        CheckpointError: an adapter cannot be read or does not fit the model.
        MissingDependencyError: the runner's package is not installed.
    """
    if name not in RUNNERS:
        raise ConfigError(f"runner must be one of {', '.join(RUNNERS)}, got {name!r}")
    if threads is not None and threads < 1:
        raise ConfigError(f"threads must be at least 1, got {threads}")
    if find_spec("torch") is None:
        raise MissingDependencyError("torch", extra="torch", feature="the torch runner")
    from .torch_runner import DEFAULT_THREADS, TorchRunner, use_threads

    runner = TorchRunner(
        checkpoint,
        dtype=dtype,
        device=device,
        deterministic=deterministic,
        adapters=[load_adapter(name, path) for name, path in (adapters or {}).items()],
    )
    if threads is None:
        # Said even where it is the library's own choice: a draft model loaded before may have
        # asked for another.
        threads = 1 if runner.info.num_parameters < _SMALL_MODEL else DEFAULT_THREADS
    use_threads(threads)
    return runner
