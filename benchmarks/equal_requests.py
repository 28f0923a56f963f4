"""Synthetic traffic for the simulator: requests of equal length, at given times or in a closed
loop, as `bench serve` sends them with `--random-input-len` and `--random-output-len`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .trace_formats import TraceRequest
from .traces import TraceSize

__all__ = ["ClosedLoop", "EqualRequests"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EqualRequests:
    """Implements `RecordedTraffic`."""

    arrivals_s: Sequence[float]
    """When each request is due, ascending."""
    input_len: int
    output_len: int

    @property
    def block_size(self) -> int | None:
        """They have no keys: no two have anything in common."""
        return None

    def __iter__(self) -> Iterator[TraceRequest]:
        for number, arrival_s in enumerate(self.arrivals_s, start=1):
            yield TraceRequest(
                line=number,
                arrival_s=float(arrival_s),
                input_len=self.input_len,
                output_len=self.output_len,
            )

    def size(self, block_size: int) -> TraceSize:
        """What they ask for, all together, in blocks of `block_size` tokens."""
        count, length = len(self.arrivals_s), self.input_len + self.output_len
        return TraceSize(
            num_requests=count,
            num_input_tokens=count * self.input_len,
            num_output_tokens=count * self.output_len,
            max_len=length,
            last_arrival_s=float(self.arrivals_s[-1]),
            num_blocks=count * -(-length // block_size),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosedLoop:
    """Clients that each send their next request when their last one has ended."""

    max_concurrency: int
    """How many of them."""
    num_requests: int
    """Of all together."""
    input_len: int
    output_len: int

    @property
    def requests(self) -> EqualRequests:
        """All of them, due at once."""
        return EqualRequests(
            arrivals_s=[0.0] * self.num_requests,
            input_len=self.input_len,
            output_len=self.output_len,
        )
