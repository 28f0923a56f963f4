"""Cleaning a corpus: the chosen steps, text by text, then over all documents, and their report."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llmserve.text.cleaning import drop_controls, normalize_unicode, tidy_spaces

from .clean_duplicates import exact_duplicates, near_duplicates
from .clean_json import drop_json_debris
from .clean_markup import drop_markup
from .clean_quality import quality_fault
from .clean_repeats import drop_boilerplate, drop_repeats, find_boilerplate
from .clean_report import CleaningReport, StepReport

__all__ = ["Cleaner"]

_TEXT_STEPS: dict[str, Callable[[str], str]] = {
    "markup": drop_markup,
    "json": drop_json_debris,
    "controls": drop_controls,
    "unicode": normalize_unicode,
    "repeats": drop_repeats,
    "spaces": tidy_spaces,
}


class Cleaner:
    """Applies steps and counts what they take. One for each corpus."""

    def __init__(self, steps: Sequence[str]) -> None:
        """`steps` as `clean_steps.parse_steps` gives them."""
        self._steps = {name: StepReport(name) for name in steps}
        self._empty = StepReport("empty")
        self.report = CleaningReport([*self._steps.values(), self._empty])
        """Complete after `select`."""

    def clean(self, text: str) -> str:
        """`text` after every step that changes texts."""
        self.report.texts_before += 1
        self.report.characters_before += len(text)
        for name, report in self._steps.items():
            step = _TEXT_STEPS.get(name)
            if step is not None:
                before, text = text, step(text)
                report.note_change(before, text)
        return text

    def select(self, documents: list[str]) -> list[str]:
        """The documents that stay, after every step that looks at all of them. None is empty."""
        documents = _drop_empty(documents, self._empty)
        for name, report in self._steps.items():
            step = _DOCUMENT_STEPS.get(name)
            documents = step(documents, report) if step else documents
        self.report.documents_after = len(documents)
        self.report.characters_after = sum(map(len, documents))
        return documents


def _drop_empty(documents: list[str], report: StepReport) -> list[str]:
    for document in documents:
        if not document.strip():
            report.note_removal(document)
    return [document for document in documents if document.strip()]


def _boilerplate(documents: list[str], report: StepReport) -> list[str]:
    boilerplate = find_boilerplate(documents)
    kept = []
    for before in documents:
        after = drop_boilerplate(before, boilerplate)
        if after.strip():
            report.note_change(before, after)
            kept.append(after)
        else:
            report.note_removal(before)
    return kept


def _without(
    find: Callable[[Sequence[str]], set[int]],
) -> Callable[[list[str], StepReport], list[str]]:
    """The step that drops the documents whose indices `find` gives."""

    def drop(documents: list[str], report: StepReport) -> list[str]:
        found = find(documents)
        for index in sorted(found):
            report.note_removal(documents[index])
        return [document for index, document in enumerate(documents) if index not in found]

    return drop


def _quality(documents: list[str], report: StepReport) -> list[str]:
    kept = []
    for document in documents:
        fault = quality_fault(document)
        if fault is None:
            kept.append(document)
        else:
            report.note_removal(document, fault)
    return kept


_DOCUMENT_STEPS: dict[str, Callable[[list[str], StepReport], list[str]]] = {
    "boilerplate": _boilerplate,
    "duplicates": _without(exact_duplicates),
    "near-duplicates": _without(near_duplicates),
    "quality": _quality,
}
