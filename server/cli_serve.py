"""`llmserve serve`: options, what is printed at the start, and the server's own log."""

from __future__ import annotations

import argparse
import logging
import re
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING

from llmserve.console import console
from llmserve.errors import ConfigError
from llmserve.limits import Limits

if TYPE_CHECKING:
    from .service import Service
    from .settings import ServerSettings

__all__ = ["add_arguments", "parse_size", "run"]

_EXAMPLES = """\
examples:
  llmserve serve run/model-int8
  llmserve serve run/model --port 0 --limit drain_s=5
  LLMSERVE_API_KEY=a-long-secret llmserve serve run/model --host 0.0.0.0

The page is at the address itself, OpenAI's API under /v1. Ctrl-C ends the server when the
requests under way have ended; a second one ends it at once.
"""

_SIZE = re.compile(r"([0-9]{1,15})([KMG]?)(?:i?B)?", re.IGNORECASE)
_FACTORS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_LOG_LEVELS = ("debug", "info", "warning", "error")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's arguments."""
    parser.description = "Serve a model over HTTP: OpenAI's API, a page to try it, metrics."
    parser.epilog = _EXAMPLES
    parser.add_argument("model", nargs="?", metavar="MODEL", help="the model folder")
    _add_network_arguments(parser.add_argument_group("network"))
    _add_model_arguments(parser.add_argument_group("model"))
    _add_access_arguments(parser.add_argument_group("access"))
    _add_limit_arguments(parser.add_argument_group("limits and logs"))


def _add_network_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)"
    )
    group.add_argument(
        "--port", type=int, default=8000, help="port to listen on; 0: any free one (default: 8000)"
    )
    group.add_argument(
        "--allowed-hosts", nargs="+", default=[], metavar="NAME",
        help="names the Host header may have (default: on loopback its own, else any)",
    )  # fmt: skip
    group.add_argument(
        "--allowed-origins", nargs="+", default=[], metavar="ORIGIN",
        help="origins whose pages may call, as https://example.org (default: none)",
    )  # fmt: skip
    group.add_argument(
        "--http-parser", choices=("auto", "httptools", "h11"), default="auto",
        help="HTTP/1.1 parser (default: auto, httptools where installed)",
    )  # fmt: skip


def _add_model_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--served-model-name", nargs="+", default=[], metavar="NAME",
        help="names for the model in requests, the first in replies (default: the folder's name)",
    )  # fmt: skip
    # `fake`, and `fake:SECONDS` a step, is for tests: it answers without a model.
    group.add_argument("--runner", default="auto", help="auto or torch (default: auto)")
    group.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"),
        help="type of the arithmetic (default: the folder's)",
    )  # fmt: skip
    group.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    group.add_argument("--threads", type=int, help="threads for one step (default: all cores)")
    group.add_argument(
        "--max-model-len", type=int, metavar="TOKENS",
        help="longest prompt and answer together (default: the model's context)",
    )  # fmt: skip
    group.add_argument(
        "--max-num-seqs", type=int, default=64, metavar="COUNT",
        help="most sequences in one step (default: 64)",
    )  # fmt: skip
    group.add_argument(
        "--max-num-batched-tokens", type=int, default=512, metavar="TOKENS",
        help="most tokens in one step (default: 512)",
    )  # fmt: skip
    group.add_argument(
        "--kv-cache-memory", type=parse_size, default="256M", metavar="SIZE",
        help="memory for the KV cache in bytes, or with K, M or G (default: 256M)",
    )  # fmt: skip
    group.add_argument(
        "--chat-template", type=Path, metavar="FILE",
        help="Jinja template for chat (default: the folder's)",
    )  # fmt: skip


def _add_access_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--api-key-file", type=Path, metavar="FILE",
        help="keys for inference, one a line; the variable LLMSERVE_API_KEY holds one more",
    )  # fmt: skip
    group.add_argument(
        "--metrics-key-file", type=Path, metavar="FILE", help="keys for /metrics, one a line"
    )
    group.add_argument(
        "--admin-key-file", type=Path, metavar="FILE", help="keys for every route, one a line"
    )
    group.add_argument(
        "--allow-unauthenticated", action="store_true",
        help="serve other machines without keys (default: refused)",
    )  # fmt: skip


def _add_limit_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--limit", action="append", default=[], metavar="NAME=VALUE",
        help="change one limit; repeatable (--show-limits lists them)",
    )  # fmt: skip
    group.add_argument("--show-limits", action="store_true", help="print the limits and exit")
    group.add_argument(
        "--ignore-unknown-fields", action="store_true",
        help="skip request fields this server does not know (default: 400)",
    )  # fmt: skip
    group.add_argument(
        "--log-level", choices=_LOG_LEVELS, default="info", help="least severity (default: info)"
    )


def run(args: argparse.Namespace) -> int:
    """Serve until told to end."""
    limits = parse_limits(args.limit)
    if args.show_limits:
        for name, value in asdict(limits).items():
            print(f"{name}={value}")
        return 0
    if args.model is None:
        raise ConfigError("no model was given: llmserve serve MODEL")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("llmserve").setLevel(args.log_level.upper())
    from .lifecycle import serve

    return serve(_settings(args, limits), announce)


def parse_size(text: str) -> int:
    """Bytes from `268435456`, `256M` or `1GiB`; factors are powers of 1024."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write bytes, or K, M, G after them")
    return int(match[1]) * _FACTORS[match[2].upper()]


def parse_limits(assignments: list[str]) -> Limits:
    """Limits with some values changed, each `name=value`.

    Raises `ConfigError` for an unknown name or a value that is no positive number.
    """
    types = {field.name: float if field.type == "float" else int for field in fields(Limits)}
    values: dict[str, int | float] = {}
    for assignment in assignments:
        name, _, text = assignment.partition("=")
        if name not in types:
            raise ConfigError(f"unknown limit {name!r}; known: {', '.join(types)}")
        try:
            values[name] = types[name](text)
        except ValueError as error:
            kind = "number" if types[name] is float else "whole number"
            raise ConfigError(f"limit {name} takes a {kind}, got {text!r}") from error
    return Limits(**values)  # type: ignore[arg-type]


def _settings(args: argparse.Namespace, limits: Limits) -> ServerSettings:
    from .messages import EngineSettings
    from .settings import ServerSettings, load_keys

    runner, _, step_s = args.runner.partition(":")
    return ServerSettings(
        engine=EngineSettings(
            model=args.model,
            runner=runner,
            dtype=args.dtype,
            device=args.device,
            threads=args.threads,
            max_seq_len=args.max_model_len,
            max_num_seqs=args.max_num_seqs,
            max_batched_tokens=args.max_num_batched_tokens,
            cache_bytes=args.kv_cache_memory,
            fake_step_s=float(step_s or 0.0),
        ),
        host=args.host,
        port=args.port,
        served_model_names=tuple(args.served_model_name),
        chat_template=args.chat_template,
        limits=limits,
        keys=load_keys(
            user_file=args.api_key_file,
            metrics_file=args.metrics_key_file,
            admin_file=args.admin_key_file,
        ),
        allow_unauthenticated=args.allow_unauthenticated,
        allowed_hosts=tuple(name.lower() for name in args.allowed_hosts),
        allowed_origins=tuple(args.allowed_origins),
        ignore_unknown_fields=args.ignore_unknown_fields,
        http_parser=args.http_parser,
    )


def announce(service: Service, url: str) -> None:
    """Tell the person at the terminal what is served, and how to call it."""
    card, config = service.card, service.card.config
    cache_bytes = config.block_size * sum(
        count * group.bytes_per_token
        for count, group in zip(config.num_blocks, card.info.cache_groups, strict=True)
    )
    key = "" if service.settings.keys.is_empty else " -H 'Authorization: Bearer KEY'"
    lines = [
        f"model      {card.names[0]} ({card.info.num_parameters:,} parameters, "
        f"{card.info.weight_bytes / 2**20:.1f} MiB)",
        f"executed   {card.info.executed_form} by the {card.info.runner} runner",
        f"KV cache   {cache_bytes / 2**20:.1f} MiB of {card.info.cache_dtype}: "
        f"{sum(config.num_blocks)} blocks of {config.block_size} tokens",
        f"context    {config.max_seq_len} tokens, up to {config.max_num_seqs} sequences a step",
        f"page       {url}/",
        f"API        {url}/v1",
        f"try        curl {url}/v1/completions{key} -H 'Content-Type: application/json' "
        """-d '{"prompt": "Once upon a time", "max_tokens": 50}'""",
    ]
    for line in lines:
        console().print(line, markup=False, soft_wrap=True)
