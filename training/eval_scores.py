"""Scores of answers against what was wanted: accuracy, F1, exact match, and their uncertainty.

Exact match and token F1 compare answers as SQuAD's own script does (arXiv:1606.05250, section 6):
without case, punctuation, articles and spacing. Intervals come from a bootstrap over documents or
rows: what would the figure be on as many others from the same source? All scores are 0..1.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = [
    "Interval",
    "accuracy",
    "bootstrap",
    "confusion",
    "exact_match",
    "f1_scores",
    "macro_f1",
    "normalized_answer",
    "token_f1",
]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_RESAMPLES = 1000


def confusion(
    wanted: Sequence[str], found: Sequence[str], labels: Sequence[str]
) -> npt.NDArray[np.float64]:
    """[rows, L * L], a 1 where row's wanted label (line) and found one (column) meet.

    Its sum over rows is what the figures below take. Every answer must be one of the L labels.
    """
    place_of = {label: index for index, label in enumerate(labels)}
    parts = np.zeros((len(wanted), len(labels) ** 2))
    for row, (w, f) in enumerate(zip(wanted, found, strict=True)):
        parts[row, place_of[w] * len(labels) + place_of[f]] = 1.0
    return parts


def accuracy(sums: npt.NDArray[np.float64]) -> float:
    """Share of answers that are the wanted ones, of a sum of `confusion`."""
    table = _table(sums)
    return float(table.trace() / table.sum())


def f1_scores(sums: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """F1 of each label, of a sum of `confusion`: the harmonic mean of precision and recall.

    0 for a label that is never right; NaN for one that occurs on neither side.
    """
    table = _table(sums)
    occurrences = table.sum(axis=0) + table.sum(axis=1)
    with np.errstate(invalid="ignore"):
        scores: npt.NDArray[np.float64] = 2 * table.diagonal() / occurrences
    return scores


def macro_f1(sums: npt.NDArray[np.float64]) -> float:
    """Mean F1 of the labels that occur on either side."""
    return float(np.nanmean(f1_scores(sums)))


def _table(sums: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    size = math.isqrt(len(sums))
    return sums.reshape(size, size)


def normalized_answer(text: str) -> str:
    """Without case, punctuation, English articles and spacing."""
    text = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(found: str, wanted: Sequence[str]) -> float:
    """1 if the answer is one of those wanted, once both are normalized; else 0."""
    return float(normalized_answer(found) in {normalized_answer(answer) for answer in wanted})


def token_f1(found: str, wanted: Sequence[str]) -> float:
    """F1 of the words of the answer and of the wanted one that it is most like."""
    return max(_overlap(normalized_answer(found), normalized_answer(w)) for w in wanted)


def _overlap(found: str, wanted: str) -> float:
    words, others = found.split(), wanted.split()
    if not words or not others:
        return float(words == others)
    shared = sum((Counter(words) & Counter(others)).values())
    return 2 * shared / (len(words) + len(others))


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure and between which bounds 95 of 100 bootstrap samples have it."""

    value: float
    low: float
    high: float


def bootstrap(
    parts: npt.NDArray[np.float64], figure: Callable[[npt.NDArray[np.float64]], float], *, seed: int
) -> Interval:
    """A figure of sums, with its 95 % interval (percentile bootstrap, Efron 1979).

    Args:
        parts: [documents, quantities], what each document adds to each sum.
        figure: From the sums [quantities] to the figure.
        seed: Of the resampling.
    """
    random = np.random.default_rng(seed)
    samples = []
    for _ in range(_RESAMPLES):
        counts = np.bincount(random.integers(len(parts), size=len(parts)), minlength=len(parts))
        samples.append(figure(counts @ parts))
    low, high = np.percentile(samples, (2.5, 97.5))
    return Interval(figure(parts.sum(axis=0)), float(low), float(high))
