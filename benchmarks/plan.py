"""`llmserve plan`: what this machine will carry of a model, before anybody asks it to.

In order: time the engine's steps in this process (`cost_fit.py`), start a server and time a few
short loads of it (`serving_cost.py`), then ask the simulator. With `--check` the server is put to
the loads that were predicted.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace

import orjson

from llmserve.errors import ConfigError

from .cost_fit import CostFit, fit_cost_model
from .equal_requests import ClosedLoop
from .plan_measure import PlannedServer, serving
from .plan_options import Plan, PlannedLoop, PlanOptions
from .plan_predict import Knee, predict_knee, predict_loop, sized_loop
from .plan_report import plan_document, plan_table
from .serving_cost import ServedSteps, ServingCost, ServingFit, fit_serving_cost
from .simulator import SimulatedEngine

__all__ = ["bench_plan"]

PROBE_SHAPES = ((1, 16, 48), (1, 16, 4), (4, 16, 48), (8, 64, 8), (16, 16, 48), (16, 16, 4),
                (64, 16, 48), (4, 256, 8), (16, 128, 16))  # fmt: skip
"""Requests at a time, tokens in, tokens out: what tells steps, tokens, requests and prompts apart.
Those longer than the context are left out."""
PROBE_S = 1.5
"""Length of each, about."""


def bench_plan(options: PlanOptions) -> int:
    """Fit, predict, check where asked; print a table and, as the last line, JSON; the exit code.

    Raises:
        LLMServeError: the model cannot be used, or its server not be started or asked.
    """
    form, context, simulated, fit = _fitted_engine(options)
    _note(str(fit))
    with serving(options.serve_arguments) as server:
        served = _fitted_serving(simulated, fit, server, context)
        _note(str(served))
        steps = ServedSteps(fit.cost, served.cost)
        machine = replace(simulated, cost=steps, entry_s=served.cost.entry_s)
        loops = tuple(_planned_loops(options, machine))
        knee = _predicted_knee(options, machine, loops)
        plan = Plan(executed_form=form, engine=fit, serving=served, loops=loops, knee=knee)
        if options.is_checked:
            plan = _checked(options, plan, server)
    print(plan_table(options, plan))
    print(orjson.dumps(plan_document(options, plan)).decode(), flush=True)
    return 0


def _fitted_engine(options: PlanOptions) -> tuple[str, int, SimulatedEngine, CostFit]:
    """The form executed, the context, the engine that a server would have, and its steps' cost."""
    from llmserve.checkpoint import Checkpoint
    from llmserve.runners.registry import load_runner
    from llmserve.startup import EngineOptions, plan_engine

    seqs, tokens = options.max_num_seqs, options.max_batched_tokens
    _note("timing the engine's steps")
    checkpoint = Checkpoint.open(options.model)
    runner = load_runner(options.runner, checkpoint, device="cpu", threads=options.threads)
    try:
        config = plan_engine(runner, EngineOptions(max_num_seqs=seqs, max_batched_tokens=tokens))
        length = options.input_len + options.output_len
        if length > config.max_seq_len:
            raise ConfigError(
                f"prompt and answer make {length} tokens; the context is {config.max_seq_len}: "
                "lower --input-len or --output-len"
            )
        fit = fit_cost_model(
            runner, max_num_seqs=seqs, max_batched_tokens=tokens, max_s=options.fit_s
        )
    finally:
        runner.close()
    simulated = SimulatedEngine(
        cost=fit.cost,
        block_size=config.block_size,
        num_blocks=config.num_blocks[0],
        max_num_seqs=seqs,
        max_batched_tokens=tokens,
        repeats_decodes=runner.info.repeats_decodes,
    )
    return runner.info.executed_form, config.max_seq_len, simulated, fit


def _fitted_serving(
    simulated: SimulatedEngine, fit: CostFit, server: PlannedServer, context: int
) -> ServingFit:
    _note("timing short loads of a server")
    engine_alone = replace(simulated, cost=ServedSteps(fit.cost, ServingCost()))
    measured = []
    for concurrency, input_len, output_len in PROBE_SHAPES:
        if concurrency <= simulated.max_num_seqs and input_len + output_len <= context:
            loop = ClosedLoop(
                max_concurrency=concurrency,
                num_requests=2 * concurrency,
                input_len=input_len,
                output_len=output_len,
            )
            # What serving adds is not known yet, and may be many times the engine's time.
            timed = server.time(sized_loop(engine_alone, loop, seconds=PROBE_S / 8))
            if timed.duration_s < PROBE_S:
                count = round(timed.loop.num_requests * PROBE_S / timed.duration_s)
                timed = server.time(replace(loop, num_requests=count))
            measured.append(timed)
    return fit_serving_cost(simulated, fit.cost, measured)


def _planned_loops(options: PlanOptions, machine: SimulatedEngine) -> Iterator[PlannedLoop]:
    for concurrency in options.concurrency:
        loop = ClosedLoop(
            max_concurrency=concurrency,
            num_requests=2 * concurrency,
            input_len=options.input_len,
            output_len=options.output_len,
        )
        sized = sized_loop(machine, loop, seconds=options.run_s)
        yield PlannedLoop(loop=sized, predicted=predict_loop(machine, sized, options.slos_ms))


def _predicted_knee(
    options: PlanOptions, machine: SimulatedEngine, loops: tuple[PlannedLoop, ...]
) -> Knee:
    most = max(item.predicted.output_throughput for item in loops) / options.output_len
    return predict_knee(
        machine,
        options.wanted(start_rate=most),
        input_len=options.input_len,
        output_len=options.output_len,
    )


def _checked(options: PlanOptions, plan: Plan, server: PlannedServer) -> Plan:
    """`plan` with what the server really does."""
    loops = []
    for item in plan.loops:
        _note(f"checking {item.loop.max_concurrency} at a time")
        loops.append(replace(item, measured=server.run(item.loop, options.slos_ms)))
    knee = None
    if plan.knee.rate is not None:
        _note(f"checking {plan.knee.rate:.3g} requests/s and the rates around it")
        wanted = options.wanted(start_rate=plan.knee.rate)
        knee = server.knee(wanted, input_len=options.input_len, output_len=options.output_len)
    return replace(plan, loops=tuple(loops), measured_knee=knee)


def _note(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
