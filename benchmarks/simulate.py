"""`llmserve simulate` from its options to the exit code."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import orjson

from llmserve.console import console, progress
from llmserve.errors import LLMServeError

from .cost_model import CostModel, load_cost_model, parse_cost_model, save_cost_model
from .machine import machine, versions
from .simulation_options import SimulationOptions
from .simulation_report import run_figures, simulation_document, simulation_table, sweep_table
from .simulator import Progress, SimulatedEngine, simulate
from .traces import Trace

__all__ = ["run_simulations"]

REFRESH_S = 0.5


def run_simulations(options: SimulationOptions) -> int:
    """Make the cost model, play the trace to each engine, print table and JSON; the exit code.

    Raises:
        CheckpointError: the model folder to be fitted cannot be used.
        ConfigError: the cost model cannot be used, or the engine cannot hold a request.
        DataError: a line of the trace cannot be used.
        LLMServeError: the cost model cannot be saved.
    """
    cost = _cost_model(options)
    if options.trace is not None:
        _play(options, options.trace, cost)
    return 0


def _play(options: SimulationOptions, trace: Trace, cost: CostModel) -> None:
    # Rounds save what a step costs once; costs without that may be those of a GPU, which has none.
    repeats_decodes = cost.step_s > 0
    size = trace.size(options.block_size)
    engines = [
        SimulatedEngine(
            cost=cost,
            block_size=options.block_size,
            num_blocks=num_blocks,
            max_num_seqs=options.max_num_seqs,
            max_batched_tokens=options.max_batched_tokens,
            policy=options.policy,
            has_prefix_cache=options.has_prefix_cache,
            repeats_decodes=repeats_decodes,
        )
        for num_blocks in options.num_blocks
    ]
    for engine in engines:
        engine.config_for(trace, size)  # what cannot run is refused before the first one does
    runs = []
    for number, engine in enumerate(engines, start=1):
        title = f"simulating, {number} of {len(engines)}" if len(engines) > 1 else "simulating"
        with _display(title, size.num_requests) as on_progress:
            simulation = simulate(trace, size, engine, on_progress=on_progress)
        runs.append(run_figures(simulation, options, engine.num_blocks))
    document = simulation_document(options, trace, size, cost, runs)
    table = simulation_table(document, runs[0]) if len(runs) == 1 else sweep_table(document, runs)
    print(table)
    print(orjson.dumps(document).decode(), flush=True)


def _cost_model(options: SimulationOptions) -> CostModel:
    if options.fit_folder is not None:
        return _fitted(options, options.fit_folder)
    if isinstance(options.cost_model, Path):
        return load_cost_model(options.cost_model)
    return parse_cost_model(options.cost_model)


def _fitted(options: SimulationOptions, folder: Path) -> CostModel:
    from llmserve.checkpoint import Checkpoint
    from llmserve.runners.registry import load_runner

    from .cost_fit import fit_cost_model

    runner = load_runner(
        "auto", Checkpoint.open(folder), dtype=options.dtype, device=options.device or "cpu"
    )
    try:
        fit = fit_cost_model(
            runner,
            max_num_seqs=options.max_num_seqs,
            max_batched_tokens=options.max_batched_tokens,
        )
    finally:
        runner.close()
    print(fit, file=sys.stderr)
    if options.save_cost_model is not None:
        measured = {name: value for name, value in asdict(fit).items() if name != "cost"}
        measured |= {"model": str(folder), "executed_form": runner.info.executed_form}
        measured |= {"machine": machine(), "versions": versions(("numpy", "torch"))}
        _save(options.save_cost_model, fit.cost, measured)
    return fit.cost


def _save(path: Path, cost: CostModel, measured: dict[str, object]) -> None:
    try:
        save_cost_model(path, cost, measured)
    except OSError as error:
        raise LLMServeError(f"cannot save the cost model as {path}: {error}") from error
    print(f"saved as {path}", file=sys.stderr)


@contextmanager
def _display(title: str, num_requests: int) -> Iterator[Progress | None]:
    """Progress on stderr, if that is a terminal."""
    if not console().is_terminal:
        yield None
        return
    bars = progress()
    bars.live.auto_refresh = False
    task = bars.add_task(title, total=num_requests, note="")
    shown_s = 0.0

    def update(num_ended: int) -> None:
        nonlocal shown_s
        now_s = time.monotonic()
        if now_s - shown_s >= REFRESH_S:
            shown_s = now_s
            bars.update(task, completed=num_ended, note=f"{num_ended} requests", refresh=True)

    with bars:
        yield update
