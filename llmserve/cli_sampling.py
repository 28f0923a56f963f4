"""The options that `generate` and `chat` share, and loading a model for them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .assignments import parse_assignments
from .runner_arguments import add_runner_arguments, add_verify_argument, runner_settings
from .sampling import SamplingParams

if TYPE_CHECKING:
    from .llm import LLM

__all__ = [
    "adapter_name",
    "add_model_arguments",
    "add_sampling_arguments",
    "load_llm",
    "sampling_params",
]


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The model folder and how to run it."""
    parser.add_argument("model", metavar="MODEL", help="the model folder")
    group = parser.add_argument_group("running")
    add_runner_arguments(group)
    add_verify_argument(group)
    group.add_argument(
        "--adapter", metavar="NAME=PATH", help="answer with this LoRA adapter, a folder"
    )
    group.add_argument(
        "--speculative-config",
        metavar="JSON",
        help="guess tokens ahead, as in vLLM: method (ngram or draft), num_speculative_tokens, "
        "prompt_lookup_min, prompt_lookup_max, model (the draft model's folder), always",
    )
    group.add_argument(
        "--record",
        metavar="FILE",
        help="write down what the engine does, for llmserve replay; the file holds prompts and "
        "answers",
    )


def add_sampling_arguments(parser: argparse.ArgumentParser, *, max_tokens: int) -> None:
    """How tokens are chosen; names as in the HTTP API."""
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--max-tokens", type=int, default=max_tokens, help=f"most tokens (default: {max_tokens})"
    )
    group.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default: 0.8)")
    group.add_argument("--top-k", type=int, default=0, help="keep the k likeliest; 0: all")
    group.add_argument(
        "--top-p", type=float, default=0.95, help="keep this share of probability (default: 0.95)"
    )
    group.add_argument(
        "--min-p", type=float, default=0.0, help="keep tokens at least this likely, relative"
    )
    group.add_argument(
        "--typical-p",
        type=float,
        default=1.0,
        help="keep the most typical tokens of this share of probability; 1: all",
    )
    group.add_argument(
        "--repetition-penalty", type=float, default=1.0, help="above 1: against repeats"
    )
    group.add_argument("--seed", type=int, help="the same seed gives the same text")
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end at this text; repeatable"
    )


def load_llm(args: argparse.Namespace) -> LLM:
    """The model that the arguments name.

    Raises:
        CheckpointError: a folder cannot be used.
        ConfigError: an argument cannot be used.
    """
    from .llm import LLM
    from .speculative_config import parse_speculation

    speculation = None
    if args.speculative_config is not None:
        speculation = parse_speculation(args.speculative_config)
    return LLM(
        args.model,
        **runner_settings(args),
        adapters=_adapters(args),
        speculation=None if speculation is None else speculation.config,
        draft_model=None if speculation is None else speculation.draft_model,
        record=args.record,
        verify=not args.no_verify,
    )


def adapter_name(args: argparse.Namespace) -> str | None:
    """The adapter to answer with."""
    return next(iter(_adapters(args)), None)


def _adapters(args: argparse.Namespace) -> dict[str, str]:
    return parse_assignments([args.adapter] if args.adapter is not None else [], "--adapter")


def sampling_params(args: argparse.Namespace, *, n: int = 1) -> SamplingParams:
    """The sampling that the arguments ask for."""
    return SamplingParams(
        max_tokens=args.max_tokens,
        n=n,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        typical_p=args.typical_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
        stop=tuple(args.stop),
    )
