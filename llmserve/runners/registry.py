"""Runners by name. What a runner needs is imported only when it is chosen."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from ..adapters import Adapter, load_adapter
from ..checkpoint import Checkpoint
from ..errors import ConfigError, MissingDependencyError
from .native_options import NativeOptions, obstacle_to_native
from .protocol import Runner

__all__ = ["RUNNERS", "load_runner"]

_log = logging.getLogger("llmserve.engine")

RUNNERS = ("auto", "native", "torch")
"""Names that `load_runner` takes."""

_SMALL_MODEL = 16_000_000
"""Parameters under which torch runs a model on one thread. On an idle machine a second one gains
nothing for one stream and some for prefill and large batches; beside another busy process it costs
most of the speed (decision 4)."""


def load_runner(
    name: str,
    checkpoint: Checkpoint,
    *,
    dtype: str | None = None,
    device: str = "cpu",
    threads: int | None = None,
    deterministic: bool = False,
    adapters: Mapping[str, Path] | None = None,
    native: NativeOptions | None = None,
) -> Runner:
    """Load a model folder into the runner called `name`.

    Args:
        name: One of `RUNNERS`; `auto`: the native one where it can run the model, else torch, with
            a line in the log that says why.
        checkpoint: An open model folder.
        dtype: Type of the arithmetic; None: as the folder says.
        device: `cpu`, `cuda` or `cuda:N`.
        threads: Threads for one step; None: one for each core, for a small model on torch one.
        deterministic: Give every token the same bits whatever else is in its step (decision 6); the
            native runner always does.
        adapters: LoRA adapters by the name that requests give, each a folder in PEFT's format.
        native: What is asked of the native runner alone.

    Raises:
        ConfigError: an unknown runner, type or device, or options of another runner.
        CheckpointError: an adapter cannot be read or does not fit the model.
        MissingDependencyError: the runner's package is not installed.
    """
    if name not in RUNNERS:
        raise ConfigError(f"runner must be one of {', '.join(RUNNERS)}, got {name!r}")
    if threads is not None and threads < 1:
        raise ConfigError(f"threads must be at least 1, got {threads}")
    loaded = [load_adapter(one, path) for one, path in (adapters or {}).items()]
    if name != "torch":
        obstacle = obstacle_to_native(checkpoint, dtype=dtype, device=device)
        if obstacle is None:
            from .native_runner import NativeRunner

            return NativeRunner(checkpoint, native, dtype=dtype, threads=threads, adapters=loaded)
        if name == "native":
            raise ConfigError(f"the native runner cannot run this model: {obstacle}")
        if device == "cpu":
            _log.warning("the torch runner takes over from the native one: %s", obstacle)
    if native not in (None, NativeOptions()):
        raise ConfigError(
            "activations, head weights, cache type and instruction set are choices of the native "
            "runner; the torch runner has none of them: leave them out"
        )
    return _load_torch(checkpoint, dtype, device, threads, deterministic, loaded)


def _load_torch(
    checkpoint: Checkpoint, dtype: str | None, device: str, threads: int | None,
    deterministic: bool, adapters: Sequence[Adapter],
) -> Runner:  # fmt: skip
    if find_spec("torch") is None:
        raise MissingDependencyError("torch", extra="torch", feature="the torch runner")
    from .torch_runner import DEFAULT_THREADS, TorchRunner, use_threads

    runner = TorchRunner(
        checkpoint, dtype=dtype, device=device, deterministic=deterministic, adapters=adapters
    )
    if threads is None:
        # Said even where it is the library's own choice: a draft model loaded before may have
        # asked for another.
        threads = 1 if runner.info.num_parameters < _SMALL_MODEL else DEFAULT_THREADS
    use_threads(threads)
    return runner
