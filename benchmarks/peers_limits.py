"""Tables of the comparison about the machine's limits: its bandwidth, and a core that is lost.

Both stand beside the bars of peers_bars.py, and hold ours against a limit instead of a peer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .peers_bars import Row
from .peers_cells import shown_number, shown_range
from .statistics import mean_of_runs

__all__ = ["MIN_BANDWIDTH_SHARE", "MOST_BUSY_FALL", "bandwidth_table", "busy_table"]

MIN_BANDWIDTH_SHARE = 0.85
"""What one sequence of shape L should reach of the memory's rate."""
MOST_BUSY_FALL = 2.3
"""How many times ours may get slower when another process takes one core of two."""

_MEGA = 1e6
_DECODE_1 = "decode 1 tokens/s"


def bandwidth_table(document: Mapping[str, Any], rows: Sequence[Row]) -> Iterator[str]:
    """Of each row that tells what a step reads: the bytes of a token, and their share of what
    memory gave in the same round."""
    rates: Sequence[float] = document.get("memory_bytes_per_s", ())
    told = [row for row in rows if "weight_bytes" in row and row["figures"].get(_DECODE_1)]
    if not rates or not told:
        return
    context = document["input_len"] + document["decode_len"] // 2
    yield (
        "Bytes that one sequence's step reads, by the rate at which all cores read memory "
        f"({_shown([rate / 1e9 for rate in rates])} GB/s). Bar for shape L: "
        f"{MIN_BANDWIDTH_SHARE:.0%}; above 100 % part of the weights stayed in the cache."
    )
    yield ""
    yield "| engine | weights, cache | body and head, MB | cache, MB | GB/s | of memory's rate |"
    yield "|---|---|---|---|---|---|"
    for row in told:
        cache = context * row["token_bytes"]
        read = [(row["weight_bytes"] + cache) * rate for rate in row["figures"][_DECODE_1]]
        shares = [100 * got / rate for got, rate in zip(read, rates, strict=False)]
        yield (
            f"| {row['engine']} | {row['weights']}; {row['cache']} "
            f"| {row['weight_bytes'] / _MEGA:.1f} | {cache / _MEGA:.1f} "
            f"| {_shown([one / 1e9 for one in read])} | {_shown(shares)} % |"
        )
    yield ""


def busy_table(document: Mapping[str, Any], rows: Sequence[Row]) -> Iterator[str]:
    """How many times slower each row decodes while another process keeps one core busy."""
    counts: Sequence[int] = document.get("busy", ())
    if not counts:
        return
    yield (
        "How many times slower decoding is while another process keeps one core busy. Bar for "
        f"ours: at most {MOST_BUSY_FALL:g} on two cores."
    )
    yield ""
    titles = " | ".join(f"{count} sequence{'s' * (count > 1)}" for count in counts)
    yield f"| engine | weights, cache | {titles} |"
    yield f"|---|---|{'---|' * len(counts)}"
    for row in rows:
        cells = " | ".join(_shown(_falls(row, count)) for count in counts)
        yield f"| {row['engine']} | {row['weights']}; {row['cache']} | {cells} |"
    yield ""


def _falls(row: Row, count: int) -> list[float]:
    quiet = row["figures"].get(f"decode {count} tokens/s", ())
    busy = row["figures"].get(f"decode {count} busy tokens/s", ())
    return [alone / beside for alone, beside in zip(quiet, busy, strict=False)]


def _shown(runs: Sequence[float]) -> str:
    if not runs:
        return ""
    value, interval = mean_of_runs(runs)
    return f"{shown_number(value)}{shown_range(interval)}"
