"""What quantizing cost, measured: two models read the same text, and their logits are compared.

Every token of the text but the first of a window is predicted from those before it. All sums run
in float64, in the order of the text, so that the figures are the same every time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmserve.errors import DataError, ExportError

__all__ = ["Comparison", "compare_logits", "text_windows"]

_MAX_LOSS = 500.0  # nats per token; a uniform guess among a million tokens has 14
_NORMAL_95 = 1.96
_ROWS = 128  # rows of logits compared at once: bounds the working copies


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A candidate against a reference, over the same tokens."""

    num_tokens: int
    """Tokens that were predicted."""
    loss_before: float
    """Mean negative log likelihood of the reference, nats per token."""
    loss_after: float
    """The candidate's."""
    mean_kl: float
    """Mean Kullback-Leibler divergence of the candidate from the reference, nats per token."""
    top1_agreement: float
    """Share of tokens at which both think the same token likeliest, 0 to 1."""
    max_logit_error: float
    """Largest absolute difference of two logits."""
    kl_margin: float | None = None
    """Half the 95 % confidence interval of `mean_kl`, windows taken as independent; None: there was
    one window."""
    loss_margin: float | None = None
    """The same of `loss_after - loss_before`, pair by pair."""

    @property
    def perplexity_increase(self) -> float:
        """The candidate's perplexity over the reference's, less 1."""
        return math.expm1(self.loss_after - self.loss_before)

    @property
    def perplexity_before(self) -> float:
        """exp of the reference's loss."""
        return math.exp(self.loss_before)

    @property
    def perplexity_after(self) -> float:
        """exp of the candidate's loss."""
        return math.exp(self.loss_after)


def text_windows(ids: Sequence[int], *, length: int, bos_token_id: int | None) -> list[list[int]]:
    """Cut a text's ids (without BOS) into windows that a model of that context can read.

    Each window begins with BOS where there is one; the pieces do not overlap.

    Raises `DataError` if no window has two tokens.
    """
    start = [] if bos_token_id is None else [bos_token_id]
    step = length - len(start)
    windows = [[*start, *ids[at : at + step]] for at in range(0, len(ids), max(1, step))]
    windows = [window for window in windows if len(window) > 1]
    if not windows:
        raise DataError("the evaluation text is too short: at least two tokens are needed")
    return windows


@dataclass(slots=True)
class _Sums:
    num_tokens: int = 0
    loss_before: float = 0.0
    loss_after: float = 0.0
    kl: float = 0.0
    agreements: int = 0
    max_logit_error: float = 0.0
    windows: list[tuple[int, float, float]] = field(default_factory=list)
    """Tokens, KL and difference of losses of each window, summed."""

    def end_window(self) -> None:
        """Keep what came since the last call as one window."""
        ends = (self.num_tokens, self.kl, self.loss_after - self.loss_before)
        begun = [sum(column) for column in zip(*self.windows, strict=True)] or [0, 0.0, 0.0]
        self.windows.append((ends[0] - int(begun[0]), ends[1] - begun[1], ends[2] - begun[2]))

    def add(self, before: Tensor, after: Tensor, targets: Tensor) -> None:
        """Rows of logits [rows, vocabulary] of both models and the ids that came next [rows]."""
        log_before = before.double().log_softmax(-1)
        log_after = after.double().log_softmax(-1)
        chosen = targets[:, None]
        self.num_tokens += len(targets)
        self.loss_before -= float(log_before.gather(1, chosen).sum())
        self.loss_after -= float(log_after.gather(1, chosen).sum())
        self.kl += float((log_before.exp() * (log_before - log_after)).sum())
        self.agreements += int((before.argmax(-1) == after.argmax(-1)).sum())
        self.max_logit_error = max(self.max_logit_error, float((before - after).abs().max()))

    def comparison(self) -> Comparison:
        """The means. Raises `ExportError` if one of the models predicts nothing."""
        count = self.num_tokens
        losses = {"original": self.loss_before / count, "quantized": self.loss_after / count}
        for name, loss in losses.items():
            if not loss < _MAX_LOSS:  # NaN must fail too
                raise ExportError(
                    f"the {name} model's loss on the text is {loss} nats per token: its weights "
                    "are no working language model"
                )
        return Comparison(
            num_tokens=count,
            loss_before=losses["original"],
            loss_after=losses["quantized"],
            mean_kl=self.kl / count,
            top1_agreement=self.agreements / count,
            max_logit_error=self.max_logit_error,
            kl_margin=_margin([(tokens, kl) for tokens, kl, _ in self.windows]),
            loss_margin=_margin([(tokens, loss) for tokens, _, loss in self.windows]),
        )


def _margin(windows: list[tuple[int, float]]) -> float | None:
    """Half the 95 % interval of a mean per token, from each window's tokens and sum.

    The estimator of a ratio over clusters: tokens of one window are not independent. Source:
    Cochran, Sampling Techniques, 3rd edition, section 6.3.
    """
    if len(windows) < 2:
        return None
    count = len(windows)
    tokens = sum(size for size, _ in windows)
    mean = sum(total for _, total in windows) / tokens
    squares = sum((total - mean * size) ** 2 for size, total in windows)
    return _NORMAL_95 * math.sqrt(count / (count - 1) * squares) / tokens


@torch.inference_mode()
def compare_logits(
    before: Iterable[Tensor],
    after: Iterable[Tensor],
    windows: Sequence[Sequence[int]],
    *,
    on_window: Callable[[], None] = lambda: None,
) -> Comparison:
    """Compare what two models predict of each window.

    Raises `ExportError` if the loss of one is not finite (or beyond all sense: 500 nats).

    Args:
        before: the model's logits before, [length, vocabulary] for each window.
        after: the model's after.
        windows: token ids; the first of each is given, the others are predicted.
        on_window: called after each window, for progress.
    """
    sums = _Sums()
    for window, one, other in zip(windows, before, after, strict=True):
        targets = torch.tensor(list(window[1:]))
        for start in range(0, len(targets), _ROWS):
            rows = slice(start, min(start + _ROWS, len(targets)))
            sums.add(one[rows].float(), other[rows].float(), targets[rows])
        sums.end_window()
        on_window()
    return sums.comparison()
