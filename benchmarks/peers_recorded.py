"""A server that was measured on another machine, carried over to a run by llama.cpp's ratio.

vLLM's CPU build is large and installs on few machines. Where a run has none, its recorded figures
stand in: each is multiplied by what llama.cpp's server does in this run over what it did beside
vLLM, round by round. The row says that it was not run, and counts in the bars like any peer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

__all__ = ["NOTE", "SCALED", "VLLM", "with_recorded"]

Row = Mapping[str, Any]
Table = Mapping[str, float]

LLAMA_CPP = "llama.cpp"
VLLM = "vLLM"
SCALED = "bf16 (scaled, not run here)"
NOTE = (
    "vLLM was not run here. Its row is what vLLM 0.32's CPU build, tuned for two cores, did over "
    "HTTP on another machine of 2 cores with AVX-512 and AMX in November 2026, times llama.cpp's "
    "figure of this run over llama.cpp's figure there."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recorded:
    """One model on the other machine: figures by the names of `peers_http.http_figures`."""

    vllm: Table
    llama_cpp: Mapping[str, Table]
    """Scheme → the figures of its server."""


def _table(**by_ending: Mapping[int, float]) -> Table:
    endings = {"rate": "tokens/s", "ttft": "TTFT p50 ms", "itl": "ITL p99 ms"}
    return {
        f"http {count} {endings[name]}": value
        for name, values in by_ending.items()
        for count, value in values.items()
    }


RECORDED: Mapping[str, _Recorded] = {
    "M": _Recorded(
        vllm=_table(
            rate={1: 36, 8: 225, 32: 518},
            ttft={1: 56, 8: 282, 32: 600},
            itl={1: 37, 8: 44, 32: 76},  # the best of 76 to 107 at 32
        ),
        llama_cpp={
            "int8": _table(
                rate={1: 95, 8: 207, 32: 211},
                ttft={1: 88, 8: 585, 32: 3963},
                itl={1: 15, 8: 46, 32: 158},
            ),
            "int4": _table(
                rate={1: 120, 8: 207, 32: 209},
                ttft={1: 88, 8: 631, 32: 4047},
                itl={1: 14, 8: 51, 32: 169},
            ),
        },
    ),
    "L": _Recorded(
        vllm=_table(rate={1: 8.1, 8: 58, 32: 135}, ttft={1: 235, 8: 1574, 32: 4945}),
        llama_cpp={
            "int8": _table(rate={1: 16.9, 8: 50.6, 32: 64}, ttft={1: 539, 8: 4091, 32: 16257})
        },
    ),
}
"""By shape of `SHAPES`: 128 tokens in, 128 out, streamed, at 1, 8 and 32 requests at a time."""


def with_recorded(shape: str | None, rows: Sequence[Row]) -> list[Row]:
    """`rows`, and vLLM's recorded row if none of them is vLLM's and llama.cpp's server took part.

    Where llama.cpp took part with several schemes, the ratio is their geometric mean.
    """
    recorded = RECORDED.get(shape or "")
    servers = [row for row in rows if row["surface"] == "http" and row["figures"]]
    if recorded is None or any(row["engine"] == VLLM for row in servers):
        return list(rows)
    known = [
        (row["figures"], recorded.llama_cpp[row["scheme"]])
        for row in servers
        if row["engine"] == LLAMA_CPP and row["scheme"] in recorded.llama_cpp
    ]
    figures = {
        name: [value * ratio for ratio in _ratios(name, known)]
        for name, value in recorded.vllm.items()
    }
    if not any(figures.values()):
        return list(rows)
    return [*rows, _row(figures)]


def _ratios(name: str, known: Sequence[tuple[Mapping[str, Sequence[float]], Table]]) -> list[float]:
    """llama.cpp in this run over llama.cpp there, for each round that all its schemes ended."""
    logs = [
        [math.log(run / there[name]) for run in here.get(name, ())]
        for here, there in known
        if name in there
    ]
    return [math.exp(fmean(of_round)) for of_round in zip(*logs, strict=False)]


def _row(figures: Mapping[str, Sequence[float]]) -> Row:
    return {
        "surface": "http",
        "scheme": SCALED,
        "is_ours": False,
        "engine": VLLM,
        "weights": SCALED,
        "cache": "bf16",
        "versions": {},
        "figures": figures,
        "problem": None,
    }
