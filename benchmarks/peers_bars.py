"""The bars of the comparison with other programs, and what a run says of each.

A bar is how many times better ours has to be: more tokens a second, or less latency. The ratio is
taken within each round, so that what changes from round to round meets both sides; its 95 %
interval comes from the rounds. The peer compared with is the one that is best over all rounds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .statistics import Interval, mean_of_runs

__all__ = ["BARS", "Bar", "Verdict", "verdicts"]

Row = Mapping[str, Any]

LLAMA_CPP = "llama.cpp"
BATCHED = ("OpenVINO GenAI", "transformers")
"""What 8 and 32 sequences in process are held against: the first of them that took part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One aim."""

    figure: str
    """Its name in the rows."""
    surface: str
    """`process` or `http`."""
    times: float
    """How many times better ours has to be."""
    schemes: tuple[str, ...] = ("int4", "int8")
    """Of ours, each of which has to reach it."""
    engines: tuple[str, ...] = ()
    """Peers that count; empty: all of them."""
    is_same_scheme: bool = False
    """Whether only a peer's weights of the same scheme count."""

    @property
    def is_latency(self) -> bool:
        """Whether less is better."""
        return self.figure.endswith("ms")

    @property
    def where(self) -> str:
        """`in process` or `over HTTP`."""
        return "in process" if self.surface == "process" else "over HTTP"

    @property
    def what(self) -> str:
        """The figure without its surface."""
        return self.figure.removeprefix("http ")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a run says of a bar, for one of our schemes."""

    bar: Bar
    scheme: str
    ours: float
    """The figure, the mean of the rounds."""
    peer: str
    """Best peer."""
    theirs: float
    ratio: float
    """How many times better ours is."""
    interval: Interval | None
    """None: one round."""

    @property
    def says(self) -> str:
        """`reached`, by how much it was missed, or that the rounds do not decide."""
        if self.ratio < self.bar.times:
            return f"missed by {1 - self.ratio / self.bar.times:.0%}"
        if self.interval is None:
            return "reached (one round)"
        return "reached" if self.interval.low >= self.bar.times else "reached, not for sure"


def _http(counts: Mapping[int, float]) -> Iterator[Bar]:
    for count, times in counts.items():
        yield Bar(figure=f"http {count} tokens/s", surface="http", times=times)
    for count in counts:
        for what in ("TTFT p50 ms", "ITL p99 ms"):
            yield Bar(figure=f"http {count} {what}", surface="http", times=1.0)


def _process(figure: str, times: float, **limits: Any) -> Bar:
    return Bar(figure=f"{figure} tokens/s", surface="process", times=times, **limits)


BARS: Mapping[str, Sequence[Bar]] = {
    "S": (_process("decode 1", 1.0, engines=(LLAMA_CPP,)),),
    "M": (
        _process("prefill 512", 4.0, engines=(LLAMA_CPP,)),
        _process("prefill 512", 1.5),
        _process("decode 1", 1.5, schemes=("int4",)),
        _process("decode 8", 4.0, engines=BATCHED),
        _process("decode 32", 4.0, engines=BATCHED),
        *_http({1: 1.8, 8: 4.0, 32: 3.5}),
    ),
    "L": (
        _process("prefill 512", 4.0, engines=(LLAMA_CPP,)),
        _process("prefill 512", 1.5),
        _process("decode 1", 1.0, engines=(LLAMA_CPP,), is_same_scheme=True),
        _process("decode 8", 3.0, engines=BATCHED),
        _process("decode 32", 3.0, engines=BATCHED),
        *_http({1: 1.5, 8: 3.0, 32: 3.0}),
    ),
}
"""By shape of `SHAPES`."""


def verdicts(shape: str | None, rows: Sequence[Row]) -> list[Verdict]:
    """Of every bar of the shape that the rows say something of, for each of our schemes."""
    found = []
    for bar in BARS.get(shape or "", ()):
        for row in rows:
            if row["is_ours"] and row["surface"] == bar.surface and row["scheme"] in bar.schemes:
                verdict = _verdict(bar, row, rows)
                found += [verdict] if verdict is not None else []
    return found


def best_peer(row: Row, figure: str, rows: Sequence[Row], bar: Bar | None = None) -> Row | None:
    """The peer with the best mean of `figure` beside `row`, of those that `bar` lets count."""
    peers = [
        peer
        for peer in rows
        if not peer["is_ours"]
        and peer["surface"] == row["surface"]
        and peer["figures"].get(figure)
        and (bar is None or not bar.is_same_scheme or peer["scheme"] == row["scheme"])
    ]
    if bar is not None and bar.engines:
        engine = next((e for e in bar.engines if any(p["engine"] == e for p in peers)), None)
        peers = [peer for peer in peers if peer["engine"] == engine]
    if not peers:
        return None
    best = min if figure.endswith("ms") else max
    return best(peers, key=lambda peer: mean_of_runs(peer["figures"][figure])[0])


def ratio_to(row: Row, peer: Row, figure: str) -> tuple[float, Interval | None]:
    """How many times better `row` is than `peer`, over the rounds that both took part in."""
    pairs = zip(row["figures"][figure], peer["figures"][figure], strict=False)
    if figure.endswith("ms"):
        return mean_of_runs([theirs / ours for ours, theirs in pairs])
    return mean_of_runs([ours / theirs for ours, theirs in pairs])


def _verdict(bar: Bar, row: Row, rows: Sequence[Row]) -> Verdict | None:
    peer = best_peer(row, bar.figure, rows, bar)
    if peer is None or not row["figures"].get(bar.figure):
        return None
    ratio, interval = ratio_to(row, peer, bar.figure)
    return Verdict(
        bar=bar,
        scheme=row["scheme"],
        ours=mean_of_runs(row["figures"][bar.figure])[0],
        peer=f"{peer['engine']} {peer['scheme']}",
        theirs=mean_of_runs(peer["figures"][bar.figure])[0],
        ratio=ratio,
        interval=interval,
    )
