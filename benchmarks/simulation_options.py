"""What `llmserve simulate` was asked to do, checked before anything is simulated."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from llmserve.engine.config import PolicyName
from llmserve.errors import ConfigError

from .cli_trace import trace_from
from .metrics import parse_slos
from .traces import Trace

__all__ = ["UNBOUNDED", "SimulationOptions", "simulation_options"]

UNBOUNDED = "unbounded"
FIT_PREFIX = "fit:"
DEFAULT_BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationOptions:
    """A trace, a machine, and the engines that it is played to. Made by `simulation_options`."""

    trace: Trace | None
    """None: only a cost model is made."""
    cost_model: str | Path
    """Values inline, or the file that holds them; with `fit_folder`, not looked at."""
    fit_folder: Path | None = None
    """Model folder that the cost model is fitted to."""
    device: str | None = None
    """Where the model to be fitted runs; None: on the CPU."""
    dtype: str | None = None
    """Its arithmetic; None: as the folder says."""
    save_cost_model: Path | None = None
    block_size: int = DEFAULT_BLOCK_SIZE
    num_blocks: tuple[int | None, ...] = (None,)
    """KV blocks of each run; None: unbounded."""
    max_num_seqs: int = 64
    max_batched_tokens: int = 512
    policy: PolicyName = "fcfs"
    has_prefix_cache: bool = True
    slos_ms: Mapping[str, float] = field(default_factory=dict)


def simulation_options(args: argparse.Namespace) -> SimulationOptions:
    """The options behind the arguments of the command line.

    Raises:
        ConfigError: a value out of range, or an option that would have no effect.
        DataError: the trace cannot be read.
    """
    is_fit = args.cost_model.startswith(FIT_PREFIX)
    _check_unused(args, is_fit=is_fit)
    trace = None if args.trace is None else trace_from(args)
    return SimulationOptions(
        trace=trace,
        cost_model=args.cost_model if "=" in args.cost_model else Path(args.cost_model),
        fit_folder=Path(args.cost_model.removeprefix(FIT_PREFIX)) if is_fit else None,
        device=args.device,
        dtype=args.dtype,
        save_cost_model=args.save_cost_model,
        block_size=_block_size(args.block_size, trace),
        num_blocks=_num_blocks(args),
        max_num_seqs=_count("--max-num-seqs", args.max_num_seqs),
        max_batched_tokens=_count("--max-num-batched-tokens", args.max_num_batched_tokens),
        policy=_policy(args.scheduling_policy, trace),
        has_prefix_cache=args.enable_prefix_caching,
        slos_ms=parse_slos(args.goodput),
    )


def _check_unused(args: argparse.Namespace, *, is_fit: bool) -> None:
    """Refuse options that the others leave without effect."""
    needs_fit = "needs --cost-model fit:MODEL_FOLDER"
    rules = [
        (args.save_cost_model and not is_fit, f"--save-cost-model {needs_fit}"),
        (args.device and not is_fit, f"--device {needs_fit}"),
        (args.dtype and not is_fit, f"--dtype {needs_fit}"),
        (args.kv_cache_blocks and args.sweep_cache, "give --kv-cache-blocks or --sweep-cache"),
        (
            args.trace is None and not args.save_cost_model,
            "give --trace FILE; only a cost model that is saved can be made without one",
        ),
    ]
    for is_broken, message in rules:
        if is_broken:
            raise ConfigError(message)


def _block_size(given: int | None, trace: Trace | None) -> int:
    named = None if trace is None else trace.block_size
    if given is None:
        return named or DEFAULT_BLOCK_SIZE
    if named is not None and named % _count("--block-size", given):
        raise ConfigError(
            f"the trace names blocks of {named} tokens: --block-size must divide that, got {given}"
        )
    return _count("--block-size", given)


def _num_blocks(args: argparse.Namespace) -> tuple[int | None, ...]:
    name = "--sweep-cache" if args.sweep_cache else "--kv-cache-blocks"
    text: str = args.sweep_cache or args.kv_cache_blocks or UNBOUNDED
    parts = text.split(",") if args.sweep_cache else [text]
    return tuple(_blocks(name, part) for part in parts)


def _blocks(name: str, text: str) -> int | None:
    if text == UNBOUNDED:
        return None
    if not (text.isascii() and text.isdigit() and int(text)):
        raise ConfigError(f"{name} takes whole numbers above 0 or {UNBOUNDED}, got {text!r}")
    return int(text)


def _policy(name: PolicyName, trace: Trace | None) -> PolicyName:
    if name != "fcfs" and trace is not None and trace.format == "azure":
        raise ConfigError(
            f"--scheduling-policy {name} has no effect: an azure trace names neither priorities "
            "nor tenants"
        )
    return name


def _count(name: str, value: int) -> int:
    if value < 1:
        raise ConfigError(f"{name} must be at least 1, got {value}")
    return value
