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
from .document_store import ChosenDocuments, DocumentStore

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

    def select(self, documents: Sequence[str]) -> Sequence[str]:
        """The documents that stay, after every step that looks at all of them. None is empty."""
        documents = _drop_empty(documents, self._empty)
        for name, report in self._steps.items():
            step = _DOCUMENT_STEPS.get(name)
            documents = step(documents, report) if step else documents
        self.report.documents_after = len(documents)
        self.report.characters_after = sum(map(len, documents))
        return documents


def _drop_empty(documents: Sequence[str], report: StepReport) -> Sequence[str]:
    kept = []
    for index, document in enumerate(documents):
        if document.strip():
            kept.append(index)
        else:
            report.note_removal(document)
    return _chosen(documents, kept)


def _boilerplate(documents: Sequence[str], report: StepReport) -> Sequence[str]:
    boilerplate = find_boilerplate(documents)
    if not boilerplate:
        return documents
    kept = DocumentStore()
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
) -> Callable[[Sequence[str], StepReport], Sequence[str]]:
    """The step that drops the documents whose indices `find` gives."""

    def drop(documents: Sequence[str], report: StepReport) -> Sequence[str]:
        found = find(documents)
        for index in sorted(found):
            report.note_removal(documents[index])
        return _chosen(documents, [i for i in range(len(documents)) if i not in found])

    return drop


def _quality(documents: Sequence[str], report: StepReport) -> Sequence[str]:
    kept = []
    for index, document in enumerate(documents):
        fault = quality_fault(document)
        if fault is None:
            kept.append(index)
        else:
            report.note_removal(document, fault)
    return _chosen(documents, kept)


def _chosen(documents: Sequence[str], kept: Sequence[int]) -> Sequence[str]:
    return documents if len(kept) == len(documents) else ChosenDocuments(documents, kept)


_DOCUMENT_STEPS: dict[str, Callable[[Sequence[str], StepReport], Sequence[str]]] = {
    "boilerplate": _boilerplate,
    "duplicates": _without(exact_duplicates),
    "near-duplicates": _without(near_duplicates),
    "quality": _quality,
}
