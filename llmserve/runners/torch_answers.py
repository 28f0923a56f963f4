"""What a step is asked for, made of its hidden states: tokens, log-probabilities, sums, scores.

`HostAnswers` copies logits to the host and samples there, at once. `DeviceAnswers` begins
everything where the logits are and lets the small results come over while the host goes on; they
are waited for when the step is collected.

Shapes: T tokens of the step, E hidden_size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import EngineError
from .model_facts import sum_hidden
from .protocol import Batch, HiddenSum, IntArray, PromptRows, StepResult, TokenLogprobs
from .sampler import prompt_logprobs, sample
from .torch_logprobs import entries, log_probabilities
from .torch_sampling import DeviceSampler, Drawn
from .torch_transfer import Download, Parcel, upload

__all__ = ["Answers", "DeviceAnswers", "HostAnswers", "OutputLayers", "works_ahead"]

_PROMPT_SLICE = 64
"""Rows of logits made at once for the log-probabilities of a prompt."""


@dataclass(frozen=True, slots=True)
class OutputLayers:
    """What a model makes of hidden states."""

    logits: Callable[[Tensor], Tensor]
    """[n, E] → float32 [n, V]"""
    scores: Callable[[Tensor], Tensor]
    """One state [E] → float32 [labels]: a score does not depend on how many are asked for."""


class Answers(Protocol):
    """The end of a step."""

    def begin(self, batch: Batch, hidden: Tensor) -> Callable[[], StepResult]:
        """Begin with what `batch` asks of its hidden states [T, E]; what is returned waits for it.

        The batch's rows are read now; they may change afterwards.
        """

    def drawn(self, rows: IntArray) -> Tensor:
        """What those rows of the last step draw, where the model takes its tokens."""


def works_ahead(device: torch.device) -> bool:
    """Whether the host goes on while a device computes; then sampling is done there, too.

    On a CPU numpy samples sooner than torch (docs/gpu.md).
    """
    return device.type == "cuda"


class HostAnswers:
    """Computes everything in `begin`. Implements `Answers`."""

    def __init__(self, layers: OutputLayers) -> None:
        self._layers = layers

    def begin(self, batch: Batch, hidden: Tensor) -> Callable[[], StepResult]:
        """See `Answers`."""
        result = StepResult(token_ids=np.empty(0, dtype=np.int64))
        if batch.sampling:
            drawn_from = hidden
            if len(batch.logits_indices) != len(hidden):
                drawn_from = hidden[torch.from_numpy(batch.logits_indices).to(hidden.device)]
            result = sample(self._logits(drawn_from), batch.sampling)
        result.prompt_logprobs = [self._prompt_logprobs(hidden, rows) for rows in batch.prompt_rows]
        result.hidden_sums = [
            sum_hidden(hidden[wanted.start : wanted.stop].double().cpu().numpy(), wanted)
            for wanted in batch.hidden_sums
        ]
        result.head_scores = [
            [self._layers.scores(state).tolist() for state in hidden[rows.start : rows.stop]]
            for rows in batch.head_rows
        ]
        return lambda: result

    def drawn(self, rows: IntArray) -> Tensor:
        """Not here: who samples on the host knows the tokens before the next step."""
        raise EngineError("tokens are drawn on the host: collect the step and name them")

    def _logits(self, hidden: Tensor) -> npt.NDArray[np.float32]:
        logits: npt.NDArray[np.float32] = self._layers.logits(hidden).cpu().numpy()
        return logits

    def _prompt_logprobs(self, hidden: Tensor, rows: PromptRows) -> list[TokenLogprobs]:
        made: list[TokenLogprobs] = []
        for start, targets in _slices(rows):
            logits = self._logits(hidden[start : start + len(targets)])
            made += prompt_logprobs(logits, targets, rows.num_top)
        return made


class DeviceAnswers:
    """Begins everything on the device of the hidden states. Implements `Answers`."""

    def __init__(self, layers: OutputLayers, device: torch.device) -> None:
        self._layers, self._device = layers, device
        self._sampler = DeviceSampler(device)
        self._drawn: Drawn | None = None

    def begin(self, batch: Batch, hidden: Tensor) -> Callable[[], StepResult]:
        """See `Answers`."""
        parcel = Parcel()
        indices = parcel.add(batch.logits_indices)
        slices = [
            (rows, start, parcel.add(targets))
            for rows in batch.prompt_rows
            for start, targets in _slices(rows)
        ]
        parcel.send(self._device)
        drawn = self._drawn = None
        if batch.sampling:
            is_every = len(batch.logits_indices) == len(hidden)
            drawn_from = hidden if is_every else hidden[indices.there]
            positions = batch.positions[batch.logits_indices] + 1
            logits = self._layers.logits(drawn_from)
            drawn = self._drawn = self._sampler.draw(logits, batch.sampling, positions)
        tensors = [] if drawn is None else drawn.tensors()
        for rows, start, targets in slices:
            logits = self._layers.logits(hidden[start : start + len(targets.there)])
            tensors += log_probabilities(logits, targets.there, rows.num_top)
        tensors += [hidden[wanted.start : wanted.stop].double() for wanted in batch.hidden_sums]
        for head in batch.head_rows:
            states = hidden[head.start : head.stop]
            tensors.append(torch.stack([self._layers.scores(state) for state in states]).double())
        download = Download(tensors)
        return lambda: _read(download, drawn, batch.prompt_rows, batch.hidden_sums)

    def drawn(self, rows: IntArray) -> Tensor:
        """See `Answers`; the host does not learn them."""
        assert self._drawn is not None, "a step goes on from one that drew nothing"
        return self._drawn.token_ids()[upload([rows], self._device)[0]]


def _read(
    download: Download, drawn: Drawn | None, prompts: list[PromptRows], sums: list[HiddenSum]
) -> StepResult:
    """The result of a step on a device, once it is there."""
    arrays = iter(download.wait())
    result = StepResult(token_ids=np.empty(0, dtype=np.int64))
    if drawn is not None:
        result = drawn.result(arrays)
    result.prompt_logprobs = [
        [
            entry
            for _, targets in _slices(rows)
            for entry in entries(islice(arrays, 3), [rows.num_top] * len(targets))
        ]
        for rows in prompts
    ]
    result.hidden_sums = [sum_hidden(next(arrays), wanted) for wanted in sums]
    result.head_scores = [scores.tolist() for scores in arrays]
    return result


def _slices(rows: PromptRows) -> Iterator[tuple[int, list[int]]]:
    """Packed index and targets of pieces, so that a long prompt's logits are never held at once."""
    for place in range(0, len(rows.targets), _PROMPT_SLICE):
        yield rows.start + place, rows.targets[place : place + _PROMPT_SLICE]
