"""`llmserve generate`: complete prompts on this machine."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .cli_sampling import (
    adapter_name,
    add_model_arguments,
    add_sampling_arguments,
    load_llm,
    sampling_params,
)
from .console import console, progress
from .errors import ConfigError

if TYPE_CHECKING:
    from .completion import Completion
    from .llm import LLM
    from .sampling import SamplingParams

__all__ = ["add_arguments", "run"]

_EXAMPLES = """\
examples:
  llmserve generate run/model "The list method"
  llmserve generate run/model --prompts-file prompts.txt --json > answers.jsonl
  llmserve generate run/model "A class is" -n 3 --temperature 1 --seed 7
  llmserve generate run/model "A class is" --adapter tuned=run/lora

One prompt with one choice is written as it is made; several are batched and written in order.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's arguments."""
    parser.epilog = _EXAMPLES
    add_model_arguments(parser)
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="texts to complete")
    parser.add_argument(
        "--prompts-file", type=Path, metavar="FILE", help="one prompt a line; - is standard input"
    )
    parser.add_argument("-n", type=int, default=1, help="choices for each prompt (default: 1)")
    parser.add_argument("--json", action="store_true", help="one JSON object a prompt, one a line")
    add_sampling_arguments(parser, max_tokens=128)


def run(args: argparse.Namespace) -> int:
    """Generate and print."""
    prompts = _prompts(args)
    params = sampling_params(args, n=args.n)
    adapter = adapter_name(args)
    with load_llm(args) as llm:
        if len(prompts) == 1 and args.n == 1 and not args.json:
            sys.stdout.write(prompts[0])
            for delta in llm.stream(prompts[0], params, adapter=adapter):
                sys.stdout.write(delta.text)
                sys.stdout.flush()
            print()
            return 0
        completions = _generate(llm, prompts, params, adapter)
    for prompt, completion in zip(prompts, completions, strict=True):
        if args.json:
            choices = [
                {"text": choice.text, "finish_reason": choice.finish_reason.value}
                for choice in completion.choices
            ]
            print(json.dumps({"prompt": prompt, "choices": choices}, ensure_ascii=False))
        else:
            for choice in completion.choices:
                print(prompt + choice.text + "\n")
    return 0


def _generate(
    llm: LLM, prompts: list[str], params: SamplingParams, adapter: str | None
) -> list[Completion]:
    """All of them, with a line of progress for a person who waits for several."""
    if len(prompts) == 1 or not console().is_terminal:
        return llm.generate(prompts, params, adapter=adapter)
    with progress() as display:
        task = display.add_task("prompts", total=len(prompts), note="")

        def show(num_done: int, num_tokens: int) -> None:
            display.update(task, completed=num_done, note=f"{num_tokens:,} tokens")

        return llm.generate(prompts, params, adapter=adapter, on_progress=show)


def _prompts(args: argparse.Namespace) -> list[str]:
    prompts = list(args.prompts)
    if args.prompts_file is not None:
        try:
            text = (
                sys.stdin.read()
                if str(args.prompts_file) == "-"
                else args.prompts_file.read_text(encoding="utf-8")
            )
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the prompts of {args.prompts_file}: {error}") from error
        prompts += [line for line in text.splitlines() if line]
    if not prompts:
        raise ConfigError("no prompt was given: name one, or a file with --prompts-file")
    return prompts
