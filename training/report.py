"""What a finished run says about itself: its figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmserve.checkpoint import Checkpoint

from .evaluation import HeldOutFigures
from .trainer import Trainer

__all__ = ["make_result", "render_result"]


def make_result(figures: HeldOutFigures, trainer: Trainer) -> dict[str, Any]:
    """The figures of a finished run, as they go into result.json."""
    state = trainer.state
    tokens = state.step * trainer.tokens_per_step
    return {
        "held_out_loss": figures.loss,
        "perplexity": figures.perplexity,
        "unigram_perplexity": figures.unigram_perplexity,
        "bits_per_byte": figures.bits_per_byte,
        "held_out_tokens": figures.num_tokens,
        "held_out_bytes": figures.num_bytes,
        "steps": state.step,
        "trained_tokens": tokens,
        "epochs": tokens / trainer.tokens_per_epoch,
        "seconds": state.seconds,
        "tokens_per_s": tokens / state.seconds,
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
    }


def render_result(result: dict[str, Any], model: Path) -> str:
    """The table at the end."""
    ratio = result["perplexity"] / result["unigram_perplexity"]
    size = Checkpoint.open(model, verify=False).stored_bytes()
    rows = [
        ("held-out loss", f"{result['held_out_loss']:.4f} nats/token"),
        ("held-out perplexity", f"{result['perplexity']:.2f}"),
        ("unigram perplexity", f"{result['unigram_perplexity']:.2f} (ratio {ratio:.3f})"),
        ("bits per byte", f"{result['bits_per_byte']:.3f}"),
        ("training", f"{result['steps']} steps, {result['epochs']:.1f} passes over the text"),
        ("time in steps", f"{result['seconds']:.1f} s, {result['tokens_per_s']:,.0f} tokens/s"),
        ("parameters", f"{result['parameters']:,} ({size / 1e6:.1f} MB)"),
        ("model", str(model)),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
