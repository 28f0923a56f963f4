"""`llmserve serve`: options, and the server's own log."""

from __future__ import annotations

import argparse
import contextlib
import logging
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING

from llmserve.assignments import parse_assignments
from llmserve.errors import ConfigError
from llmserve.limits import Limits

from .available_memory import available_bytes
from .engine_launch import EngineLaunch
from .engine_options import add_engine_arguments, engine_settings
from .log_format import start_log

if TYPE_CHECKING:
    from .auth import KeyRing
    from .settings import ModelSettings, ServerSettings

__all__ = ["add_arguments", "parse_limits", "run", "server_settings"]

_EXAMPLES = """\
examples:
  llmserve serve run/model-int8
  llmserve serve small=run/model-int4 large=run/model
  llmserve serve run/model --port 0 --limit drain_s=5
  llmserve serve run/model --speculative-config '{"method": "ngram"}'
  llmserve serve run/model --lora-modules tuned=run/lora
  LLMSERVE_API_KEY=a-long-secret llmserve serve run/model --host 0.0.0.0

The page is at the address itself, OpenAI's API under /v1. Ctrl-C ends the server when the
requests under way have ended; a second one ends it at once.
"""

_OF_ONE_MODEL = {
    "--served-model-name": "served_model_name",
    "--chat-template": "chat_template",
    "--lora-modules": "lora_modules",
    "--record": "record",
}
"""Options that cannot hold for several models, with where the parser puts them."""

_LOG_LEVELS = ("debug", "info", "warning", "error")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's arguments."""
    parser.description = "Serve a model over HTTP: OpenAI's API, a page to try it, metrics."
    parser.epilog = _EXAMPLES
    parser.add_argument(
        "model", nargs="*", metavar="MODEL",
        help="a model folder, or NAME=FOLDER; several are served side by side, each by engines of "
        "its own, and requests name one",
    )  # fmt: skip
    _add_network_arguments(parser.add_argument_group("network"))
    add_engine_arguments(parser)
    _add_swap_arguments(parser.add_argument_group("another model in the place of the first"))
    _add_prompt_arguments(parser.add_argument_group("names and prompts"))
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


def _add_swap_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--swap-root", type=Path, metavar="FOLDER",
        help="where POST /admin/models/load may load models from (default: the folder that MODEL "
        "lies in)",
    )  # fmt: skip
    group.add_argument(
        "--swap", choices=("beside", "drain"), default="beside",
        help="load it beside the old one, or when the old one's requests have ended, which takes "
        "less memory and answers new ones with 503 meanwhile (default: beside)",
    )  # fmt: skip
    group.add_argument(
        "--swap-probe", type=Path, metavar="FILE",
        help="text that both models read before a swap, for the two gates below",
    )  # fmt: skip
    group.add_argument(
        "--swap-max-kl", type=float, metavar="NATS",
        help="refuse a model that diverges by more from the one it would replace, per token",
    )  # fmt: skip
    group.add_argument(
        "--swap-max-perplexity", type=float, metavar="FACTOR",
        help="refuse a model whose perplexity is higher by more than this factor",
    )  # fmt: skip


def _add_prompt_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--served-model-name", nargs="+", default=[], metavar="NAME",
        help="names for the model in requests, the first in replies (default: the folder's name)",
    )  # fmt: skip
    group.add_argument(
        "--chat-template", type=Path, metavar="FILE",
        help="Jinja template for chat (default: the folder's)",
    )  # fmt: skip


def _add_access_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--api-key-file", type=Path, metavar="FILE",
        help="keys for inference, one a line, as KEY or KEY name=NAME; the variable "
        "LLMSERVE_API_KEY holds one more",
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
        "--metrics-prefix", choices=("llmserve", "vllm"), default="llmserve",
        help="names in /metrics: our own, or those of boards made for vLLM (default: llmserve)",
    )  # fmt: skip
    group.add_argument(
        "--otlp-traces-endpoint", metavar="URL",
        help="send a span for each request there by OTLP, as http://localhost:4318/v1/traces",
    )  # fmt: skip
    group.add_argument(
        "--log-format", choices=("text", "json"), default="text",
        help="a line of words or one JSON object for each event (default: text)",
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
    if not args.model:
        raise ConfigError("no model was given: llmserve serve MODEL")
    start_log(args.log_format)
    logging.getLogger("llmserve").setLevel(args.log_level.upper())
    available = available_bytes()
    with contextlib.ExitStack() as stack:
        # Before the imports, which take as long as an engine's load.
        launches = [stack.enter_context(EngineLaunch()) for _ in args.model]
        settings = server_settings(args, limits)
        launches[0].load(settings.models[0].engine)
        from .announcement import announce
        from .lifecycle import serve

        return serve(settings, launches, announce, available_memory=available)


def parse_limits(assignments: list[str]) -> Limits:
    """Limits with some values changed, each `name=value`.

    Raises `ConfigError` for an unknown name or a value that is no positive number.
    """
    types = {field.name: float if field.type == "float" else int for field in fields(Limits)}
    values: dict[str, int | float] = {}
    for name, text in parse_assignments(assignments, "--limit").items():
        if name not in types:
            raise ConfigError(f"unknown limit {name!r}; known: {', '.join(types)}")
        try:
            values[name] = types[name](text)
        except ValueError as error:
            kind = "number" if types[name] is float else "whole number"
            raise ConfigError(f"limit {name} takes a {kind}, got {text!r}") from error
    return Limits(**values)  # type: ignore[arg-type]


def server_settings(args: argparse.Namespace, limits: Limits) -> ServerSettings:
    """What the options ask for, key files read. Raises `ConfigError` for what cannot be used."""
    from .settings import ServerSettings, SwapSettings, load_keys

    keys = load_keys(
        user_file=args.api_key_file,
        metrics_file=args.metrics_key_file,
        admin_file=args.admin_key_file,
    )
    return ServerSettings(
        models=_model_settings(args, keys, limits),
        host=args.host,
        port=args.port,
        limits=limits,
        keys=keys,
        shares_prefix_cache=args.share_prefix_cache,
        allow_unauthenticated=args.allow_unauthenticated,
        allowed_hosts=tuple(name.lower() for name in args.allowed_hosts),
        allowed_origins=tuple(args.allowed_origins),
        swap=SwapSettings(
            root=args.swap_root,
            drains=args.swap == "drain",
            probe=args.swap_probe,
            max_kl=args.swap_max_kl,
            max_perplexity=args.swap_max_perplexity,
        ),
        ignore_unknown_fields=args.ignore_unknown_fields,
        metrics_prefix=args.metrics_prefix,
        otlp_endpoint=args.otlp_traces_endpoint,
        http_parser=args.http_parser,
    )


def _model_settings(
    args: argparse.Namespace, keys: KeyRing, limits: Limits
) -> tuple[ModelSettings, ...]:
    """Each model with the options, which hold for all of them.

    Raises `ConfigError` for an option that is about one model, where there are several.
    """
    from .settings import ModelSettings

    given = [(option, value) for option, value in _OF_ONE_MODEL.items() if getattr(args, value)]
    if len(args.model) > 1 and given:
        raise ConfigError(
            f"{given[0][0]} is about one model and {len(args.model)} were given: leave it out"
            + (", and name models as NAME=FOLDER" if given[0][1] == "served_model_name" else "")
        )
    models = []
    for text in args.model:
        name, folder = _name_and_folder(text)
        if name is not None and args.served_model_name:
            raise ConfigError(f"{text} has a name: leave out --served-model-name")
        models.append(
            ModelSettings(
                engine=engine_settings(args, folder, keys, limits),
                names=tuple(args.served_model_name) if name is None else (name,),
                chat_template=args.chat_template,
                num_replicas=args.replicas,
                num_prefill_engines=args.prefill_engines,
            )
        )
    if len(models) > 1 and models[0].engine.draft_model is not None:
        raise ConfigError(
            "a draft model guesses for one model and several were given: guess by the method ngram"
        )
    return tuple(models)


def _name_and_folder(text: str) -> tuple[str | None, str]:
    """The two of `NAME=FOLDER`; no name where what stands before the sign is part of a path."""
    name, sign, folder = text.partition("=")
    if not sign or "/" in name:
        return None, text
    if not name or not folder:
        raise ConfigError(f"{text!r} is neither a folder nor NAME=FOLDER (a folder: ./{text})")
    return name, folder
