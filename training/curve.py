"""The loss curve of a run as a picture. The only module that imports matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmserve.durable import write_bytes
from llmserve.errors import MissingDependencyError

__all__ = ["draw_loss_curve"]


def draw_loss_curve(
    path: Path, lines: Sequence[dict[str, Any]], *, unigram_loss: float | None = None
) -> None:
    """Write a PNG of training and held-out loss over the steps of a log (`log.read_log`).

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "matplotlib", extra="train", feature="the picture of the loss curve"
        ) from error
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for key, label, style in (("loss", "training", "-"), ("held_out_loss", "held out", "o-")):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    if unigram_loss is not None:
        axes.axhline(unigram_loss, linestyle=":", color="grey", label="unigram model")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    picture = io.BytesIO()
    # No date inside: the same log gives the same picture.
    FigureCanvasAgg(figure)
    figure.savefig(picture, format="png", metadata={"Software": None})
    write_bytes(path, picture.getvalue())
