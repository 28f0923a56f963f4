"""What `llmserve bench serve` was asked to do, checked before anything is sent."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import orjson

from llmserve.errors import ConfigError

from .chat_sets import CHAT_SETS
from .client import CHAT_ENDPOINT
from .metrics import LATENCIES, parse_slos
from .multi_turn import MultiTurn, multi_turn_from
from .traffic import Traffic, traffic_from
from .workload import RandomLengths

__all__ = ["ServeOptions", "options_from"]

DEFAULT_LATENCIES = ("ttft", "tpot", "itl", "e2el")
OPEN_LOOP_LATENCIES = ("ttft_from_send", "e2el_from_send", "client_queue_time")
# Fields of a request that decide what is measured; they have options of their own.
OWN_FIELDS = frozenset({"model", "prompt", "messages", "stream", "stream_options", "n", "best_of"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """One load test. Made by `options_from`, which documents and checks the values."""

    base_url: str
    endpoint: str
    model: str | None
    """None: the first one that the server lists."""
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Mapping[str, object] = field(default_factory=dict)
    """Fields of each request beside prompt and length."""
    traffic: Traffic = field(default_factory=Traffic)
    multi_turn: MultiTurn | None = None
    """None: requests stand alone."""
    continuous_usage: bool = False
    """Whether to ask the server to count the tokens of each chunk."""
    num_warmups: int = 0
    dataset_name: str = "random"
    """`random`, `text` or one of `chat_sets.CHAT_SETS`."""
    dataset_path: Path | None = None
    lengths: RandomLengths = field(default_factory=RandomLengths)
    vocab_size: int | None = None
    seed: int = 0
    latencies: tuple[str, ...] = DEFAULT_LATENCIES
    percentiles: tuple[float, ...] = (50.0, 90.0, 99.0)
    slos_ms: Mapping[str, float] = field(default_factory=dict)
    ready_timeout_s: float = 0.0
    request_timeout_s: float = 600.0
    label: str | None = None
    save_result: bool = False
    save_detailed: bool = False
    result_dir: Path | None = None
    result_filename: str | None = None
    html: Path | None = None
    """Where the page for people is written; None: nowhere."""
    markdown: Path | None = None
    """The same for a report in Markdown."""

    @property
    def backend(self) -> str:
        """The kind of route, by the name it has in `vllm bench serve`."""
        return "openai-chat" if self.endpoint == CHAT_ENDPOINT else "openai"


def options_from(args: argparse.Namespace) -> ServeOptions:
    """The options behind the arguments of the command line.

    Raises:
        ConfigError: a value out of range, or an option that would have no effect.
    """
    _check_unused(args)
    traffic = traffic_from(args)
    extra = OPEN_LOOP_LATENCIES if traffic.is_open_loop else ()
    return ServeOptions(
        base_url=_base_url(args),
        endpoint=args.endpoint,
        model=args.model,
        headers=_headers(args.header),
        body=_body(args),
        traffic=traffic,
        num_warmups=_at_least("--num-warmups", args.num_warmups, 0),
        multi_turn=multi_turn_from(args),
        continuous_usage=args.continuous_usage,
        dataset_name=args.dataset_name,
        dataset_path=args.dataset_path,
        lengths=_lengths(args),
        vocab_size=_count("--vocab-size", args.vocab_size),
        seed=_at_least("--seed", args.seed, 0),
        latencies=tuple(dict.fromkeys((*_names(args.percentile_metrics), *extra))),
        percentiles=_percentiles(args.metric_percentiles),
        slos_ms=parse_slos(args.goodput),
        ready_timeout_s=_at_least("--ready-check-timeout-sec", args.ready_check_timeout_sec, 0),
        request_timeout_s=_above_zero("--request-timeout-sec", args.request_timeout_sec),
        label=args.label,
        save_result=args.save_result,
        save_detailed=args.save_detailed,
        result_dir=args.result_dir,
        result_filename=args.result_filename,
        html=args.html,
        markdown=args.markdown,
    )


def _check_unused(args: argparse.Namespace) -> None:
    """Refuse options that the others leave without effect."""
    is_random = args.dataset_name == "random"
    rules = [
        (
            is_random and args.dataset_path is not None,
            f"--dataset-path needs --dataset-name text, {', '.join(CHAT_SETS)}",
        ),
        (
            not is_random and args.dataset_path is None,
            f"--dataset-name {args.dataset_name} needs --dataset-path",
        ),
        *(
            (not is_random and value is not None, f"{name} needs --dataset-name random")
            for name, value in (
                ("--random-input-len", args.random_input_len),
                ("--random-range-ratio", args.random_range_ratio),
                ("--random-prefix-len", args.random_prefix_len),
                ("--vocab-size", args.vocab_size),
            )
        ),
        *(
            (args.trace is not None and value is not None, f"{name}: a trace says the lengths")
            for name, value in (
                ("--random-input-len", args.random_input_len),
                ("--random-output-len", args.random_output_len),
                ("--random-range-ratio", args.random_range_ratio),
                ("--random-prefix-len", args.random_prefix_len),
                ("--dataset-path", args.dataset_path),
            )
        ),
        (
            args.random_num_prefixes is not None and not args.random_prefix_len,
            "--random-num-prefixes needs --random-prefix-len",
        ),
        (args.save_detailed and not args.save_result, "--save-detailed needs --save-result"),
        (
            (args.result_dir or args.result_filename) and not args.save_result,
            "--result-dir and --result-filename need --save-result",
        ),
        (args.base_url and (args.host or args.port), "give --base-url, or --host and --port"),
    ]
    for is_broken, message in rules:
        if is_broken:
            raise ConfigError(message)


def _base_url(args: argparse.Namespace) -> str:
    if not args.base_url:
        host = args.host or "127.0.0.1"
        return f"http://{f'[{host}]' if ':' in host else host}:{args.port or 8000}"
    parts = urlsplit(args.base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--base-url must be like http://127.0.0.1:8000, got {args.base_url!r}")
    if parts.username or parts.password:
        raise ConfigError("--base-url must hold no password: use OPENAI_API_KEY or --header")
    url: str = args.base_url.rstrip("/")
    if url.endswith("/v1"):
        raise ConfigError(f"--base-url goes without /v1, as --endpoint has it: {url[:-3]}")
    return url


def _headers(given: Sequence[str]) -> dict[str, str]:
    headers = {}
    for item in given:
        name, separator, value = item.partition("=")
        if not separator or not name.strip() or not (name + value).isprintable():
            raise ConfigError("--header takes NAME=VALUE in printable characters")
        headers[name.strip()] = value.strip()
    key = os.environ.get("OPENAI_API_KEY")
    if key and "authorization" not in map(str.lower, headers):
        headers["Authorization"] = f"Bearer {key}"
    return headers


def _body(args: argparse.Namespace) -> dict[str, object]:
    """Sampling fields, then what `--extra-body` says."""
    is_random = args.dataset_name == "random"
    body: dict[str, object] = {}
    if args.temperature is not None:
        body["temperature"] = args.temperature
    if args.top_p is not None:
        body["top_p"] = args.top_p
    if is_random if args.ignore_eos is None else args.ignore_eos:
        body["ignore_eos"] = True
    if args.extra_body is not None:
        body |= _extra_body(args.extra_body)
    return body


def _extra_body(text: str) -> dict[str, object]:
    try:
        extra = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise ConfigError(f"--extra-body is not JSON: {error}") from error
    if not isinstance(extra, dict):
        raise ConfigError(f"--extra-body must be a JSON object, got {text[:80]}")
    if taken := sorted(OWN_FIELDS & extra.keys()):
        raise ConfigError(f"--extra-body must leave {', '.join(taken)} to the load test")
    return extra


def _lengths(args: argparse.Namespace) -> RandomLengths:
    given = {
        "input_len": args.random_input_len,
        "output_len": args.random_output_len,
        "range_ratio": args.random_range_ratio,
        "prefix_len": args.random_prefix_len,
        "num_prefixes": args.random_num_prefixes,
    }
    return RandomLengths(**{name: value for name, value in given.items() if value is not None})


def _names(text: str | None) -> tuple[str, ...]:
    names = tuple(text.split(",")) if text else DEFAULT_LATENCIES
    if unknown := sorted(set(names) - set(LATENCIES)):
        raise ConfigError(
            f"--percentile-metrics knows {', '.join(LATENCIES)}; got {', '.join(unknown)}"
        )
    return names


def _percentiles(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(0 <= value <= 100 for value in values):
        raise ConfigError(f"--metric-percentiles takes numbers from 0 to 100, got {text!r}")
    return values


def _at_least(name: str, value: int, least: int) -> int:
    if value < least:
        raise ConfigError(f"{name} must be at least {least}, got {value}")
    return value


def _count(name: str, value: int | None) -> int | None:
    return None if value is None else _at_least(name, value, 1)


def _above_zero(name: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise ConfigError(f"{name} must be above 0 seconds, got {value:g}")
    return value
