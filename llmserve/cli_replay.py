"""`llmserve replay`: play a step log again."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from .assignments import parse_assignments
from .errors import ConfigError
from .runner_arguments import add_runner_arguments, add_verify_argument, runner_settings

if TYPE_CHECKING:
    from .engine.grammar import Grammar, Matcher
    from .engine.grammar_compiler import GrammarCompiler
    from .engine.replay import ReplayReport
    from .runners.protocol import Runner

__all__ = ["add_arguments", "run"]

_DESCRIPTION = """\
Play a run again that serve or generate wrote down with --record, and say whether it goes alike.

Without a model the recorded draws stand for it, and the engine's decisions are checked alone; with
the model they were made by, its draws are checked too. That is exact where the run was
--deterministic.
"""

_EXAMPLES = """\
examples:
  llmserve serve run/model --record steps.log
  llmserve replay steps.log
  llmserve replay steps.log --model run/model --deterministic

The exit code is 0 when everything came out as it was, else 1.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's arguments."""
    parser.description = _DESCRIPTION
    parser.epilog = _EXAMPLES
    parser.add_argument("log", type=Path, metavar="LOG", help="the step log")
    group = parser.add_argument_group("with the model")
    group.add_argument("--model", metavar="FOLDER", help="let this model draw the tokens")
    add_runner_arguments(group)
    add_verify_argument(group)
    group.add_argument(
        "--lora-modules", nargs="+", default=[], metavar="NAME=PATH", help="its LoRA adapters"
    )


def run(args: argparse.Namespace) -> int:
    """Play and compare."""
    from .engine.replay import replay

    _check(args)
    runner = None if args.model is None else _load_runner(args)
    try:
        report = replay(args.log, runner, None if runner is None else _compiler(args.model, runner))
    finally:
        if runner is not None:
            runner.close()
    print(_summary(report))
    if report.difference is None:
        print("everything came out as it was")
        return 0
    print(f"it went another way {report.difference}")
    return 1


def _check(args: argparse.Namespace) -> None:
    """Without a model nothing is computed: options about how are refused."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    for name, value in vars(args).items():
        if args.model is None and name != "log" and value != parser.get_default(name):
            option = "--" + name.replace("_", "-")
            raise ConfigError(f"{option} needs --model: without one nothing is computed")


def _load_runner(args: argparse.Namespace) -> Runner:
    from .checkpoint import Checkpoint
    from .runners.registry import load_runner

    adapters = parse_assignments(args.lora_modules, "--lora-modules")
    return load_runner(
        checkpoint=Checkpoint.open(args.model, verify=not args.no_verify),
        **runner_settings(args),
        adapters={name: Path(path) for name, path in adapters.items()},
    )


def _compiler(model: str, runner: Runner) -> Callable[[Grammar], Matcher]:
    """Compiles grammars for the model, whose tokenizer is read when there is one."""

    @cache
    def compiler() -> GrammarCompiler:
        from .engine.grammar_compiler import GrammarCompiler
        from .text.tokenizer import Tokenizer

        return GrammarCompiler(Tokenizer.load(model), runner.info)

    return lambda grammar: compiler().compile(grammar)


def _summary(report: ReplayReport) -> str:
    return (
        f"{report.num_requests} requests, {report.num_steps} steps, {report.num_tokens} tokens, "
        f"{report.num_preemptions} preemptions"
    )
