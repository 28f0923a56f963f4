"""How many tokens to guess, and whether to guess at all: as many as pay.

A guess costs a row in the step, and saves a step if it is right. With acceptance a, k guesses bring
(1 - a^(k+1)) / (1 - a) tokens on average (Leviathan et al. 2023, arXiv:2211.17192, section 3.1),
and
what a step costs was measured at load. Of all numbers of guesses the policy takes those that bring
the step the most tokens a second. Alone on a machine a sequence gets guesses that are nearly free;
in a large batch, or beside a long prompt, every row costs in full, and only sure guesses pay.

What it decides follows from what it was asked and told before and from nothing else, in sums and
products of a fixed order: a recorded run, played again, decides alike on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError
from .config import SpeculationConfig, StepCost

__all__ = ["SpeculationPolicy", "best_counts"]

DEFAULT_COST = StepCost(base_s=32.0, token_s=1.0)
"""Where nothing was measured: a step costs as much as 32 tokens in it. Only the ratio matters."""
DEFAULT_DRAFT_SHARE = 0.1
"""What a draft model's step costs beside the target's, where it was not measured."""
SEQUENCE_MEMORY = 0.95
"""Weight of an observation of a sequence after the next one: the last 20 or so count."""
ENGINE_MEMORY = 0.99
FIRST_WAIT = 16
"""Steps of a sequence without guesses until it is probed. Each probe that fails doubles it."""
LONGEST_WAIT = 256
PROBE_TOKENS = 2


class _Acceptance:
    """Exponential mean of how many guesses are right, begun with a prior worth one guess."""

    __slots__ = ("_memory", "_num_right", "_num_tried", "mean")

    def __init__(self, prior: float, memory: float) -> None:
        self.mean = prior
        self._memory = memory
        self.restart()

    def restart(self) -> None:
        """Let all that was seen so far weigh as one guess."""
        self._num_right, self._num_tried = self.mean, 1.0

    def observe(self, num_drafted: int, num_accepted: int) -> None:
        """Take in one step. Guesses behind the first wrong one were not tried."""
        num_tried = num_accepted + (num_accepted < num_drafted)
        self._num_right = self._num_right * self._memory + num_accepted
        self._num_tried = self._num_tried * self._memory + num_tried
        self.mean = self._num_right / self._num_tried


@dataclass(slots=True)
class _Sequence:
    """What is known of one sequence's guesses."""

    acceptance: _Acceptance
    wait: int
    """Steps without guesses until the next probe; 0: it is being probed."""
    next_wait: int
    """The wait after that probe, if it fails."""


class SpeculationPolicy:
    """Guesses per sequence and step, and counts of what came of them.

    A sequence for which guesses do not pay gets none, but is probed now and then, so that it comes
    back when its text turns predictable, or the batch small. A new sequence begins with the
    acceptance that the engine has seen lately, and an engine with 1.
    """

    def __init__(
        self,
        config: SpeculationConfig,
        step_cost: StepCost | None,
        draft_cost: StepCost | None,
    ) -> None:
        """Costs are those of the target's and, for the method `draft`, the draft model's steps.

        One that is None was not measured: a step of the target then counts as much as 32 tokens in
        it, and a step of the draft model a tenth of the target's.

        Raises:
            ConfigError: `draft_cost` is given without `step_cost`, or for another method.
        """
        if draft_cost is not None and (step_cost is None or config.method != "draft"):
            raise ConfigError("draft_cost is for the method 'draft', and goes with step_cost")
        self._config = config
        self._cost = step_cost or DEFAULT_COST
        self._row_s = self._cost.token_s
        self._depth_s = 0.0
        if config.method == "draft":
            share = DEFAULT_DRAFT_SHARE
            self._row_s += draft_cost.token_s if draft_cost else share * self._cost.token_s
            self._depth_s = draft_cost.base_s if draft_cost else share * self._cost.base_s
        self._acceptance = _Acceptance(1.0, ENGINE_MEMORY)
        self._sequences: dict[int, _Sequence] = {}
        self._num_started = 0
        self._first_wait = FIRST_WAIT
        self.num_drafts = 0
        """Times that tokens were guessed for a sequence."""
        self.num_draft_tokens = 0
        """Tokens guessed."""
        self.num_accepted_tokens = 0
        """Guesses that were right."""
        self.accepted_per_position = [0] * config.num_draft_tokens
        """Those at the first, second, ... place."""

    def plan(self, keys: list[int], num_other_tokens: int) -> list[int]:
        """How many tokens to guess for each decoding sequence of a step.

        Args:
            keys: The sequences, each with one token in the step.
            num_other_tokens: What else the step computes.
        """
        most = self._config.num_draft_tokens
        if self._config.is_always_on:
            return [most] * len(keys)
        sequences = [self._sequences.get(key) or self._start(key) for key in keys]
        means = [sequence.acceptance.mean for sequence in sequences]
        num_tokens = len(keys) + num_other_tokens
        counts = best_counts(
            means,
            num_tokens=num_tokens,
            seconds=self._cost.seconds(num_tokens),
            row_s=self._row_s,
            depth_s=self._depth_s,
            most=most,
        )
        for place, sequence in enumerate(sequences):
            if counts[place]:
                sequence.wait, sequence.next_wait = FIRST_WAIT, 2 * FIRST_WAIT
            else:
                counts[place] = self._probe(sequence)
        return counts

    def observe(self, key: int, num_drafted: int, num_accepted: int) -> None:
        """Take in that of `num_drafted` guesses for a sequence the first `num_accepted` were right.

        A sequence that was never planned for, or was forgotten since, counts for the engine alone.
        """
        if not num_drafted:
            return
        self.num_drafts += 1
        self.num_draft_tokens += num_drafted
        self.num_accepted_tokens += num_accepted
        for place in range(num_accepted):
            self.accepted_per_position[place] += 1
        self._acceptance.observe(num_drafted, num_accepted)
        sequence = self._sequences.get(key)
        if sequence is None:
            return
        sequence.acceptance.observe(num_drafted, num_accepted)
        if not sequence.wait:
            self._first_wait = sequence.wait = sequence.next_wait
            sequence.next_wait = min(2 * sequence.wait, LONGEST_WAIT)

    def forget(self, key: int) -> None:
        """Drop what is known of a sequence."""
        self._sequences.pop(key, None)

    def check(self, keys: set[int]) -> None:
        """Raise AssertionError if something is kept of a sequence that is not among `keys`."""
        assert self._sequences.keys() <= keys, "an estimate outlived its sequence"

    def _start(self, key: int) -> _Sequence:
        """A new sequence, which waits for its probes, if it must, as long as others had to lately.

        First probes are spread over that wait: not all come in one step, and some at once, so that
        the engine learns of better times even where all sequences are short.
        """
        wait = 1 + self._num_started % self._first_wait
        acceptance = _Acceptance(self._acceptance.mean, SEQUENCE_MEMORY)
        sequence = _Sequence(acceptance, wait, min(2 * self._first_wait, LONGEST_WAIT))
        self._sequences[key] = sequence
        self._num_started += 1
        return sequence

    def _probe(self, sequence: _Sequence) -> int:
        """Guesses for a sequence for which they do not pay: none, or a few to see what has changed.

        A probe goes on until something was guessed, and looks afresh.
        """
        if sequence.wait:
            sequence.wait -= 1
        if sequence.wait:
            return 0
        sequence.acceptance.restart()
        return min(PROBE_TOKENS, self._config.num_draft_tokens)


def best_counts(
    means: list[float],
    *,
    num_tokens: int,
    seconds: float,
    row_s: float,
    depth_s: float,
    most: int,
) -> list[int]:
    """Guesses per sequence, 0..`most`, that bring a step the most tokens a second.

    A ratio is at its largest r where tokens - r * seconds, at its largest, is 0 (Dinkelbach 1967,
    "On Nonlinear Fractional Programming"). So: the best choice if a second is worth r tokens, then
    the r that this choice reaches, until it grows no more; two or three rounds. Prompt tokens count
    like others: a guess takes the time in which one could be computed.

    Args:
        means: Acceptance of each sequence's guesses.
        num_tokens: Tokens of the step without guesses.
        seconds: What it takes without them.
        row_s: Seconds more for each guess.
        depth_s: Seconds more for the first, second, ... guess, however many sequences make it.
        most: Guesses allowed for each.
    """
    best = [0] * len(means)
    rate = num_tokens / seconds
    while True:
        counts, gain, num_rows, num_depths = _choose(means, rate * row_s, rate * depth_s, most)
        reached = (num_tokens + gain) / (seconds + row_s * num_rows + depth_s * num_depths)
        if reached <= rate:
            return best
        best, rate = counts, reached


def _choose(
    means: list[float], row: float, depth: float, most: int
) -> tuple[list[int], float, int, int]:
    """The best guesses where a row costs `row` tokens and a depth `depth`; gain, rows and depths.

    The guess at place p (0, 1, ...) comes true with chance mean^(p + 1). It is worth its row if
    that
    is above the row's cost; a place is worth its draft step if what its guesses gain beyond their
    rows is above the step's cost. Both fall with p.
    """
    gains, numbers, counts = [0.0] * most, [0] * most, []
    for mean in means:
        chance, place = mean, 0
        while place < most and chance > row:
            gains[place] += chance
            numbers[place] += 1
            place += 1
            chance *= mean
        counts.append(place)
    deepest = 0
    while deepest < most and gains[deepest] - row * numbers[deepest] > depth:
        deepest += 1
    if deepest < most:
        counts = [min(count, deepest) for count in counts]
    return counts, sum(gains[:deepest]), sum(numbers[:deepest]), deepest
