from __future__ import annotations

import argparse
from fractions import Fraction
from pathlib import Path

import pytest

from llmserve.benchmarks.cli_simulate import add_arguments
from llmserve.benchmarks.simulation_options import SimulationOptions, simulation_options
from llmserve.errors import ConfigError
from support.traces import azure_trace, mooncake_trace

COSTS = ("--cost-model", "base_ms=1")


@pytest.fixture
def azure(tmp_path: Path) -> str:
    return str(azure_trace(tmp_path / "a.csv", [(0, 5, 1)]))


@pytest.fixture
def mooncake(tmp_path: Path) -> str:
    return str(mooncake_trace(tmp_path / "m.jsonl", [(0, 5, 1, [0])]))


def parse(*arguments: str) -> SimulationOptions:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return simulation_options(parser.parse_args(list(arguments)))


def test_defaults_are_those_of_the_engine(azure: str) -> None:
    options = parse("--trace", azure, *COSTS)
    assert (options.max_num_seqs, options.max_batched_tokens, options.policy) == (64, 512, "fcfs")
    assert (options.num_blocks, options.has_prefix_cache) == ((None,), True)
    assert options.slos_ms == {}
    assert options.fit_folder is None


def test_block_size_is_the_traces_where_it_names_blocks(azure: str, mooncake: str) -> None:
    assert parse("--trace", azure, *COSTS).block_size == 16
    assert parse("--trace", mooncake, *COSTS).block_size == 512
    assert parse("--trace", mooncake, *COSTS, "--length-scale", "1/32").block_size == 16
    assert parse("--trace", mooncake, *COSTS, "--block-size", "64").block_size == 64


def test_trace_is_scaled_as_asked(azure: str) -> None:
    arguments = (
        "--time-scale",
        "3",
        "--length-scale",
        "0.1",
        "--num-requests",
        "9",
        "--start",
        "4",
    )
    trace = parse("--trace", azure, *COSTS, *arguments).trace
    assert trace is not None
    assert trace.options.length_scale == Fraction(1, 10)
    assert (trace.options.time_scale, trace.options.num_requests) == (3.0, 9)
    assert trace.options.start_s == 4.0


@pytest.mark.parametrize(
    ("arguments", "num_blocks"),
    [
        (["--kv-cache-blocks", "70"], (70,)),
        (["--kv-cache-blocks", "unbounded"], (None,)),
        (["--sweep-cache", "3,unbounded,5"], (3, None, 5)),
    ],
)
def test_cache_sizes(azure: str, arguments: list[str], num_blocks: tuple[int | None, ...]) -> None:
    assert parse("--trace", azure, *COSTS, *arguments).num_blocks == num_blocks


def test_cost_model_is_text_a_file_or_a_fit(azure: str, tmp_path: Path) -> None:
    assert parse("--trace", azure, "--cost-model", "token_us=2").cost_model == "token_us=2"
    assert parse("--trace", azure, "--cost-model", "c.json").cost_model == Path("c.json")
    fit = parse("--cost-model", "fit:run/model", "--save-cost-model", "c.json", "--device", "cuda")
    assert (fit.fit_folder, fit.save_cost_model) == (Path("run/model"), Path("c.json"))
    assert (fit.device, fit.trace) == ("cuda", None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kv-cache-blocks", "0"], "--kv-cache-blocks takes whole numbers above 0 or unbounded"),
        (["--kv-cache-blocks", "3,4"], "--kv-cache-blocks takes"),
        (["--sweep-cache", "3,,4"], "--sweep-cache takes"),
        (["--sweep-cache", "3", "--kv-cache-blocks", "4"], "give --kv-cache-blocks or"),
        (["--block-size", "0"], "--block-size must be at least 1"),
        (["--max-num-seqs", "0"], "--max-num-seqs must be at least 1"),
        (["--max-num-batched-tokens", "-1"], "--max-num-batched-tokens must be at least 1"),
        (["--goodput", "itl:5"], "--goodput takes NAME:MILLISECONDS"),
        (["--length-scale", "half"], "--length-scale takes a number like 0.1 or 1/16"),
        (["--length-scale", "1/0"], "--length-scale takes a number"),
        (["--time-scale", "0"], "the time scale must be above 0"),
        (["--scheduling-policy", "fair"], "neither priorities nor tenants"),
        (["--save-cost-model", "c.json"], "--save-cost-model needs --cost-model fit:"),
        (["--device", "cuda"], "--device needs --cost-model fit:"),
        (["--dtype", "float32"], "--dtype needs --cost-model fit:"),
    ],
)
def test_option_that_cannot_be_used_is_refused(
    azure: str, arguments: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        parse("--trace", azure, *COSTS, *arguments)


def test_block_size_that_does_not_divide_the_named_one_is_refused(mooncake: str) -> None:
    with pytest.raises(ConfigError, match="blocks of 512 tokens: --block-size must divide that"):
        parse("--trace", mooncake, *COSTS, "--block-size", "48")


def test_trace_must_be_given_unless_a_fit_is_saved() -> None:
    with pytest.raises(ConfigError, match="give --trace FILE"):
        parse(*COSTS)
    with pytest.raises(ConfigError, match="give --trace FILE"):
        parse("--cost-model", "fit:run/model")
