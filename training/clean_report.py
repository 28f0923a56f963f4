"""What cleaning took away: counted for each step, with examples, for people and for programs."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["CleaningReport", "StepReport", "render_cleaning"]

_FORMAT = "llmserve-cleaning-1"
_MAX_EXAMPLES = 3
_EXAMPLE_CHARS = 80


@dataclass(slots=True)
class StepReport:
    """What one step did. Grows while it is used."""

    name: str
    changed: int = 0
    """Texts that came out other than they went in, and were kept."""
    removed: int = 0
    """Documents dropped."""
    characters_removed: int = 0
    """Characters fewer; a step that writes something longer counts negative."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Documents dropped by reason, where the step has several."""
    examples: list[str] = field(default_factory=list)
    """The first texts touched, from where they were changed on; up to 3, shortened."""

    def note_change(self, before: str, after: str) -> None:
        """Count a text that the step passed on."""
        if before == after:
            return
        self.changed += 1
        self.characters_removed += len(before) - len(after)
        if len(self.examples) < _MAX_EXAMPLES:
            self._add_example(before, start=_first_difference(before, after))

    def note_removal(self, document: str, reason: str = "") -> None:
        """Count a document that the step dropped."""
        self.removed += 1
        self.characters_removed += len(document)
        if reason:
            self.reasons[reason] += 1
        if len(self.examples) < _MAX_EXAMPLES:
            self._add_example(document, start=0)

    def _add_example(self, text: str, *, start: int) -> None:
        self.examples.append(text[start : start + _EXAMPLE_CHARS])


@dataclass(slots=True)
class CleaningReport:
    """What all steps did."""

    steps: list[StepReport]
    texts_before: int = 0
    """Texts as they were read and cut at separators."""
    characters_before: int = 0
    documents_after: int = 0
    """Documents kept; a text without a separator may have been cut into several."""
    characters_after: int = 0

    def as_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {"format": _FORMAT, **asdict(self)}

    def summary(self) -> str:
        """One line: what is left, and which steps took something."""
        share = 1 - self.characters_after / max(1, self.characters_before)
        took = [step.name for step in self.steps if step.changed or step.removed]
        return (
            f"cleaning took {share:.2%} of {self.characters_before:,} characters "
            f"({', '.join(took) or 'nothing'}); {self.documents_after:,} documents are left"
        )


def render_cleaning(report: CleaningReport) -> str:
    """The report as a table."""
    rows: list[tuple[str, ...]] = [("step", "changed", "removed", "characters removed", "why")]
    for step in report.steps:
        reasons = ", ".join(f"{name} {count}" for name, count in step.reasons.most_common())
        counts = (step.changed, step.removed, step.characters_removed)
        rows.append((step.name, *(f"{count:,}" for count in counts), reasons))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [_line(row, widths) for row in rows]
    total = f"{report.characters_before:,} characters in {report.texts_before:,} texts"
    left = f"{report.characters_after:,} characters in {report.documents_after:,} documents"
    return "\n".join([*lines, f"{total} → {left}"])


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    name, *counts, reasons = row
    cells = [f"{cell:>{width}}" for cell, width in zip(counts, widths[1:], strict=False)]
    return f"{name:<{widths[0]}}  {'  '.join(cells)}  {reasons}".rstrip()


def _first_difference(before: str, after: str) -> int:
    """How many characters both begin with. By halving: comparing slices is fast, loops are not."""
    low, high = 0, min(len(before), len(after))
    while low < high:
        middle = (low + high + 1) // 2
        if before.startswith(after[low:middle], low):
            low = middle
        else:
            high = middle - 1
    return low
