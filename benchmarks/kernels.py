"""Each operation of the native runner alone: its time over the time that its bytes or its
multiply-adds need on this machine (`kernels_floors.py`).

The machine's own rates are measured before and after each repeat, in which every operation takes
its turn; the better ones count for it. Ratios are taken within a repeat, so that a change of the
machine's speed cancels.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import orjson

from llmserve.checkpoint import Checkpoint
from llmserve.config import ModelConfig
from llmserve.errors import ConfigError
from llmserve.native.kernels import available_paths, choose_path
from llmserve.native.weights import Form, WeightSegment
from llmserve.runners.native_options import obstacle_to_native
from llmserve.runners.native_runner import default_threads

from .kernels_floors import Rates
from .kernels_matrices import Matrix, Pool, cache_size, folder_matrices, shape_matrices
from .kernels_operations import Operation, least_pool_bytes, operations_of
from .kernels_steps import Machine
from .machine import command_line, machine, versions
from .shapes import SHAPES

__all__ = ["KernelsOptions", "bench_kernels", "kernels_options", "kernels_result"]

_POOL_BYTES = 256 << 20
_DOTS = {"int4": "int4_dots", "int8": "int8_dots", "float32": "floats"}
_LEAST_S = 0.004  # of one operation's timings together: shorter steps are repeated


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelsOptions:
    """One measurement, of a folder or of a shape."""

    model: Path | None = None
    """The model folder."""
    shape: str | None = None
    """Instead of a folder: a shape of `bench make-model`."""
    scheme: str = "int4"
    """The form of a shape's weights."""
    rows: tuple[int, ...] = (1, 8, 32, 128, 512)
    """Rows of the linear layers, ascending."""
    repeats: int = 5
    """Timings of each operation, in turn."""
    threads: int | None = None
    """Threads of a step; None: one for each core."""
    instruction_set: str = "auto"
    """Which of the processor's to use."""
    cache_dtype: str = "bfloat16"
    """Type of keys and values."""
    pool_bytes: int | None = None
    """Memory that copies are cut from; None: four times the cache, 256 MiB at least."""

    def __post_init__(self) -> None:
        if (self.model is None) == (self.shape is None):
            raise ConfigError("give a model folder or --shape, and not both")
        if not self.rows or min(*self.rows, self.repeats, self.threads or 1) < 1:
            raise ConfigError("rows, repeats and threads must be at least 1")


def kernels_options(args: argparse.Namespace) -> KernelsOptions:
    """The options behind the arguments of the command line. Raises `ConfigError`."""
    try:
        rows = tuple(sorted({int(part) for part in args.rows.split(",")}))
    except ValueError:
        raise ConfigError(f"--rows takes whole numbers like 1,32,512, got {args.rows!r}") from None
    if args.scheme is not None and args.shape is None:
        raise ConfigError("--scheme is for --shape; a folder's weights have the form they have")
    return KernelsOptions(
        model=args.model,
        shape=args.shape,
        scheme=args.scheme or "int4",
        rows=rows,
        repeats=args.repeats,
        threads=args.threads,
        instruction_set=args.instruction_set,
        cache_dtype=args.kv_cache_dtype,
    )


def bench_kernels(options: KernelsOptions) -> int:
    """Measure and print table and JSON; the exit code.

    Raises:
        CheckpointError: the folder cannot be used.
        ConfigError: the native runner cannot run it, or not with this instruction set.
    """
    if not available_paths():
        raise ConfigError(
            "the native runner's kernels are not built; installing llmserve where there is a C++ "
            "compiler does"
        )
    config, matrices = _matrices(options)
    path = choose_path(options.instruction_set)
    device = Machine(path, options.threads or default_threads())
    wanted = options.pool_bytes or max(_POOL_BYTES, 4 * cache_size())
    pool = Pool(max(wanted, least_pool_bytes(config, matrices, options.cache_dtype)))
    operations = operations_of(
        device, config, matrices, pool, num_rows=options.rows, cache_dtype=options.cache_dtype
    )
    rates, times = _measure(options, device, pool, operations)
    result = kernels_result(options, operations, rates, times)
    result["instruction_set"], result["threads"] = path, device.threads
    result["pool_bytes"] = len(pool.memory)
    print(_table(result))
    print(orjson.dumps(result).decode(), flush=True)
    return 0


def kernels_result(
    options: KernelsOptions,
    operations: list[Operation],
    rates: list[Rates],
    times: list[list[float]],
) -> dict[str, object]:
    """The JSON document.

    Args:
        options: What was measured.
        operations: In the table's order.
        rates: The machine's in each repeat.
        times: Seconds, of each operation one for each repeat.
    """
    lines = [
        _line(operation, rates, seconds)
        for operation, seconds in zip(operations, times, strict=True)
    ]
    return {
        "benchmark": "kernels",
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "model": str(options.model) if options.model else f"shape {options.shape}",
        "scheme": options.scheme if options.shape else None,
        "cache_dtype": options.cache_dtype,
        "repeats": options.repeats,
        "rates": asdict(_median_rates(rates)),
        "rates_runs": [asdict(one) for one in rates],
        "operations": lines,
        "machine": machine(),
        "versions": versions(("numpy",)),
        "command": command_line(),
    }


def _line(operation: Operation, rates: list[Rates], seconds: list[float]) -> dict[str, object]:
    need, middle = operation.need, _median_rates(rates)
    ratios = [one / need.floor_s(rate) for one, rate in zip(seconds, rates, strict=True)]
    return {
        "operation": operation.name,
        "rows": operation.num_rows,
        "copies": operation.copies,
        "time_us": 1e6 * statistics.median(seconds),
        "floor_us": 1e6 * need.floor_s(middle),
        "bound": need.bound(middle),
        "time_over_floor": statistics.median(ratios),
        "read_bytes": need.read_bytes,
        "multiply_adds": need.operations,
        "runs_us": [1e6 * one for one in seconds],
    }


def _median_rates(rates: list[Rates]) -> Rates:
    columns = [asdict(one) for one in rates]
    return Rates(**{name: statistics.median(one[name] for one in columns) for name in columns[0]})


def _matrices(options: KernelsOptions) -> tuple[ModelConfig, list[Matrix]]:
    if options.model is None:
        assert options.shape is not None, "neither a folder nor a shape"
        config = SHAPES[options.shape]
        return config, shape_matrices(config, options.scheme)
    checkpoint = Checkpoint.open(options.model, verify=False)  # no weight is read
    obstacle = obstacle_to_native(checkpoint, dtype=None, device="cpu")
    if obstacle is not None:
        raise ConfigError(f"the native runner cannot run this model: {obstacle}")
    config = checkpoint.config
    form = Form(floats="bfloat16" if config.dtype == "bfloat16" else "float32")
    return config, folder_matrices(config, WeightSegment(checkpoint, form))


def _measure(
    options: KernelsOptions, device: Machine, pool: Pool, operations: list[Operation]
) -> tuple[list[Rates], list[list[float]]]:
    """The rates of each repeat, and of each operation the seconds in each repeat."""
    counts = [_num_timings(operation) for operation in operations]
    rates: list[Rates] = []
    times: list[list[float]] = [[] for _ in operations]
    before = _rates(device, pool)
    for repeat in range(1, options.repeats + 1):
        for operation, count, seconds in zip(operations, counts, times, strict=True):
            seconds.append(statistics.median(operation.time_s() for _ in range(count)))
        after = _rates(device, pool)
        rates.append(before.best_with(after))
        before = after
        print(f"repeat {repeat}/{options.repeats}", file=sys.stderr, flush=True)
    return rates, times


def _rates(device: Machine, pool: Pool) -> Rates:
    read_bytes, int4_dots, int8_dots, floats = device.kernels.measure_machine(
        device.path, device.threads, pool.memory
    )
    return Rates(read_bytes=read_bytes, int4_dots=int4_dots, int8_dots=int8_dots, floats=floats)


def _num_timings(operation: Operation) -> int:
    """So many that they take a while together; the first call, which allocates, does not count."""
    operation.time_s()
    start_s = time.perf_counter()
    operation.time_s()
    return max(1, min(50, round(_LEAST_S / (time.perf_counter() - start_s))))


def _table(result: dict[str, object]) -> str:
    lines, rates = result["operations"], result["rates"]
    assert isinstance(lines, list)
    assert isinstance(rates, dict)
    dots = (f"{name} {rates[key] / 1e9:.0f}" for name, key in _DOTS.items())
    head = (
        f"{result['instruction_set']}, {result['threads']} threads: reads "
        f"{rates['read_bytes'] / 1e9:.1f} GB/s; 10^9 multiply-adds a second: {', '.join(dots)}"
    )
    names = (
        f"{'operation':<28}{'rows':>6}{'us':>12}{'floor us':>12}  {'bound by':<10}{'x floor':>8}"
    )
    rows = (
        f"{line['operation']:<28}{line['rows']:>6}{line['time_us']:>12.2f}"
        f"{line['floor_us']:>12.2f}  {line['bound']:<10}{line['time_over_floor']:>8.2f}"
        for line in lines
    )
    return "\n".join([head, names, *rows])
