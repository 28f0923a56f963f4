"""What one form's logits are beside the original's: errors, divergence, agreement, perplexity.

Shapes: n places, V vocabulary, L tokens of a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from llmserve.quant.dtypes import Float32Array

from .certificate import FormResult

__all__ = ["FormFigures"]

_MAX_POINTS = 200
_Z95 = 1.959963984540054


@dataclass(slots=True)
class FormFigures:
    """Sums over the windows of a form."""

    num_rows: int = 0
    num_logits: int = 0
    error: float = 0.0
    max_error: float = 0.0
    kl: float = 0.0
    agreements: int = 0
    losses: list[npt.NDArray[np.float64]] = field(default_factory=list)
    points: list[tuple[float, float]] = field(default_factory=list)

    def add(
        self, wanted: Float32Array, found: Float32Array, places: Sequence[int], ids: Sequence[int]
    ) -> None:
        """One window: the original's logits at `places` [n, V], the form's at all [L, V]."""
        rows = found[list(places)].astype(np.float64)
        before = wanted.astype(np.float64)
        errors = np.abs(before - rows)
        self.max_error = float(np.maximum(self.max_error, errors.max()))  # NaN stays
        self.error += float(errors.sum())
        self.num_logits += errors.size
        self.num_rows += len(rows)
        log_before, log_after = _log_softmax(before), _log_softmax(rows)
        self.kl += float((np.exp(log_before) * (log_before - log_after)).sum())
        self.agreements += int((before.argmax(-1) == rows.argmax(-1)).sum())
        targets = np.array(ids[1:])
        logs = _log_softmax(found[:-1].astype(np.float64))
        self.losses.append(-logs[np.arange(len(targets)), targets])
        step = max(1, before.size // 40)
        self.points += zip(
            before.ravel()[::step].tolist(), rows.ravel()[::step].tolist(), strict=True
        )

    def result(self, name: str, executed_form: str) -> FormResult:
        """The means."""
        losses = np.concatenate(self.losses)
        mean = float(losses.mean())
        half = _Z95 * float(losses.std(ddof=1)) / np.sqrt(len(losses)) if len(losses) > 1 else 0.0
        return FormResult(
            name=name,
            executed_form=executed_form,
            num_rows=self.num_rows,
            max_logit_error=self.max_error,
            mean_logit_error=self.error / self.num_logits,
            mean_kl=max(0.0, self.kl / self.num_rows) if self.kl == self.kl else self.kl,
            top1_agreement=self.agreements / self.num_rows,
            perplexity=_exp(mean),
            perplexity_low=_exp(mean - half),
            perplexity_high=_exp(mean + half),
            scatter=tuple((round(x, 4), round(y, 4)) for x, y in self.points[:_MAX_POINTS]),
        )


def _log_softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def _exp(value: float) -> float:
    """e to the power of a loss; of what is beyond all sense, the largest that is written."""
    return float(np.exp(np.minimum(value, 500.0)))
