"""`llmserve bench compare A B`: which of two load tests was faster, and how sure that is.

Reads the documents that `bench serve --save-result` writes (or `vllm bench serve`: the keys are
the same). Several runs of each side are compared by how they scatter, which is the only honest
measure of noise from run to run; a single run of each by the intervals it came with.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from llmserve.errors import ConfigError, DataError

from .result import RATES
from .statistics import Interval, Ratio, ratio_of_intervals, ratio_of_runs

__all__ = ["Comparison", "bench_compare", "compare_results", "read_results"]

LATENCY_KEY = re.compile(r"(mean|median|p[\d.]+)_\w+_ms")
# What the load was: figures of different loads say nothing about the servers.
LOAD_KEYS = (
    "num_prompts",
    "traffic",
    "request_rate",
    "burstiness",
    "max_concurrency",
    "endpoint_type",
)

Result = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One figure of both sides."""

    key: str
    """Its name in the results."""
    a: float
    """Of A: the figure, or the mean of its runs."""
    b: float
    speedup: Ratio
    """How many times faster B is: above 1 for a higher rate or a lower latency."""

    @property
    def verdict(self) -> str:
        """`faster`, `slower` (B than A) or `no difference shown`."""
        if not self.speedup.is_shown:
            return "no difference shown"
        return "faster" if self.speedup.value > 1 else "slower"

    def sentence(self) -> str:
        """The verdict as a person would say it."""
        value, interval = self.speedup.value, self.speedup.interval
        if self.verdict == "slower":
            value, interval = 1 / value, Interval(1 / interval.high, 1 / interval.low)
        sure = f"(95 %: {interval.low:.2f}-{interval.high:.2f})"
        if self.speedup.is_shown:
            return f"B is {value:.2f} times {self.verdict} {sure}"
        return f"no difference shown {sure}"


def bench_compare(path_a: Path, path_b: Path) -> int:
    """Print the comparison as a table and, as the last line, JSON; the exit code, 0.

    Raises:
        DataError: a path holds no results, or nothing in them can be compared.
        ConfigError: A or B holds runs of different loads.
    """
    a, b = read_results(path_a), read_results(path_b)
    comparisons = compare_results(a, b)
    document = {
        "a": str(path_a),
        "b": str(path_b),
        "num_runs": [len(a), len(b)],
        "notes": list(_notes(a, b)),
        "metrics": {comparison.key: _item(comparison) for comparison in comparisons},
    }
    print("\n".join(_table(path_a, path_b, a, b, comparisons)))
    print(orjson.dumps(document).decode())
    return 0


def read_results(path: Path) -> list[Result]:
    """The result in a file, or those of every `.json` file in a folder, by name.

    Raises:
        DataError: nothing readable is there, or a file is not a result of a load test.
    """
    paths = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not paths:
        raise DataError(f"{path} holds no .json file: save results with --save-result")
    return [_read_result(one) for one in paths]


def compare_results(a: Sequence[Result], b: Sequence[Result]) -> list[Comparison]:
    """Every figure that both sides hold in all runs, above 0 and with an interval to be found.

    Raises:
        DataError: there is none.
        ConfigError: the runs of one side are of different loads.
    """
    for name, results in (("A", a), ("B", b)):
        if differing := _differing(results):
            raise ConfigError(
                f"the runs of {name} differ in {', '.join(differing)}: they are not repeats of one "
                "load; give each load a folder of its own"
            )
    keys = [key for key in a[0] if key in RATES or LATENCY_KEY.fullmatch(key)]
    found = [comparison for key in keys if (comparison := _compare(key, a, b))]
    if not found:
        raise DataError(
            "nothing can be compared: figures need 2 runs of each side, or intervals in the "
            "results (at least 10 requests, 50 for rates)"
        )
    return found


def _read_result(path: Path) -> Result:
    try:
        result = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise DataError(f"cannot read the result {path}: {error}") from error
    if not isinstance(result, dict) or "request_throughput" not in result:
        raise DataError(f"{path} is not the result of a load test: it has no request_throughput")
    if not isinstance(result.get("intervals", {}), dict):
        raise DataError(f"{path}: intervals must be an object of [low, high] by key")
    return result


def _differing(results: Sequence[Result]) -> list[str]:
    first = results[0]
    return [key for key in LOAD_KEYS if any(r.get(key) != first.get(key) for r in results)]


def _compare(key: str, a: Sequence[Result], b: Sequence[Result]) -> Comparison | None:
    figures: list[list[Any]] = [[result.get(key) for result in side] for side in (a, b)]
    if not all(_is_above_zero(figure) for side in figures for figure in side):
        return None
    over, under = (1, 0) if key in RATES else (0, 1)
    if min(len(a), len(b)) > 1:
        speedup = ratio_of_runs(figures[over], figures[under])
    elif intervals := _intervals(key, a, b):
        speedup = ratio_of_intervals(
            (figures[over][0], intervals[over]), (figures[under][0], intervals[under])
        )
    else:
        return None
    means = [sum(side) / len(side) for side in figures]
    return Comparison(key=key, a=means[0], b=means[1], speedup=speedup)


def _intervals(key: str, a: Sequence[Result], b: Sequence[Result]) -> list[Interval] | None:
    """The intervals that came with one run of each side; None: not one run each, or none came."""
    if len(a) > 1 or len(b) > 1:
        return None
    pairs = [side[0].get("intervals", {}).get(key) for side in (a, b)]
    if not all(pair and pair[0] > 0 for pair in pairs):
        return None
    return [Interval(*pair) for pair in pairs]


def _is_above_zero(value: object) -> bool:
    return isinstance(value, int | float) and value > 0


def _notes(a: Sequence[Result], b: Sequence[Result]) -> Iterator[str]:
    if differing := _differing([a[0], b[0]]):
        yield f"the loads differ in {', '.join(differing)}"
    if len(a) == len(b) == 1:
        yield "one run of each: what moves from run to run is not in the intervals"
    if failed := sum(result.get("failed", 0) for result in (*a, *b)):
        yield f"{failed} requests failed; they are in no latency"


def _item(comparison: Comparison) -> dict[str, object]:
    interval = comparison.speedup.interval
    return {
        "a": comparison.a,
        "b": comparison.b,
        "speedup": comparison.speedup.value,
        "interval": [interval.low, interval.high],
        "verdict": comparison.verdict,
    }


def _table(
    path_a: Path,
    path_b: Path,
    a: Sequence[Result],
    b: Sequence[Result],
    comparisons: Sequence[Comparison],
) -> Iterator[str]:
    yield f"A: {path_a} ({len(a)} runs)" if len(a) > 1 else f"A: {path_a}"
    yield f"B: {path_b} ({len(b)} runs)" if len(b) > 1 else f"B: {path_b}"
    yield from (f"note: {note}" for note in _notes(a, b))
    yield ""
    for one in comparisons:
        yield f"{one.key:<28}{one.a:>12.2f}{one.b:>12.2f}  {one.sentence()}"
