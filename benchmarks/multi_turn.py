"""Conversations of several turns: how many, and how long a person thinks between them."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

import numpy as np

from llmserve.errors import ConfigError

from .chat_sets import CHAT_SETS
from .client import CHAT_ENDPOINT

__all__ = ["MultiTurn", "multi_turn_from"]

RANDOM_TURNS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class MultiTurn:
    """Made by `multi_turn_from`."""

    num_turns: int | None = None
    """Most turns of each conversation; None: all that it has."""
    think_time_s: float = 0.0
    """Mean of the exponentially distributed pause before each further turn."""

    def __str__(self) -> str:
        turns = "all turns" if self.num_turns is None else f"up to {self.num_turns} turns"
        pause = f", {self.think_time_s:g} s of thought" if self.think_time_s else ""
        return f"conversations of {turns}{pause}"

    def think_times_s(self, num_requests: int, *, seed: int) -> list[float]:
        """The pause before each request of the workload; that of a first turn is not used."""
        rng = np.random.default_rng([seed, 1])
        pauses: list[float] = (self.think_time_s * rng.exponential(size=num_requests)).tolist()
        return pauses


def multi_turn_from(args: argparse.Namespace) -> MultiTurn | None:
    """The conversations behind the arguments of the command line; None: requests stand alone.

    Raises:
        ConfigError: a value out of range, or options that exclude each other.
    """
    name, is_random = args.dataset_name, args.dataset_name == "random"
    is_part = args.num_turns is not None or args.think_time != 0
    rules = [
        (is_part and not args.multi_turn, "--num-turns and --think-time need --multi-turn"),
        (
            args.multi_turn and args.endpoint != CHAT_ENDPOINT,
            f"--multi-turn needs --endpoint {CHAT_ENDPOINT}",
        ),
        (
            args.multi_turn and args.max_concurrency is None,
            "--multi-turn needs --max-concurrency: how many conversations go on at a time",
        ),
        (
            args.multi_turn and (args.trace is not None or _is_timed(args)),
            "--multi-turn is a closed loop: no --request-rate, ramp, steps or --trace",
        ),
        (
            args.multi_turn and not is_random and name not in CHAT_SETS,
            f"--multi-turn needs --dataset-name random, {', '.join(CHAT_SETS)}; got {name}",
        ),
        (
            args.num_turns is not None and args.num_turns < 1,
            f"--num-turns must be at least 1, got {args.num_turns}",
        ),
        (
            not 0 <= args.think_time < math.inf,
            f"--think-time must be at least 0 seconds, got {args.think_time:g}",
        ),
    ]
    for is_broken, message in rules:
        if is_broken:
            raise ConfigError(message)
    if not args.multi_turn:
        return None
    num_turns = args.num_turns or (RANDOM_TURNS if is_random else None)
    return MultiTurn(num_turns=num_turns, think_time_s=args.think_time)


def _is_timed(args: argparse.Namespace) -> bool:
    is_changing = args.ramp_up_strategy is not None or args.rate_steps is not None
    return is_changing or math.isfinite(args.request_rate)
