"""Tokenizers side by side: each measured, and the same small model trained on each.

A vocabulary costs a model parameters and time: its rows in the embedding, its columns in the
output. So the models are trained at equal compute, the multiplications of all steps together, not
at equal steps, and compared in bits per byte, which do not depend on how a text is cut. What
differs is the tokenizer alone: body, order, schedule and seed are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

from llmserve.errors import ConfigError
from llmserve.text.tokenizer import Tokenizer
from llmserve.text.train import TokenizerKind

from .corpus import Corpus, read_corpus
from .recipe import TrainingRecipe
from .run_loop import Reporter
from .tokenizer_folder import write_tokenizer
from .tokenizer_measure import measure_tokenizer
from .tokenizer_table import ComparedTokenizer
from .training_run import run_training

__all__ = [
    "TokenizerChoice",
    "compare_tokenizers",
    "comparison_recipe",
    "flops_per_token",
    "make_tokenizer",
    "parse_choice",
]


@dataclass(frozen=True, slots=True)
class TokenizerChoice:
    """A tokenizer to be trained, or one that lies in a folder."""

    name: str
    """As it was asked for."""
    kind: TokenizerKind | None
    """None: it lies in the folder `name`."""
    vocab_size: int
    """Of one to be trained."""

    @property
    def folder_name(self) -> str:
        """A name for files."""
        return Path(self.name).absolute().name.replace(":", "-")


def parse_choice(text: str) -> TokenizerChoice:
    """Read `KIND:SIZE` or a folder's name.

    Raises:
        ConfigError: neither.
    """
    kind, _, size = text.partition(":")
    if kind in get_args(TokenizerKind) and size.isdecimal():
        return TokenizerChoice(text, cast(TokenizerKind, kind), int(size))
    if not (Path(text) / "tokenizer.json").is_file():
        kinds = ", ".join(f"{known}:SIZE" for known in get_args(TokenizerKind))
        raise ConfigError(f"{text!r} is neither {kinds} nor a folder with a tokenizer.json")
    return TokenizerChoice(text, None, 0)


def make_tokenizer(choice: TokenizerChoice, documents: Sequence[str]) -> Tokenizer:
    """Train the tokenizer on `documents`, or open its folder.

    Raises:
        ConfigError: a vocabulary that cannot hold the bytes.
        CheckpointError: the folder is damaged.
    """
    if choice.kind is None:
        return Tokenizer.load(Path(choice.name))
    return Tokenizer.train(choice.kind, documents, vocab_size=choice.vocab_size)


def flops_per_token(recipe: TrainingRecipe, vocab_size: int) -> float:
    """Floating-point operations of training on one token, forward and backward.

    6 for each weight that is multiplied, the output layer's too but not the embedding's, which is
    looked up; 12 · layers · width · context / 2 for causal scores and their use (Chowdhery et al.,
    PaLM, arXiv:2204.02311, appendix B).
    """
    config = recipe.model_config(vocab_size=vocab_size)
    attention = config.hidden_size * (2 * config.q_size + 2 * config.kv_size)
    is_gated = config.activation == "swiglu"
    mlp = (3 if is_gated else 2) * config.hidden_size * config.intermediate_size
    body = config.num_layers * (attention + mlp)
    scores = 6 * config.num_layers * config.q_size * recipe.max_seq_len
    return float(6 * (body + vocab_size * config.hidden_size) + scores)


def comparison_recipe(*, steps: int, threads: int | None, **text: str) -> TrainingRecipe:
    """The small model of a comparison; `text` are the recipe's fields of text preparation.

    Neither evaluated nor saved before its end: only the last figure counts.
    """
    return TrainingRecipe(
        **text,  # type: ignore[arg-type]
        hidden_size=128,
        num_layers=3,
        num_heads=4,
        num_kv_heads=4,
        intermediate_size=344,
        max_seq_len=128,
        batch_size=8,
        steps=steps,
        learning_rate=2e-3,
        warmup_steps=max(1, steps // 10),
        evaluate_every=10**9,
        checkpoint_every=10**9,
        threads=threads,
    )


def compare_tokenizers(
    choices: Sequence[TokenizerChoice],
    sources: Sequence[str],
    recipe: TrainingRecipe,
    out: Path | None,
    *,
    open_reporter: Callable[[str], AbstractContextManager[Reporter]],
) -> list[ComparedTokenizer]:
    """Make, measure and train on each of `choices`, in their order.

    Args:
        choices: Those to be trained see the text's training part; all are measured on its
            held-out part.
        sources: The text.
        recipe: Of the models, all but the tokenizer; its steps are the first tokenizer's, the
            others get steps of as many operations.
        out: A folder for tokenizers and runs; a run that is there goes on. None: no models.
        open_reporter: Gives whom to tell of the run on a tokenizer of that name.

    Raises:
        ConfigError, DataError, CheckpointError, TrainingError: as `run_training` does.
        KeyboardInterrupt: a run was stopped by a signal; it left a checkpoint.
    """
    corpus = _read(sources, recipe)
    budget = 0.0
    rows = []
    for choice in choices:
        tokenizer = make_tokenizer(choice, corpus.train)
        figures = measure_tokenizer(tokenizer, corpus.held_out)
        model = None
        if out is not None:
            cost = flops_per_token(recipe, tokenizer.vocab_size)
            budget = budget or cost * (recipe.steps or 0)
            steps = max(1, round(budget / cost))
            with open_reporter(choice.name) as reporter:
                folder = out / choice.folder_name
                model = _train(tokenizer, recipe, sources, folder, steps, reporter)
        rows.append(ComparedTokenizer(name=choice.name, figures=figures, model=model))
    return rows


def _read(sources: Sequence[str], recipe: TrainingRecipe) -> Corpus:
    return read_corpus(
        sources,
        separator=recipe.separator,
        text_field=recipe.text_field,
        cleaning=recipe.cleaning,
        held_out=recipe.held_out,
        held_out_by=recipe.held_out_by,
        seed=recipe.seed,
    )


def _train(
    tokenizer: Tokenizer,
    recipe: TrainingRecipe,
    sources: Sequence[str],
    out: Path,
    steps: int,
    reporter: Reporter,
) -> dict[str, Any]:
    """The figures of a run of `steps` on `tokenizer`."""
    write_tokenizer(out / "tokenizer", tokenizer, overwrite=True)
    own = replace(
        recipe,
        tokenizer=str(out / "tokenizer"),
        vocab_size=tokenizer.vocab_size,
        steps=steps,
    )
    outcome = run_training(own, sources, out / "run", reporter=reporter)
    if outcome.result is None:
        raise KeyboardInterrupt
    return outcome.result
