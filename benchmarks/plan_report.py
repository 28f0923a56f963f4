"""A plan as a table for people and as one JSON document."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime

from .machine import command_line, machine, versions
from .plan_options import Plan, PlannedLoop, PlanOptions
from .plan_predict import Knee

__all__ = ["plan_document", "plan_table"]

COLUMNS = (
    *("at a time", "tokens/s", "TTFT ms", "TPOT ms", "in time"),
    *("measured", "miss", "TTFT ms", "TPOT ms", "in time"),
)


def plan_document(options: PlanOptions, plan: Plan) -> dict[str, object]:
    """Predictions, what they rest on, and what was measured."""
    return {
        "benchmark": "plan",
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "model": options.model.name,
        "executed_form": plan.executed_form,
        "max_num_seqs": options.max_num_seqs,
        "max_num_batched_tokens": options.max_batched_tokens,
        "input_len": options.input_len,
        "output_len": options.output_len,
        "slos_ms": dict(options.slos_ms),
        "attainment": options.attainment,
        "cost_model": plan.engine.cost.outside(),
        "cost_model_errors": {
            "median": plan.engine.median_error,
            "p90": plan.engine.p90_error,
            "total": plan.engine.total_error,
        },
        "serving_cost": plan.serving.cost.outside(),
        "serving_loads": [
            {**asdict(item.loop), "duration": item.duration_s, "error": error}
            for item, error in zip(plan.serving.measured, plan.serving.errors, strict=True)
        ],
        "loops": [_loop_item(item) for item in plan.loops],
        "knee": _knee_item(plan.knee),
        "measured_knee": None if plan.measured_knee is None else _knee_item(plan.measured_knee),
        "knee_miss": plan.knee_miss,
        "machine": machine(),
        "versions": versions(("numpy",)),
        "command": command_line(),
    }


def plan_table(options: PlanOptions, plan: Plan) -> str:
    """For a person to read."""
    columns = COLUMNS if options.is_checked else COLUMNS[:5]
    lines = [
        f"{options.model}, {plan.executed_form}",
        "planned: llmserve serve " + " ".join(options.serve_arguments),
        f"{options.input_len} tokens in, {options.output_len} out",
        "",
        "".join(f"{title:>11}" for title in columns),
        *("".join(f"{cell:>11}" for cell in _cells(item)) for item in plan.loops),
        "",
        *_verdict(options, plan),
    ]
    return "\n".join(lines)


def _cells(item: PlannedLoop) -> Iterator[str]:
    yield str(item.loop.max_concurrency)
    for figures in (item.predicted, item.measured):
        if figures is None:
            return
        yield f"{figures.output_throughput:.0f}"
        if figures is item.measured:
            yield f"{item.miss:+.1%}"
        yield f"{figures.ttft_ms:.1f}"
        yield f"{figures.tpot_ms:.2f}"
        yield f"{figures.attained:.0%}"


def _verdict(options: PlanOptions, plan: Plan) -> Iterator[str]:
    bounds = ", ".join(f"{name} {bound:g} ms" for name, bound in options.slos_ms.items())
    yield f"objectives: {bounds} for {options.attainment:.0%} of the requests"
    met = [
        item.loop.max_concurrency
        for item in plan.loops
        if item.predicted.attained >= options.attainment
    ]
    most = f"up to {max(met)} at a time" if met else "at none of these numbers at a time"
    yield f"predicted: met {most}, and {_knee_text(plan.knee)}"
    if plan.measured_knee is not None:
        miss = "" if plan.knee_miss is None else f"; the prediction is off by {plan.knee_miss:+.1%}"
        yield f"measured: {_knee_text(plan.measured_knee)}{miss}"


def _knee_text(knee: Knee) -> str:
    if knee.met is None:
        return "missed at every rate tried"
    if knee.missed is None:
        return f"met at every rate tried, up to {knee.met:.3g} requests/s"
    return f"at {knee.met:.3g} requests/s; not at {knee.missed:.3g}"


def _loop_item(item: PlannedLoop) -> dict[str, object]:
    return {
        "max_concurrency": item.loop.max_concurrency,
        "num_requests": item.loop.num_requests,
        "predicted": asdict(item.predicted),
        "measured": None if item.measured is None else asdict(item.measured),
        "miss": item.miss,
    }


def _knee_item(knee: Knee) -> dict[str, float | None]:
    return {"met": knee.met, "missed": knee.missed, "rate": knee.rate}
