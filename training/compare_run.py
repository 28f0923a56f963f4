"""Training every variant of a recipe on one text, each in a folder of its own, and the figures.

A comparison that is interrupted goes on where it was: what is finished is not trained again, and
the variant under way goes on from its checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from llmserve.durable import write_bytes, write_json
from llmserve.errors import ConfigError
from llmserve.text.tokenizer import Tokenizer

from .compare_report import Compared, render_comparison_page
from .compare_variants import Variant, make_variants, with_equal_compute
from .log import read_log
from .monitor_flops import training_flops_per_token
from .recipe import TrainingRecipe
from .run_folder import RunFolder
from .run_loop import Reporter
from .training_run import run_training

__all__ = ["compare"]


def compare(
    base: TrainingRecipe,
    axes: Sequence[str],
    sources: Sequence[str],
    out: Path,
    *,
    seeds: int,
    reporter: Reporter,
) -> list[Compared] | int:
    """Train all variants under `out` and write `comparison.json` and `comparison.html` there.

    Args:
        base: What is varied; with steps, not minutes.
        axes: What to vary (`compare_variants.AXES`).
        sources: The text.
        out: A folder; one run's folder in it for each variant and seed.
        seeds: Runs of each variant, with seeds from the recipe's on.
        reporter: Told of progress.

    Returns:
        The figures, the base first; or the number of the signal that stopped it.

    Raises:
        ConfigError: the recipe has minutes, or an axis does not exist.
    """
    if base.steps is None:
        raise ConfigError("a comparison needs steps, not minutes: its variants get equal compute")
    variants = make_variants(base, axes)
    stopped_by = _run(variants[0], 0, sources, out, reporter)
    if stopped_by is not None:
        return stopped_by
    # The base's run has made the tokenizer, which all share, and so the vocabulary.
    tokenizer = out / _folder(variants[0], 0) / "tokenizer"
    vocab_size = Tokenizer.load(tokenizer).vocab_size

    def flops_of(recipe: TrainingRecipe) -> int:
        return training_flops_per_token(recipe.model_config(vocab_size=vocab_size))

    variants = with_equal_compute(variants, flops_of)
    for variant in variants:
        for seed in range(seeds):
            if (variant.name, seed) == ("base", 0):
                continue
            shared = replace(variant.recipe, tokenizer=str(tokenizer))
            stopped_by = _run(Variant(variant.name, shared), seed, sources, out, reporter)
            if stopped_by is not None:
                return stopped_by
    figures = [_figures(variant, seeds, out, flops_of(variant.recipe)) for variant in variants]
    write_json(out / "comparison.json", [asdict(one) for one in figures])
    write_bytes(out / "comparison.html", render_comparison_page(figures).encode())
    return figures


def _folder(variant: Variant, seed: int) -> str:
    return variant.name if seed == 0 else f"{variant.name}-seed{seed}"


def _run(
    variant: Variant, seed: int, sources: Sequence[str], out: Path, reporter: Reporter
) -> int | None:
    """Train one variant; the signal that stopped it, if one did."""
    folder = _folder(variant, seed)
    reporter.note(f"--- {folder}: {variant.recipe.steps} steps")
    recipe = replace(variant.recipe, seed=variant.recipe.seed + seed)
    return run_training(recipe, sources, out / folder, reporter=reporter).stopped_by


def _figures(variant: Variant, seeds: int, out: Path, flops_per_token: int) -> Compared:
    folders = [out / _folder(variant, seed) for seed in range(seeds)]
    results = [_result(folder) for folder in folders]
    losses = tuple(float(result["held_out_loss"]) for result in results)
    log = read_log(folders[0] / "training_log.jsonl")
    last = results[0]["steps"]
    evaluations = [line for line in log if "held_out_loss" in line]
    curve = [(line["step"] / last, line["held_out_loss"]) for line in evaluations]
    if not curve or curve[-1][0] < 1:  # equal compute is seldom a whole number of evaluations
        curve.append((1.0, losses[0]))
    return Compared(
        name=variant.name,
        held_out_loss=fmean(losses),
        held_out_losses=losses,
        bits_per_byte=fmean(result["bits_per_byte"] for result in results),
        parameters=results[0]["parameters"],
        steps=last,
        flops=flops_per_token * results[0]["trained_tokens"],
        seconds=fmean(result["seconds"] for result in results),
        tokens_per_s=fmean(result["tokens_per_s"] for result in results),
        curve=tuple(curve),
    )


def _result(folder: Path) -> dict[str, Any]:
    result = RunFolder(folder).read_result()
    assert result is not None, "all runs are finished"
    return result
