"""Runners by name. What a runner needs is imported only when it is chosen."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from ..adapters import Adapter, load_adapter
from ..checkpoint import Checkpoint
from ..errors import ConfigError, MissingDependencyError
from .model_facts import num_parameters_of
from .native_options import NativeOptions, obstacle_to_native
from .protocol import Runner

__all__ = [
    "RUNNERS",
    "device_of_replica",
    "import_torch_runner",
    "load_runner",
    "survives_fork",
    "use_torch_threads",
]

_log = logging.getLogger("llmserve.engine")

RUNNERS = ("auto", "native", "torch", "onnx")
"""Names that `load_runner` takes."""

_SMALL_MODEL = 16_000_000
"""Parameters under which torch runs a model on one thread. On an idle machine a second one gains
nothing for one stream and some for prefill and large batches; beside another busy process it costs
most of the speed (decision 4)."""


def load_runner(
    runner: str,
    checkpoint: Checkpoint,
    *,
    dtype: str | None = None,
    device: str = "cpu",
    threads: int | None = None,
    block_size: int | None = None,
    deterministic: bool = False,
    tensor_parallel_size: int = 1,
    adapters: Mapping[str, Path] | None = None,
    native: NativeOptions | None = None,
    enforce_eager: bool = False,
) -> Runner:
    """Load a model folder into the runner of that name.

    Args:
        runner: One of `RUNNERS`; `auto`: onnx for a folder that holds a graph in place of weights,
            the native one where it can run the model, else torch, with a line in the log that
            says why.
        checkpoint: An open model folder.
        dtype: Type of the arithmetic; None: as the folder says.
        device: `cpu`, `cuda` or `cuda:N`.
        threads: Threads for one step; None: one for each core, for a small model on torch one.
        block_size: Tokens in a block of the KV cache to come; None: it is not known yet.
        deterministic: Give every token the same bits whatever else is in its step (decision 6); the
            native runner always does.
        tensor_parallel_size: Processes that compute the model together, on the torch runner; on
            CUDA each has a device.
        adapters: LoRA adapters by the name that requests give, each a folder in PEFT's format.
        native: What is asked of the native runner; None: nothing. The type of the cache is the
            torch runner's to choose too.
        enforce_eager: On CUDA, start a step's kernels one by one in place of captured graphs.

    Raises:
        ConfigError: an unknown runner, type or device, or options of another runner.
        CheckpointError: an adapter cannot be read or does not fit the model.
        MissingDependencyError: the runner's package is not installed.
    """
    if runner not in RUNNERS:
        raise ConfigError(f"runner must be one of {', '.join(RUNNERS)}, got {runner!r}")
    if threads is not None and threads < 1:
        raise ConfigError(f"threads must be at least 1, got {threads}")
    if tensor_parallel_size < 1:
        raise ConfigError(f"tensor_parallel_size must be at least 1, got {tensor_parallel_size}")
    if enforce_eager and device == "cpu":
        raise ConfigError(
            "enforce_eager switches off the CUDA graphs of decode steps, and the device is cpu, "
            "which has none: leave it out"
        )
    if runner == "onnx" or (runner == "auto" and not checkpoint.has_weights):
        given = {"dtype": dtype, "adapters": adapters, "native options": native}
        given["device"] = None if device == "cpu" else device
        if tensor_parallel_size > 1:
            given["tensor parallel size"] = str(tensor_parallel_size)
        return _load_onnx(checkpoint, threads, [name for name, value in given.items() if value])
    if not checkpoint.has_weights:
        raise ConfigError(
            f"{checkpoint.path} holds an ONNX graph in place of weights, which the runner {runner} "
            "cannot execute: leave out --runner, or say --runner onnx"
        )
    loaded = [load_adapter(one, path) for one, path in (adapters or {}).items()]
    obstacle = None
    if runner != "torch":
        obstacle = obstacle_to_native(
            checkpoint, dtype=dtype, device=device, block_size=block_size,
            tensor_parallel_size=tensor_parallel_size,
        )  # fmt: skip
        if obstacle is None:
            from .native_runner import NativeRunner

            return NativeRunner(checkpoint, native, dtype=dtype, threads=threads, adapters=loaded)
        if runner == "native":
            raise ConfigError(f"the native runner cannot run this model: {obstacle}")
    native = native or NativeOptions()
    if native != NativeOptions(cache_dtype=native.cache_dtype):
        because = "" if obstacle is None else f" ({obstacle})"
        raise ConfigError(
            "activations, head weights and instruction set are choices of the native runner; the "
            f"torch runner, which runs this model{because}, has none of them: leave them out"
        )
    if obstacle is not None and device == "cpu":
        _log.warning("the torch runner takes over from the native one: %s", obstacle)
    if tensor_parallel_size > 1:
        return _load_parallel(
            checkpoint, dtype, device, threads, deterministic, native.cache_dtype, loaded,
            tensor_parallel_size,
        )  # fmt: skip
    return _load_torch(
        checkpoint, dtype, device, threads, deterministic, native.cache_dtype, loaded, enforce_eager
    )


def _load_onnx(checkpoint: Checkpoint, threads: int | None, given: Sequence[str]) -> Runner:
    """`given`: what was asked for that a graph has settled."""
    if given:
        raise ConfigError(
            f"the onnx runner executes a graph as it was exported, on the CPU, and takes no "
            f"{' and no '.join(given)}: leave it out"
        )
    from .onnx_runner import OnnxRunner

    return OnnxRunner(checkpoint, threads=threads)


def survives_fork(
    runner: str,
    checkpoint: Checkpoint,
    *,
    dtype: str | None = None,
    device: str = "cpu",
    block_size: int | None = None,
    tensor_parallel_size: int = 1,
) -> bool:
    """Whether a process may load the model with `load_runner` and fork before it makes a cache.

    The native runner may. The torch one has threads by then, and perhaps a GPU, which no child
    process inherits; ONNX Runtime has threads too.
    """
    if runner in ("torch", "onnx"):
        return False
    obstacle = obstacle_to_native(
        checkpoint, dtype=dtype, device=device, block_size=block_size,
        tensor_parallel_size=tensor_parallel_size,
    )  # fmt: skip
    return obstacle is None


def device_of_replica(device: str, index: int, *, num_ranks: int = 1) -> str:
    """The device of one of several engines that compute the same model.

    `cuda` becomes `cuda:N`, the first of `num_ranks` devices, in turn. A device that was named is
    everyone's.
    """
    if device != "cuda" or find_spec("torch") is None:
        return device
    from .torch_devices import nth_device

    return nth_device(index, num_ranks=num_ranks)


def import_torch_runner() -> None:
    """Import what a model on torch will need, before a fork: that does survive it.

    Where torch is not installed nothing happens; `load_runner` says so.
    """
    if find_spec("torch") is not None:
        from . import torch_runner  # noqa: F401 - for what importing it leaves behind


def _load_torch(
    checkpoint: Checkpoint, dtype: str | None, device: str, threads: int | None,
    deterministic: bool, cache_dtype: str, adapters: Sequence[Adapter], enforce_eager: bool,
) -> Runner:  # fmt: skip
    _need_torch()
    from .torch_runner import TorchRunner

    runner = TorchRunner(
        checkpoint, dtype=dtype, device=device, deterministic=deterministic,
        cache_dtype=cache_dtype, adapters=adapters, enforce_eager=enforce_eager,
    )  # fmt: skip
    use_torch_threads(threads, num_parameters=runner.info.num_parameters)
    return runner


def _load_parallel(
    checkpoint: Checkpoint, dtype: str | None, device: str, threads: int | None,
    deterministic: bool, cache_dtype: str, adapters: Sequence[Adapter], num_ranks: int,
) -> Runner:  # fmt: skip
    """On a CPU the ranks share its cores."""
    if deterministic:
        raise ConfigError(
            f"the deterministic mode computes in one process, not in {num_ranks}: sums over ranks "
            "are not made row by row; leave out one of the two"
        )
    _need_torch()
    from .torch_parallel_runner import ParallelRunner
    from .torch_runner import DEFAULT_THREADS

    is_small = num_parameters_of(checkpoint.config) < _SMALL_MODEL
    threads = threads or (1 if is_small else max(1, DEFAULT_THREADS // num_ranks))
    runner = ParallelRunner(
        checkpoint, num_ranks=num_ranks, threads=threads, dtype=dtype, device=device,
        cache_dtype=cache_dtype, adapters=adapters,
    )  # fmt: skip
    use_torch_threads(threads, num_parameters=runner.info.num_parameters)
    return runner


def _need_torch() -> None:
    if find_spec("torch") is None:
        raise MissingDependencyError("torch", extra="torch", feature="the torch runner")


def use_torch_threads(threads: int | None, *, num_parameters: int) -> None:
    """Have torch compute with so many threads; None: what suits a model of that size."""
    from .torch_runner import DEFAULT_THREADS, use_threads

    if threads is None:
        # Said even where it is the library's own choice: a draft model loaded before may have
        # asked for another.
        threads = 1 if num_parameters < _SMALL_MODEL else DEFAULT_THREADS
    use_threads(threads)
