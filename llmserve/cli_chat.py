"""`llmserve chat`: a conversation in the terminal."""

from __future__ import annotations

import argparse
import sys

from .cli_sampling import (
    adapter_name,
    add_model_arguments,
    add_sampling_arguments,
    load_llm,
    sampling_params,
)
from .console import console
from .errors import RequestError

__all__ = ["add_arguments", "run"]

_EXAMPLES = """\
examples:
  llmserve chat run/model
  llmserve chat run/model --system "Answer in one sentence." --temperature 0.5

An empty line or Ctrl-D ends it; /new begins anew. The model's own chat template is used.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's arguments."""
    parser.epilog = _EXAMPLES
    add_model_arguments(parser)
    parser.add_argument("--system", metavar="TEXT", help="instructions before the conversation")
    add_sampling_arguments(parser, max_tokens=256)


def run(args: argparse.Namespace) -> int:
    """Read lines and answer them until an empty one."""
    params, adapter = sampling_params(args), adapter_name(args)
    opening = [{"role": "system", "content": args.system}] if args.system else []
    messages = list(opening)
    with load_llm(args) as llm:
        llm.render_chat([*opening, {"role": "user", "content": "Hello"}])  # fails now or never
        while line := _read_line():
            if line == "/new":
                messages = list(opening)
                continue
            messages.append({"role": "user", "content": line})
            answer = ""
            try:
                for delta in llm.stream(llm.render_chat(messages), params, adapter=adapter):
                    answer += delta.text
                    sys.stdout.write(delta.text)
                    sys.stdout.flush()
            except RequestError as error:
                messages.pop()
                console().print(f"[red]{error}[/] (/new begins anew)")
                continue
            print()
            messages.append({"role": "assistant", "content": answer})
    return 0


def _read_line() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""
