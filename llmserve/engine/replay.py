"""Plays a step log again and says whether everything comes out as it was.

Without a model the recorded draws stand for the runner, and grammars allow everything, so that the
engine's decisions are checked alone, in no time; with one, its draws are checked too. The guesses
of a speculating run are the recorded ones; how many there were is decided anew.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError, EngineError, RequestError
from ..runners.protocol import (
    Batch,
    IntArray,
    MaskArray,
    Runner,
    RunnerInfo,
    StepResult,
    TokenLogprobs,
)
from ..runners.rounds import repeat
from .drafting import DraftRequest
from .engine import Engine
from .grammar import Grammar, Matcher
from .request import FinishReason
from .step import Step
from .step_log import drawn_record, parse_engine, parse_request, read_log, work_record
from .watcher import Watcher

__all__ = ["ReplayReport", "replay"]

Record = list[Any]

OUTCOMES = ("work", "drawn")
REASONS = frozenset(FinishReason)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayReport:
    """What came of playing a log again."""

    num_requests: int
    num_steps: int
    num_tokens: int
    """Tokens drawn."""
    num_preemptions: int
    difference: str | None
    """Where the run first went another way; None: it did not."""


Compile = Callable[[Grammar], Matcher]


def replay(
    path: Path, runner: Runner | None = None, compile_grammar: Compile | None = None
) -> ReplayReport:
    """Play the log at `path` again, with the recorded draws or with those of `runner`.

    Args:
        path: The log.
        runner: None: nothing is computed.
        compile_grammar: Beside a runner, for the requests that have grammars.

    Raises:
        DataError: the file is no step log, or was cut in the middle of a step's records.
        ConfigError: the runner's cache groups are not those of the recorded engine.
    """
    return _Replay(path, runner, compile_grammar or _Unmasked).run()


class _Replay:
    """One pass over a log."""

    def __init__(self, path: Path, runner: Runner | None, compile_grammar: Compile) -> None:
        self._compile = compile_grammar
        self._records = read_log(path)
        first = next(self._records, None)
        if first is None:
            raise DataError(f"{path}: the log is empty")
        info, config, overlaps = parse_engine(first)
        self._outcome = _Outcome()
        self._runner = _RecordedRunner(info, overlaps, self._outcome, runner)
        drafter = None if config.speculation is None else _RecordedDrafter(self._outcome)
        self._engine = Engine(self._runner, config, drafter=drafter, watcher=self._outcome)
        self._num_requests = 0

    def run(self) -> ReplayReport:
        for record, outcome in _grouped(self._records):
            self._play(record, outcome)
            if self._outcome.difference is not None:
                break
        stats = self._engine.stats()
        return ReplayReport(
            num_requests=self._num_requests,
            num_steps=stats.num_steps,
            num_tokens=self._outcome.num_tokens,
            num_preemptions=stats.num_preemptions,
            difference=self._outcome.difference,
        )

    def _play(self, record: Record, outcome: list[Record]) -> None:
        match record:
            case ["add", dict() as values]:
                self._add(values)
            case ["abort", str() as request_id, str() as reason] if reason in REASONS:
                self._engine.abort(request_id, FinishReason(reason))
            case ["finish", str() as request_id, int() as choice_index]:
                self._engine.finish(request_id, choice_index)
            case ["fail", str() as error]:
                self._engine.fail_running(error)
            case ["now", int() | float() as now]:
                self._step(float(now), outcome)
            case _:
                raise DataError(f"the step log holds a record that cannot be played: {record[:3]}")

    def _add(self, values: dict[str, Any]) -> None:
        self._num_requests += 1
        try:
            request = parse_request(values)
            grammar = request.grammar
            self._engine.add_request(request, None if grammar is None else self._compile(grammar))
        except RequestError as error:
            self._outcome.differ(f"a request is refused now: {error}")

    def _step(self, now: float, outcome: list[Record]) -> None:
        self._outcome.expect(now, outcome)
        try:
            self._engine.step(now)
        except _StepFailedError:
            return  # as it did then: the record of it comes next
        self._outcome.settle()


def _grouped(records: Iterator[Record]) -> Iterator[tuple[Record, list[Record]]]:
    """Each record of what came in, with those of what came of it."""
    current: Record | None = None
    outcome: list[Record] = []
    for record in records:
        if record[0] in OUTCOMES and current is not None:
            outcome.append(_checked(record))
            continue
        if current is not None:
            yield current, outcome
        current, outcome = record, []
    # A run that was killed may have left its last step without an outcome: it is not played.
    if current is not None and (current[0] != "now" or outcome):
        yield current, outcome


def _checked(record: Record) -> Record:
    """An outcome whose parts are lists; what is in them is compared and need not be sound."""
    match record:
        case ["drawn", list(), list()]:
            return record
        case ["work", list() as work, list()] if all(
            isinstance(entry, list) and len(entry) == 4 and isinstance(entry[3], list)
            for entry in work
        ):
            return record
    raise DataError(f"the step log holds an outcome that cannot be read: {record[0]!r}")


class _StepFailedError(EngineError):
    """The recorded step failed here."""


class _Outcome(Watcher):
    """Compares what the engine does now with what it did then."""

    def __init__(self) -> None:
        self.difference: str | None = None
        self.num_tokens = 0
        self._now = 0.0
        self._expected: deque[Record] = deque()

    def expect(self, now: float, outcome: list[Record]) -> None:
        """The records of the step that is about to be played."""
        self._now = now
        self._expected = deque(outcome)

    def settle(self) -> None:
        """The step is over: nothing recorded may be left."""
        if self._expected:
            self.differ(f"then came {self._expected[0]}, now nothing")

    def next_drawn(self) -> Record | None:
        """The recorded draws that come next, if the step got so far."""
        return next((record for record in self._expected if record[0] == "drawn"), None)

    def drafts(self, uid: int) -> list[int]:
        """The recorded guesses of a sequence in this step."""
        for record in self._expected:
            for entry in record[1] if record[0] == "work" else ():
                if entry[0] == uid:
                    return list(entry[3])
        return []

    def differ(self, what: str) -> None:
        """Note the first difference."""
        if self.difference is None:
            self.difference = f"at {self._now}: {what}"

    def scheduled(self, step: Step) -> None:
        """Compare a step's work."""
        self._compare(work_record(step))

    def collected(self, result: StepResult) -> None:
        """Compare a step's tokens."""
        self.num_tokens += len(result.token_ids)
        self._compare(drawn_record(result))

    def _compare(self, record: Record) -> None:
        then = self._expected.popleft() if self._expected else None
        if then != record:
            self.differ(f"then {then}, now {record}")


class _Unmasked:
    """Allows every token: the recorded ones are drawn anyway. Implements `Matcher`."""

    def __init__(self, _grammar: Grammar) -> None:
        """Whatever the grammar is."""

    def copy(self) -> Matcher:
        return self

    def advance(self, token_ids: list[int]) -> None:
        """Nothing is kept."""

    def mask(self) -> MaskArray:
        return np.empty(0, dtype=np.uint32)

    def error(self) -> str | None:
        return None


class _RecordedRunner:
    """Draws what was drawn then, or lets another runner draw. Implements `Runner`."""

    def __init__(
        self, info: RunnerInfo, overlaps: bool, outcome: _Outcome, inner: Runner | None
    ) -> None:
        self.info = info
        if inner is not None:
            # When steps are chosen is the engine's decision then, whatever computes them now.
            self.info = changed(
                inner.info, feeds_tokens=info.feeds_tokens, repeats_decodes=info.repeats_decodes
            )
        self.overlaps = overlaps
        self._outcome = outcome
        self._inner = inner
        self._batches: deque[Batch] = deque()
        self._drawn: IntArray = np.empty(0, dtype=np.int64)
        self._block_size = 1

    def allocate_cache(self, num_blocks: tuple[int, ...], block_size: int) -> None:
        self._block_size = block_size
        if self._inner is not None:
            self._inner.allocate_cache(num_blocks, block_size)

    def submit(self, batch: Batch) -> None:
        """Nothing is computed before it is collected: what the step goes on from is known then."""
        self._batches.append(batch)

    def collect(self) -> StepResult:
        record = self._outcome.next_drawn()
        if record is None:
            self._batches.clear()
            raise _StepFailedError("the recorded step failed")
        batch = self._batches.popleft()
        if self._inner is None:
            return _result(record, batch)
        if batch.fed_rows is not None:
            batch = changed(batch, token_ids=self._drawn[batch.fed_rows], fed_rows=None)
        result = repeat(self._compute, batch, self._block_size)
        self._drawn = result.token_ids
        return result

    def _compute(self, batch: Batch) -> StepResult:
        """One round, which every runner takes."""
        assert self._inner is not None
        self._inner.submit(batch)
        return self._inner.collect()

    def close(self) -> None:
        self._batches.clear()


def _result(record: Record, batch: Batch) -> StepResult:
    """The recorded draws; what else was asked for is answered with zeros, which decide nothing."""
    try:
        token_ids = np.array(record[1], dtype=np.int64)
        is_finite = np.ones(len(token_ids), dtype=np.bool_)
        is_finite[record[2]] = False
    except (IndexError, TypeError, ValueError) as error:
        raise DataError(f"the step log holds draws that cannot be read: {error}") from error
    return StepResult(
        token_ids=token_ids,
        is_finite=is_finite,
        prompt_logprobs=[
            [TokenLogprobs(0.0, ())] * len(rows.targets) for rows in batch.prompt_rows
        ],
        hidden_sums=[np.zeros(1) for _ in batch.hidden_sums],
        head_scores=[[[0.0]] * (rows.stop - rows.start) for rows in batch.head_rows],
    )


class _RecordedDrafter:
    """Guesses what was guessed then. Implements `Drafter`."""

    reads_blocks = False

    def __init__(self, outcome: _Outcome) -> None:
        self._outcome = outcome

    def propose(self, requests: list[DraftRequest]) -> list[list[int]]:
        return [self._outcome.drafts(request.key)[: request.num_tokens] for request in requests]

    def forget(self, key: int) -> None:
        """Nothing is kept."""

    def check(self, keys: set[int]) -> None:
        """Nothing is kept."""
