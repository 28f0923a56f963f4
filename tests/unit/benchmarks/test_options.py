from __future__ import annotations

import argparse
import math
from pathlib import Path

import pytest

from llmserve.benchmarks.cli_bench import add_arguments
from llmserve.benchmarks.options import ServeOptions, options_from
from llmserve.errors import ConfigError


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def parse(*arguments: str) -> ServeOptions:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return options_from(parser.parse_args(["serve", *arguments]))


def test_defaults_are_those_of_the_documents() -> None:
    options = parse()
    assert options.base_url == "http://127.0.0.1:8000"
    assert options.endpoint == "/v1/completions"
    traffic = options.traffic
    assert (traffic.num_prompts, options.num_warmups, options.seed) == (1000, 0, 0)
    assert traffic.request_rate == math.inf
    assert (options.lengths.input_len, options.lengths.output_len) == (128, 128)
    assert options.percentiles == (50.0, 90.0, 99.0)


@pytest.mark.parametrize(
    ("arguments", "is_open_loop"),
    [
        ([], True),
        (["--max-concurrency", "4"], False),
        (["--request-rate", "2"], True),
        (["--request-rate", "2", "--max-concurrency", "4"], True),
    ],
)
def test_open_loop_reports_latency_from_the_send_too(
    arguments: list[str], is_open_loop: bool
) -> None:
    options = parse(*arguments)
    assert options.traffic.is_open_loop is is_open_loop
    from_send = ("ttft_from_send", "e2el_from_send", "client_queue_time")
    assert options.latencies[4:] == (from_send if is_open_loop else ())


@pytest.mark.parametrize(
    ("arguments", "url"),
    [
        (["--port", "9"], "http://127.0.0.1:9"),
        (["--host", "gpu7"], "http://gpu7:8000"),
        (["--host", "::1"], "http://[::1]:8000"),
        (["--base-url", "https://host/path/"], "https://host/path"),
    ],
)
def test_address_of_the_server(arguments: list[str], url: str) -> None:
    assert parse(*arguments).base_url == url


def test_end_tokens_are_ignored_for_random_prompts_only(tmp_path: Path) -> None:
    text = ["--dataset-name", "text", "--dataset-path", str(tmp_path)]
    assert parse().body == {"ignore_eos": True}
    assert parse("--no-ignore-eos").body == {}
    assert parse(*text).body == {}
    assert parse(*text, "--ignore-eos").body == {"ignore_eos": True}


def test_sampling_and_extra_fields_reach_the_body() -> None:
    extra = '{"top_k": 5, "temperature": 0.5}'
    options = parse("--temperature", "0", "--top-p", "0.9", "--extra-body", extra)
    assert options.body == {"temperature": 0.5, "top_p": 0.9, "ignore_eos": True, "top_k": 5}


def test_key_comes_from_the_environment_and_headers_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert parse().headers == {"Authorization": "Bearer secret"}
    options = parse("--header", "authorization=Basic x=", "x-tenant = 7")
    assert options.headers == {"authorization": "Basic x=", "x-tenant": "7"}


def test_lengths_have_short_names_too() -> None:
    options = parse("--input-len", "5", "--output-len", "6", "--random-range-ratio", "0.5")
    lengths = options.lengths
    assert (lengths.prefix_len, lengths.num_prefixes) == (0, 1)
    assert (lengths.input_len, lengths.output_len, lengths.range_ratio) == (5, 6, 0.5)


def test_objectives_are_milliseconds_by_name() -> None:
    assert parse("--goodput", "ttft:200", "e2el:1e3").slos_ms == {"ttft": 200.0, "e2el": 1000.0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--num-prompts 0", "--num-prompts must be at least 1"),
        ("--num-warmups -1", "--num-warmups must be at least 0"),
        ("--max-concurrency 0", "--max-concurrency must be at least 1"),
        ("--vocab-size 0", "--vocab-size must be at least 1"),
        ("--seed -1", "--seed must be at least 0"),
        ("--request-timeout-sec 0", "above 0 seconds"),
        ("--request-timeout-sec nan", "above 0 seconds"),
        ("--ready-check-timeout-sec -1", "at least 0"),
        ("--input-len 0", "at least 1 token"),
        ("--burstiness 2", "finite --request-rate"),
        ("--dataset-name text", "needs --dataset-path"),
        ("--dataset-path x", "--dataset-name text"),
        ("--dataset-name text --dataset-path x --input-len 3", "--dataset-name random"),
        ("--dataset-name text --dataset-path x --vocab-size 3", "--dataset-name random"),
        ("--dataset-name text --dataset-path x --random-range-ratio 0", "--dataset-name random"),
        ("--dataset-name text --dataset-path x --random-prefix-len 3", "--dataset-name random"),
        ("--random-num-prefixes 3", "needs --random-prefix-len"),
        ("--random-prefix-len -1", "at least 1 prefix of at least 0 tokens"),
        ("--trace x --input-len 3", "a trace says the lengths"),
        ("--save-detailed", "needs --save-result"),
        ("--result-dir x", "need --save-result"),
        ("--result-filename x", "need --save-result"),
        ("--base-url http://a --port 1", "or --host and --port"),
        ("--base-url localhost:8000", "like http://"),
        ("--base-url http://a:8000/v1", "without /v1"),
        ("--base-url http://me:pw@a", "no password"),
        ("--header novalue", "NAME=VALUE"),
        ("--extra-body {", "not JSON"),
        ("--extra-body []", "JSON object"),
        ("--extra-body {\"stream\":false,\"n\":2}", "must leave n, stream"),
        ("--percentile-metrics ttft,speed", "got speed"),
        ("--metric-percentiles 50,101", "from 0 to 100"),
        ("--metric-percentiles p50", "from 0 to 100"),
        ("--goodput itl:5", "got 'itl:5'"),
        ("--goodput ttft", "got 'ttft'"),
        ("--goodput ttft:-1", "got 'ttft:-1'"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused(arguments: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(*arguments.split())


def test_header_with_a_line_break_is_refused() -> None:
    with pytest.raises(ConfigError, match="printable"):
        parse("--header", "x=1\r\ny=2")


CHAT = ("--endpoint", "/v1/chat/completions", "--max-concurrency", "2")


def test_conversations_have_their_options(tmp_path: Path) -> None:
    talk = parse(*CHAT, "--multi-turn").multi_turn
    assert (talk.num_turns, talk.think_time_s) == (3, 0.0)
    path = str(tmp_path / "q.jsonl")
    named = ("--dataset-name", "mt-bench", "--dataset-path", path)
    talk = parse(*CHAT, *named, "--multi-turn", "--think-time", "2").multi_turn
    assert (talk.num_turns, talk.think_time_s) == (None, 2.0)
    assert parse(*CHAT, *named).multi_turn is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--num-turns", "2"), "need --multi-turn"),
        (("--multi-turn", "--max-concurrency", "2"), "needs --endpoint"),
        (("--multi-turn", *CHAT[:2]), "needs --max-concurrency"),
        ((*CHAT, "--multi-turn", "--request-rate", "3"), "is a closed loop"),
        ((*CHAT, "--multi-turn", "--num-turns", "0"), "at least 1"),
        ((*CHAT, "--multi-turn", "--think-time", "-1"), "at least 0"),
        (
            (*CHAT, "--multi-turn", "--dataset-name", "text", "--dataset-path", "p"),
            "--multi-turn needs --dataset-name random",
        ),
    ],
)
def test_conversations_that_cannot_be_are_refused(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(*arguments)
