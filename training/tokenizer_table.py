"""The comparison of tokenizers as a table and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .tokenizer_measure import TokenizerFigures

__all__ = ["ComparedTokenizer", "render_comparison"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedTokenizer:
    """One row of the comparison."""

    name: str
    figures: TokenizerFigures
    model: dict[str, Any] | None
    """Figures of the run trained on it, as in result.json; None: no model was trained."""

    def as_json(self) -> dict[str, Any]:
        """The row as JSON values."""
        return asdict(self)

    def cells(self) -> list[str]:
        """The row as text, under `_HEADINGS`."""
        figures = self.figures
        cells = [
            self.name,
            f"{figures.vocab_size:,}",
            f"{figures.bytes_per_token:.2f}",
            f"{figures.whole_words:.1%}",
            f"{figures.coverage:.2%}",
            f"{figures.encode_mb_per_s:.1f}",
            f"{figures.adversarial_s:.2f}",
            "yes" if figures.is_lossless else "NO",
        ]
        if self.model is not None:
            steps, parameters = self.model["steps"], self.model["parameters"]
            cells += [f"{parameters / 1e6:.2f}", f"{steps:,}", f"{self.model['bits_per_byte']:.3f}"]
        return cells


_HEADINGS = (
    *("tokenizer", "vocabulary", "bytes/token", "whole words", "coverage", "MB/s"),
    *("worst 200k chars, s", "lossless", "M parameters", "steps", "bits/byte"),
)


def render_comparison(rows: Sequence[ComparedTokenizer]) -> str:
    """The comparison as a table, the first column to the left."""
    cells = [row.cells() for row in rows]
    table = [list(_HEADINGS[: len(cells[0])]), *cells]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in table
    )
