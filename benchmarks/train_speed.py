"""`llmserve bench train`: training speed and memory beside two other loops.

Three contenders train the same shape on the same tokens in the same precision, each run in a
process of its own and in turn: `llmserve train` as its user calls it, a plain torch loop
(`train_plain.py`), and `transformers.Trainer` where an interpreter that has it is named.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import orjson

from llmserve.errors import ConfigError, EngineError

from .machine import command_line, machine, versions
from .peer_process import peer_command, peer_environment
from .statistics import Ratio, ratio_of_runs

__all__ = ["Job", "TrainSpeed", "bench_train", "train_result", "train_table"]

_UNTIMED_STEPS = 10
"""First steps, in which memory is allocated and kernels are chosen; one line of our log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What every contender trains."""

    model: str
    """Model folder of the shape; its weights do not matter."""
    tokens: str
    """File of 16-bit token ids."""
    batch_size: int
    """Windows of a step."""
    steps: int
    """Steps, the untimed ones too."""
    threads: int
    """Threads of the arithmetic."""
    precision: str
    """float32 or bfloat16."""
    untimed_steps: int = _UNTIMED_STEPS
    """Steps before the clock starts."""


@dataclass(slots=True)
class TrainSpeed:
    """One contender's runs."""

    name: str
    """As shown."""
    tokens_per_s: list[float] = field(default_factory=list)
    """Of each run."""
    peak_bytes: list[int] = field(default_factory=list)
    """Largest resident memory of each run's process."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of the packages that it ran on."""


def bench_train(args: argparse.Namespace) -> int:
    """Run the comparison and print table and JSON; the exit code.

    Raises:
        ConfigError: too few steps, or an interpreter that cannot be run.
        EngineError: a contender failed; its own message is on stderr.
    """
    if args.steps <= _UNTIMED_STEPS:
        raise ConfigError(f"--steps must be above {_UNTIMED_STEPS}, got {args.steps}")
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "run"
        job = Job(
            model=str(out / "model"),
            tokens=str(out / "tokens" / "train-00000.bin"),
            batch_size=args.batch_size,
            steps=args.steps,
            threads=args.threads,
            precision=args.precision,
        )
        # Ours, the first of each repeat, makes the tokens and the shape for the others.
        contenders = {"llmserve train": _our_command(args, out), **_peer_commands(args, job)}
        rows = [TrainSpeed(name) for name in contenders]
        for repeat in range(args.repeats):
            for row in rows:
                _measure(row, contenders[row.name], out)
                print(
                    f"repeat {repeat + 1}/{args.repeats}, {row.name}: "
                    f"{row.tokens_per_s[-1]:,.0f} tokens/s",
                    file=sys.stderr,
                    flush=True,
                )
    print(train_table(rows))
    print(orjson.dumps(train_result(rows, job)).decode(), flush=True)
    return 0


def train_table(rows: Sequence[TrainSpeed]) -> str:
    """Medians and ranges; ours, the first row, over each of the others with 95 % intervals."""
    head = f"{'':<22}{'tokens/s':>10}{'range':>16}{'ours over it':>20}"
    lines = [f"{head}{'peak memory':>14}{'ours over it':>20}"]
    for row in rows:
        speeds = row.tokens_per_s
        cells = [
            f"{row.name:<22}{statistics.median(speeds):>10,.0f}",
            f"{f'{min(speeds):,.0f}-{max(speeds):,.0f}':>16}",
            f"{_shown(row, rows[0], 'tokens_per_s'):>20}",
            f"{f'{statistics.median(row.peak_bytes) / 1e6:,.0f} MB':>14}",
            f"{_shown(row, rows[0], 'peak_bytes'):>20}",
        ]
        lines.append("".join(cells).rstrip())
    return "\n".join(lines)


def train_result(rows: Sequence[TrainSpeed], job: Job) -> dict[str, Any]:
    """The JSON document. Ratios are of geometric means, with intervals from two repeats on."""
    return {
        "benchmark": "train",
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "job": {name: value for name, value in asdict(job).items() if not isinstance(value, str)}
        | {"precision": job.precision},
        "rows": [
            {
                **asdict(row),
                "median_tokens_per_s": statistics.median(row.tokens_per_s),
                "median_peak_bytes": statistics.median(row.peak_bytes),
            }
            | {
                f"ours_over_its_{figure}": asdict(_ratio(rows[0], row, figure))
                for figure in ("tokens_per_s", "peak_bytes")
                if row is not rows[0] and len(row.tokens_per_s) > 1
            }
            for row in rows
        ],
        "machine": machine(),
        "versions": versions(("torch", "numpy")),
        "command": command_line(),
    }


def _ratio(ours: TrainSpeed, other: TrainSpeed, figure: str) -> Ratio:
    return ratio_of_runs(getattr(ours, figure), getattr(other, figure))


def _shown(row: TrainSpeed, ours: TrainSpeed, figure: str) -> str:
    if row is ours:
        return ""
    values: tuple[list[float], list[float]] = getattr(ours, figure), getattr(row, figure)
    if len(values[0]) < 2:
        return f"{values[0][0] / values[1][0]:.2f}"
    ratio = ratio_of_runs(*values)
    return f"{ratio.value:.2f} ({ratio.interval.low:.2f}-{ratio.interval.high:.2f})"


def _our_command(args: argparse.Namespace, out: Path) -> list[str]:
    options = {
        "--text": args.text,
        "--out": out,
        "--tokenizer": "char",
        "--vocab-size": 2048,
        "--held-out-by": "tail",
        "--hidden-size": args.hidden_size,
        "--num-layers": args.num_layers,
        "--num-heads": args.num_heads,
        "--num-kv-heads": args.num_kv_heads,
        "--intermediate-size": args.intermediate_size,
        "--max-seq-len": args.max_seq_len,
        "--batch-size": args.batch_size,
        "--steps": args.steps,
        "--threads": args.threads,
        "--precision": args.precision,
        "--log-every": _UNTIMED_STEPS,
        "--evaluate-every": 10**6,
        "--checkpoint-every": 10**6,
    }
    words = [str(word) for option in options.items() for word in option]
    return [sys.executable, "-m", "llmserve", "train", "--restart", "--json", "--quiet", *words]


def _peer_commands(args: argparse.Namespace, job: Job) -> dict[str, list[str]]:
    settings = json.dumps(asdict(job))
    commands = {
        "plain torch loop": [sys.executable, "-m", "llmserve.benchmarks.train_plain", settings]
    }
    if args.transformers is not None:
        theirs = peer_command(args.transformers, "train_transformers", settings)
        commands["transformers.Trainer"] = theirs
    return commands


def _measure(row: TrainSpeed, command: Sequence[str], out: Path) -> None:
    is_ours = command[1:4] == ["-m", "llmserve", "train"]
    # A peer gets the threads' own way of waiting, not the one that llmserve sets for itself.
    environment = os.environ if is_ours else peer_environment()
    reply, peak_bytes = _run(command, environment)
    row.tokens_per_s.append(_our_speed(out) if is_ours else reply["tokens_per_s"])
    row.peak_bytes.append(peak_bytes)
    row.versions = reply.get("versions", {})


def _our_speed(out: Path) -> float:
    """Tokens per second over the lines of the log after the first, each of as many steps."""
    lines = map(json.loads, (out / "training_log.jsonl").read_text().splitlines())
    speeds = [line["tokens_per_s"] for line in lines if "loss" in line][1:]
    return float(statistics.harmonic_mean(speeds))


def _run(command: Sequence[str], environment: Mapping[str, str]) -> tuple[dict[str, Any], int]:
    """The JSON of the last line that a program prints, and its largest resident memory."""
    try:
        process = subprocess.Popen(  # noqa: S603 - the programs are the user's choice
            command, stdout=subprocess.PIPE, env=dict(environment), text=True
        )
    except OSError as error:
        raise ConfigError(f"{command[0]} cannot be run: {error.strerror}") from error
    assert process.stdout is not None
    with process.stdout:
        lines = process.stdout.read().splitlines()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or not lines:
        raise EngineError(f"{' '.join(command[:4])} ended with code {process.returncode}")
    return json.loads(lines[-1]), usage.ru_maxrss * 1024
