"""Which part of a trace is used, and what scaling changes and keeps."""

from __future__ import annotations

from fractions import Fraction
from itertools import islice
from pathlib import Path

import pytest

from llmserve.benchmarks.traces import Trace, TraceOptions, open_trace
from llmserve.errors import ConfigError, DataError
from support.traces import azure_trace, mooncake_trace


def opened(path: Path, **options: object) -> Trace:
    return open_trace(path, TraceOptions(**options))  # type: ignore[arg-type]


@pytest.fixture
def azure(tmp_path: Path) -> Path:
    return azure_trace(tmp_path / "a.csv", [(0, 100, 10), (4, 7, 1), (10, 33, 5), (11, 64, 70)])


def test_whole_trace_as_it_is(azure: Path) -> None:
    requests = list(opened(azure))
    assert [(r.arrival_s, r.input_len, r.output_len) for r in requests] == [
        (0, 100, 10),
        (4, 7, 1),
        (10, 33, 5),
        (11, 64, 70),
    ]


def test_times_are_divided_and_lengths_rounded_up(azure: Path) -> None:
    requests = list(opened(azure, time_scale=2.0, length_scale=Fraction("0.1")))
    assert [r.arrival_s for r in requests] == [0, 2, 5, 5.5]
    # 100 * 0.1 is 10 and not 11: the scale is kept as a fraction.
    assert [(r.input_len, r.output_len) for r in requests] == [(10, 1), (1, 1), (4, 1), (7, 7)]


def test_window_is_of_the_traces_own_time(azure: Path) -> None:
    requests = list(opened(azure, start_s=4.0, num_requests=2, time_scale=3.0))
    assert [(r.line, r.arrival_s) for r in requests] == [(3, 0.0), (4, 2.0)]


def test_trace_is_read_no_further_than_asked(tmp_path: Path) -> None:
    path = azure_trace(tmp_path / "a.csv", [(0, 1, 1), (1, 1, 1)])
    path.write_text(path.read_text() + "\nnonsense")
    assert len(list(opened(path, num_requests=2))) == 2
    assert len(list(islice(opened(path), 2))) == 2
    with pytest.raises(DataError, match="line 4"):
        list(opened(path))


def test_each_reading_begins_anew(azure: Path) -> None:
    trace = opened(azure)
    assert list(trace) == list(trace)


def test_size_adds_up_what_is_asked_for(azure: Path) -> None:
    size = opened(azure, time_scale=2.0).size(16)
    assert size.num_requests == 4
    assert (size.num_input_tokens, size.num_output_tokens) == (204, 86)
    assert (size.max_len, size.last_arrival_s) == (134, 5.5)
    assert size.num_blocks == 7 + 1 + 3 + 9  # ceil of 110, 8, 38 and 134 over 16


def test_one_of_several_requests_is_taken_before_they_are_counted(azure: Path) -> None:
    whole = list(opened(azure))
    assert list(opened(azure, every=2)) == whole[::2]
    assert list(opened(azure, every=2, num_requests=1)) == whole[:1]
    assert list(opened(azure, every=3)) == whole[::3]


def test_trace_without_a_request_is_refused(azure: Path) -> None:
    with pytest.raises(DataError, match="no request from 12 s on"):
        opened(azure, start_s=12.0).size(16)


@pytest.mark.parametrize("scale", ["1/512", "1/16", "0.25", "1", "3"])
@pytest.mark.parametrize("input_len", [1, 511, 512, 513, 1024, 5000])
def test_scaled_keys_still_name_one_block_each(tmp_path: Path, scale: str, input_len: int) -> None:
    keys = list(range(-(-input_len // 512)))
    path = mooncake_trace(tmp_path / "m.jsonl", [(0, input_len, 3, keys)])
    trace = opened(path, length_scale=Fraction(scale))
    (request,) = trace
    assert trace.block_size == 512 * Fraction(scale)
    assert request.block_keys == keys
    assert -(-request.input_len // trace.block_size) == len(keys)


@pytest.mark.parametrize("scale", ["0.1", "1/3", "1/1024"])
def test_scale_that_cuts_a_named_block_is_refused(tmp_path: Path, scale: str) -> None:
    path = mooncake_trace(tmp_path / "m.jsonl", [(0, 5, 3, [0])])
    with pytest.raises(ConfigError, match="leaves a whole number"):
        opened(path, length_scale=Fraction(scale))


def test_trace_without_keys_has_no_block_size(azure: Path) -> None:
    assert opened(azure, length_scale=Fraction(1, 3)).block_size is None


@pytest.mark.parametrize(
    "options",
    [
        {"time_scale": 0.0},
        {"time_scale": float("nan")},
        {"time_scale": float("inf")},
        {"length_scale": Fraction(0)},
        {"length_scale": Fraction(-1, 2)},
        {"num_requests": 0},
        {"every": 0},
        {"start_s": -1.0},
        {"start_s": float("nan")},
    ],
)
def test_option_out_of_range_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="must be"):
        TraceOptions(**options)  # type: ignore[arg-type]
