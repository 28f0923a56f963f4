from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from llmserve.benchmarks.arrivals import Ramp, Steps
from llmserve.benchmarks.cli_load_options import add_traffic_arguments
from llmserve.benchmarks.cli_trace import add_trace_arguments
from llmserve.benchmarks.traffic import Traffic, traffic_from
from llmserve.errors import ConfigError
from support.traces import azure_trace


def parse(*arguments: str) -> Traffic:
    parser = argparse.ArgumentParser()
    add_traffic_arguments(parser)
    add_trace_arguments(parser)
    return traffic_from(parser.parse_args(arguments))


def test_ramp_has_the_names_of_vllm() -> None:
    ramp = "--ramp-up-strategy linear --ramp-up-start-rps 1 --ramp-up-end-rps 9"
    traffic = parse(*ramp.split(), "--num-prompts", "50")
    assert traffic.request_rate == Ramp(strategy="linear", start=1.0, end=9.0)
    assert (traffic.num_prompts, traffic.is_open_loop) == (50, True)


def test_steps_say_how_many_requests() -> None:
    traffic = parse("--rate-steps", "2:30,0:5,8:10", "--max-concurrency", "4")
    assert traffic.request_rate == Steps(rates=(2.0, 0.0, 8.0), seconds=(30.0, 5.0, 10.0))
    assert (traffic.num_prompts, traffic.is_open_loop) == (140, True)
    assert str(traffic) == (
        "open loop: 2 requests/s for 30 s, then 0 requests/s for 5 s, then 8 requests/s for 10 s "
        "(Poisson), at most 4 at a time"
    )


def test_trace_says_how_many_requests_and_is_open(tmp_path: Path) -> None:
    path = azure_trace(tmp_path / "t.csv", [(float(n), 30, 4) for n in range(9)])
    traffic = parse("--trace", str(path), "--time-scale", "2", "--num-requests", "5")
    assert (traffic.num_prompts, traffic.is_open_loop) == (5, True)
    assert str(traffic) == "open loop: t.csv, times / 2, lengths x 1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--request-rate 2 --rate-steps 1:5", "give one of --request-rate, --rate-steps"),
        ("--ramp-up-strategy linear --ramp-up-start-rps 1", "needs --ramp-up-start-rps and"),
        ("--ramp-up-end-rps 1", "need --ramp-up-strategy"),
        ("--rate-steps 1:5 --num-prompts 3", "no --num-prompts"),
        ("--rate-steps 1", "takes RATE:SECONDS"),
        ("--rate-steps 1:a", "takes RATE:SECONDS"),
        ("--rate-steps 1:2:3", "takes RATE:SECONDS"),
        ("--trace x --num-prompts 3", "give --num-requests"),
        ("--trace x --burstiness 3", "--burstiness needs"),
        ("--time-scale 2", "give --trace FILE"),
        ("--length-scale 1/2", "give --trace FILE"),
        ("--start 3", "give --trace FILE"),
    ],
)
def test_options_without_effect_are_refused(arguments: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(*arguments.split())
