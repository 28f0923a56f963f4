"""The command line: a table of verbs, each in a module of its own that is imported when chosen.

`llmserve --help` and a verb's `--help` import nothing heavy. Exit codes: 0 done, 1 an error that
the message explains, 2 a setting that cannot be used, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module

from . import __version__
from .errors import ConfigError, LLMServeError

__all__ = ["main"]

VERBS: dict[str, tuple[str, str]] = {
    "demo": ("llmserve.cli_demo", "train, quantize, serve and load-test a small model, end to end"),
    "data": ("llmserve.training.cli_data", "make a training text, or clean one"),
    "tokenizer": ("llmserve.training.cli_tokenizer", "train tokenizers, and compare them"),
    "train": ("llmserve.training.cli_train", "train a model from text, or resume its training"),
    "train compare": (
        "llmserve.training.cli_compare",
        "train variants of a recipe at equal compute, side by side",
    ),
    "finetune": ("llmserve.training.cli_finetune", "tune a model to a task, or resume its tuning"),
    "merge": ("llmserve.training.cli_merge", "add a LoRA adapter to the weights it adapts"),
    "eval": ("llmserve.training.cli_eval", "score a model on texts and tasks"),
    "quantize": ("llmserve.export.cli_quantize", "make a model smaller and say what that cost"),
    "lineage": ("llmserve.training.cli_lineage", "what a model was made from, verified"),
    "export": ("llmserve.export.cli_export", "convert a model for other programs"),
    "verify": ("llmserve.export.cli_verify", "compare what is served with what was trained"),
    "generate": ("llmserve.cli_generate", "complete prompts on this machine, without a server"),
    "chat": ("llmserve.cli_chat", "talk with a model in the terminal"),
    "serve": ("llmserve.server.cli_serve", "serve a model over HTTP"),
    "replay": ("llmserve.cli_replay", "play a recorded run again and say whether it went alike"),
    "bench": ("llmserve.benchmarks.cli_bench", "load-test a server, or time a model offline"),
    "simulate": (
        "llmserve.benchmarks.cli_simulate",
        "replay recorded traffic on the engine with a virtual clock",
    ),
    "plan": ("llmserve.benchmarks.cli_plan", "predict what a model's server will carry here"),
}
"""Verb, of one word or two → module that defines `add_arguments(parser)` and `run(args) -> int`,
and a summary."""

_EXAMPLES = """\
a first tour:
  llmserve demo                                  everything below in one go, on a small text
  llmserve data python-manual --out manual.txt   a text that every Python has
  llmserve train --text manual.txt --out run     a model folder in run/model
  llmserve quantize run/model --scheme int8      a smaller one, and what it lost
  llmserve serve run/model-int8                  http://127.0.0.1:8000, OpenAI's API and a page
  llmserve bench serve --max-concurrency 16      how fast it answers

`llmserve VERB --help` explains each verb.
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command; `argv` without the program's name, None: this process's arguments."""
    arguments = sys.argv[1:] if argv is None else argv
    # Threads that wait for each other spin for milliseconds by default: beside any busy process
    # that costs a small model up to 30 times its speed (docs/lab-log.md, 2026-11-23). Said here,
    # before a library that reads it is imported; child processes inherit it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        return _run(arguments)
    except ConfigError as error:
        return _fail(error, 2)
    except LLMServeError as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        print("llmserve: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output left (`| head`): nothing is wrong, and nothing more to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a full disk, a file that may not be written
        return _fail(error, 1)


def _run(arguments: list[str]) -> int:
    parser = _parser()
    if not arguments:
        parser.print_help()
        return 0
    length = 2 if " ".join(arguments[:2]) in VERBS else 1
    verb = " ".join(arguments[:length])
    if verb not in VERBS:
        parser.parse_args(arguments)  # --help, --version, or an unknown verb: exits
    module_name, summary = VERBS[verb]
    module = import_module(module_name)
    verb_parser = argparse.ArgumentParser(
        prog=f"llmserve {verb}",
        description=summary[0].upper() + summary[1:] + ".",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(verb_parser)
    code: int = module.run(verb_parser.parse_args(arguments[length:]))
    return code


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, VERBS))
    table = "\n".join(f"  {verb:<{width}}  {summary}" for verb, (_, summary) in VERBS.items())
    parser = argparse.ArgumentParser(
        prog="llmserve",
        description="Train a language model of your own, quantize it with proof, and serve it.\n\n"
        f"verbs:\n{table}",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"llmserve {__version__}")
    parser.add_argument("verb", choices=sorted(VERBS), metavar="VERB", help="what to do")
    return parser


def _fail(error: Exception, code: int) -> int:
    print(f"llmserve: error: {error}", file=sys.stderr)
    return code
