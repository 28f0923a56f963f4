"""Recorded traffic to be repeated: which part of a trace, how fast, and how long its requests.

A `Trace` is read anew from its file each time it is iterated, one line at a time, so that a trace
of any length takes the memory of one request.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import islice
from pathlib import Path

from llmserve.errors import ConfigError, DataError

from .trace_formats import (
    MOONCAKE_BLOCK_SIZE,
    TraceFormat,
    TraceRequest,
    detect_format,
    read_requests,
)

__all__ = ["Trace", "TraceOptions", "TraceRequest", "TraceSize", "open_trace"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceOptions:
    """What of a trace is used, and how it is stretched."""

    time_scale: float = 1.0
    """Times are divided by it: 2 is twice as fast."""
    length_scale: Fraction = Fraction(1)
    """Lengths are multiplied by it and rounded up, so that none becomes 0."""
    num_requests: int | None = None
    """Most requests; None: all from `start_s` on."""
    start_s: float = 0.0
    """Requests before this time of the trace are passed over; times count from it."""
    every: int = 1
    """Of N requests one: the same ups and downs at a lower rate."""

    def __post_init__(self) -> None:
        if not 0 < self.time_scale < math.inf:
            raise ConfigError(f"the time scale must be above 0, got {self.time_scale:g}")
        if self.length_scale <= 0:
            raise ConfigError(f"the length scale must be above 0, got {self.length_scale}")
        if self.num_requests is not None and self.num_requests < 1:
            raise ConfigError(f"the number of requests must be at least 1, got {self.num_requests}")
        if self.every < 1:
            raise ConfigError(
                f"of how many requests one is taken must be at least 1, got {self.every}"
            )
        if not 0 <= self.start_s < math.inf:
            raise ConfigError(f"the start must be at least 0 seconds, got {self.start_s:g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceSize:
    """How much a trace asks for, all requests together."""

    num_requests: int
    num_input_tokens: int
    num_output_tokens: int
    max_len: int
    """Tokens of the longest prompt with its answer."""
    last_arrival_s: float
    num_blocks: int
    """KV blocks if nothing was shared and nothing ever given back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """The requests of a file, scaled. Made by `open_trace`, which has checked what can be."""

    path: Path
    format: TraceFormat
    options: TraceOptions
    block_size: int | None
    """Tokens behind one of the trace's block keys, scaled; None: it has no keys."""

    def __str__(self) -> str:
        """Where it is read from."""
        return str(self.path)

    def __iter__(self) -> Iterator[TraceRequest]:
        """Requests in order of arrival. Raises `DataError` at a line that cannot be used."""
        options = self.options
        requests = read_requests(self.path, self.format)
        late = (request for request in requests if request.arrival_s >= options.start_s)
        thinned = islice(late, 0, None, options.every)
        return map(self._scaled, islice(thinned, options.num_requests))

    def size(self, block_size: int) -> TraceSize:
        """Read the whole trace once and add up what it asks for, in blocks of `block_size`.

        Raises:
            DataError: a line cannot be used, or no request is left.
        """
        count = inputs = outputs = longest = blocks = 0
        arrival_s = 0.0
        for request in self:
            length = request.input_len + request.output_len
            count, arrival_s = count + 1, request.arrival_s
            inputs, outputs = inputs + request.input_len, outputs + request.output_len
            longest, blocks = max(longest, length), blocks - (-length // block_size)
        if not count:
            raise DataError(f"{self.path} holds no request from {self.options.start_s:g} s on")
        return TraceSize(
            num_requests=count,
            num_input_tokens=inputs,
            num_output_tokens=outputs,
            max_len=longest,
            last_arrival_s=arrival_s,
            num_blocks=blocks,
        )

    def _scaled(self, request: TraceRequest) -> TraceRequest:
        scale = self.options.length_scale
        return replace(
            request,
            arrival_s=(request.arrival_s - self.options.start_s) / self.options.time_scale,
            input_len=math.ceil(request.input_len * scale),
            output_len=math.ceil(request.output_len * scale),
        )


def open_trace(
    path: Path, options: TraceOptions, *, trace_format: TraceFormat | None = None
) -> Trace:
    """A trace of the format given, or that its first line shows.

    Where a trace names its blocks, these shrink with the prompts: a key still names one block, and
    the share of repeated blocks stays what it was. So the scaled block must be whole.

    Raises:
        DataError: the file cannot be read, or begins like no trace.
        ConfigError: the length scale leaves no whole number of tokens in a block.
    """
    found = trace_format or detect_format(path)
    if found != "mooncake":
        return Trace(path=path, format=found, options=options, block_size=None)
    block_size = MOONCAKE_BLOCK_SIZE * options.length_scale
    if block_size.denominator != 1:
        raise ConfigError(
            f"the trace names blocks of {MOONCAKE_BLOCK_SIZE} tokens; times {options.length_scale} "
            f"they hold {float(block_size):g}: take a length scale that leaves a whole number, "
            "like 1/16"
        )
    return Trace(path=path, format=found, options=options, block_size=int(block_size))
