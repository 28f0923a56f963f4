"""The options of `llmserve serve` about the engine, and the settings that they amount to."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmserve.assignments import parse_assignments
from llmserve.errors import ConfigError
from llmserve.limits import Limits
from llmserve.runner_arguments import add_runner_arguments, native_options

if TYPE_CHECKING:
    from .auth import KeyRing
    from .engine_settings import EngineSettings

__all__ = ["add_engine_arguments", "engine_settings", "parse_size"]

_SIZE = re.compile(r"([0-9]{1,15})([KMG]?)(?:i?B)?", re.IGNORECASE)
_FACTORS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the groups of options about model, memory, scheduling and speed, and processes."""
    _add_model_arguments(parser.add_argument_group("model"))
    _add_memory_arguments(parser.add_argument_group("memory"))
    _add_step_arguments(parser.add_argument_group("scheduling and speed"))
    _add_process_arguments(parser.add_argument_group("processes"))


def _add_model_arguments(group: argparse._ArgumentGroup) -> None:
    # The runner `fake`, and `fake:SECONDS` a step, is for tests: it answers without a model.
    add_runner_arguments(group)
    group.add_argument(
        "--max-model-len", type=int, metavar="TOKENS",
        help="longest prompt and answer together (default: the model's context)",
    )  # fmt: skip
    group.add_argument(
        "--lora-modules", nargs="+", default=[], metavar="NAME=PATH",
        help="LoRA adapters, each served as a model of its name",
    )  # fmt: skip


def _add_memory_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--kv-cache-memory", type=parse_size, default="256M", metavar="SIZE",
        help="memory for the KV cache in bytes, or with K, M or G (default: 256M)",
    )  # fmt: skip
    group.add_argument(
        "--block-size", type=int, default=16, metavar="TOKENS",
        help="tokens in one block of the KV cache (default: 16)",
    )  # fmt: skip
    group.add_argument(
        "--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=True,
        help="compute what equal beginnings have in common once (default: on)",
    )  # fmt: skip
    group.add_argument(
        "--share-prefix-cache", action="store_true",
        help="share it between API keys, who can then tell by the time what others asked",
    )  # fmt: skip


def _add_step_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--max-num-seqs", type=int, default=64, metavar="COUNT",
        help="most sequences in one step (default: 64)",
    )  # fmt: skip
    group.add_argument(
        "--max-step-ms", type=float, metavar="MS",
        help="longest time of a full step while somebody waits for a next token, which at the "
        "start gives its size by trying (default: 50, for a large model 2.5 times its smallest "
        "step)",
    )  # fmt: skip
    group.add_argument(
        "--max-num-batched-tokens", type=int, metavar="TOKENS",
        help="most tokens in one step, but as many decodes and as many prompt tokens as there are "
        "requests (default: what --max-step-ms allows)",
    )  # fmt: skip
    group.add_argument(
        "--scheduling-policy", choices=("fcfs", "priority", "fair"), default="fcfs",
        help="who is served first: by arrival, by the field priority, or API keys by their shares "
        "(default: fcfs)",
    )  # fmt: skip
    group.add_argument(
        "--tenant-weight", action="append", default=[], metavar="NAME=WEIGHT",
        help="share of the API key of that name under the policy fair (default: 1); repeatable",
    )  # fmt: skip
    group.add_argument(
        "--speculative-config", metavar="JSON",
        help="guess tokens ahead, as in vLLM: method (ngram or draft), num_speculative_tokens, "
        "prompt_lookup_min, prompt_lookup_max, model (the draft model's folder), always",
    )  # fmt: skip
    group.add_argument(
        "--record", metavar="FILE",
        help="write down what the engine does, for llmserve replay; the file holds prompts and "
        "answers",
    )  # fmt: skip


def _add_process_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--replicas", type=int, default=1, metavar="COUNT",
        help="engine processes, which share the weights and the cores; each has a KV cache of its "
        "own (default: 1)",
    )  # fmt: skip
    group.add_argument(
        "--prefill-engines", type=int, default=0, metavar="COUNT",
        help="engine processes beside those that only read prompts and hand the KV cache over; "
        "native runner (default: 0)",
    )  # fmt: skip


def parse_size(text: str) -> int:
    """Bytes from `268435456`, `256M` or `1GiB`; factors are powers of 1024."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write bytes, or K, M, G after them")
    return int(match[1]) * _FACTORS[match[2].upper()]


def engine_settings(
    args: argparse.Namespace, folder: str, keys: KeyRing, limits: Limits
) -> EngineSettings:
    """What the options ask of the engine of the model in `folder`.

    `keys` says whose the tenants' names are.

    Raises:
        ConfigError: options that do not go together, or a value that cannot be read.
    """
    from llmserve.speculative_config import parse_speculation

    from .engine_settings import EngineSettings

    runner, _, step_s = args.runner.partition(":")
    speculation = None
    if args.speculative_config is not None:
        speculation = parse_speculation(args.speculative_config)
    return EngineSettings(
        model=folder,
        runner=runner,
        dtype=args.dtype,
        device=args.device,
        threads=args.threads or _share_of_cores(args),
        deterministic=args.deterministic,
        tensor_parallel_size=args.tensor_parallel_size,
        enforce_eager=args.enforce_eager,
        native=native_options(args),
        adapters=parse_assignments(args.lora_modules, "--lora-modules"),
        max_seq_len=args.max_model_len,
        max_num_seqs=args.max_num_seqs,
        max_batched_tokens=args.max_num_batched_tokens,
        max_step_s=_step_time(args),
        cache_bytes=args.kv_cache_memory,
        block_size=args.block_size,
        has_prefix_cache=args.enable_prefix_caching,
        policy=args.scheduling_policy,
        tenant_weights=_tenant_weights(args.tenant_weight, args.scheduling_policy, keys),
        speculation=None if speculation is None else speculation.config,
        draft_model=None if speculation is None else speculation.draft_model,
        grammar_timeout_s=limits.grammar_timeout_s,
        log_format=args.log_format,
        handover_bytes=args.kv_cache_memory if args.prefill_engines > 0 else 0,
        record=args.record,
        fake_step_s=float(step_s or 0.0),
    )


def _share_of_cores(args: argparse.Namespace) -> int | None:
    """Threads of one of several engines, in each of its processes; None: the runner's choice."""
    num_engines = args.replicas + args.prefill_engines
    if num_engines < 2:
        return None
    from llmserve.runners.native_runner import default_threads

    num_processes: int = num_engines * max(1, args.tensor_parallel_size)
    return max(1, default_threads() // num_processes)


def _step_time(args: argparse.Namespace) -> float | None:
    if args.max_step_ms is None:
        return None
    if args.max_num_batched_tokens is not None:
        raise ConfigError(
            "--max-step-ms finds the size of a step and --max-num-batched-tokens gives it: "
            "leave one out"
        )
    if not 0 < args.max_step_ms < math.inf:
        raise ConfigError(f"--max-step-ms must be above 0, got {args.max_step_ms:g}")
    return float(args.max_step_ms) / 1e3


def _tenant_weights(texts: Sequence[str], policy: str, keys: KeyRing) -> dict[str, float]:
    """Shares by tenant, from those by key name."""
    if texts and policy != "fair":
        raise ConfigError(
            f"--tenant-weight has no effect under the scheduling policy {policy}: leave it out, or "
            "say --scheduling-policy fair"
        )
    weights = parse_assignments(texts, "--tenant-weight")
    return {keys.tenant_named(name): _parse_weight(text) for name, text in weights.items()}


def _parse_weight(text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise ConfigError(f"--tenant-weight takes a number above 0, got {text!r}")
    return weight
