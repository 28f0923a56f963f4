"""A cost model from a real runner: time its steps, then fit the coefficients to the times.

The engine makes the steps, from a few loads of growing size: prompts in chunks, decodes of one to
many sequences at short and long contexts, and both together. What is timed is the engine's whole
step, scheduling included: with a small model that is a third of it. Where the runner takes several
rounds in a step, some of the steps have them: that tells what is paid once from what each round
costs, in the runner too, whose threads sleep between two steps. Each load is run several times,
and each of its steps counts with its shortest time: what else a machine does can only add. The fit
minimizes relative errors, so that short steps count as much as long ones, and keeps every
coefficient at 0 or above.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

from llmserve.engine.config import EngineConfig
from llmserve.engine.request import Request
from llmserve.errors import ConfigError, EngineError
from llmserve.runners.protocol import Batch, Runner, StepResult
from llmserve.sampling import SamplingParams
from llmserve.startup import EngineOptions, start_engine

from .cost_model import UNITS, CostModel, features

__all__ = ["CostFit", "fit_cost_model", "non_negative_least_squares"]

Clock = Callable[[], float]
FloatArray = npt.NDArray[np.float64]

NUM_SEQUENCES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTEXT_SHARES = (0.1, 0.4, 0.8)
LONGEST_PROMPT = 2048
STEPS_TOGETHER = 8
"""Steps in which a load's sequences decode together. Of every so many steps of a load the last one
has several rounds, where it only decodes and the runner takes them."""
ROUNDING = 1e-12
REPEATS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class CostFit:
    """A fitted model and how far it is from what was measured."""

    cost: CostModel
    num_steps: int
    """Different steps measured."""
    median_error: float
    """Of |predicted / measured - 1| over the steps."""
    p90_error: float
    """Nine of ten steps are nearer than this."""
    total_error: float
    """Predicted over measured time of all steps together, minus 1."""
    most_tokens: int
    """Tokens of the largest step measured."""
    most_sequences: int
    most_context: int
    """Context tokens of the step that read the most."""

    def __str__(self) -> str:
        return (
            f"{self.cost}\nfitted to {self.num_steps} steps of up to {self.most_tokens} tokens, "
            f"{self.most_sequences} sequences and {self.most_context} context tokens; error of a "
            f"step: median {self.median_error:.1%}, 9 of 10 within {self.p90_error:.1%}; "
            f"of all together {self.total_error:+.1%}"
        )


def fit_cost_model(
    runner: Runner,
    *,
    max_num_seqs: int,
    max_batched_tokens: int,
    max_s: float = 20.0,
    clock: Clock = time.perf_counter,
) -> CostFit:
    """Time `runner` under the loads that the limits allow, and fit.

    Several rounds in a step are timed where the runner takes them. Loads come in growing size; the
    last one is that during which `max_s` seconds have passed. The runner's cache is allocated, so
    it is not to be used for anything else afterwards.

    Raises:
        ConfigError: the model's context is too short to be timed.
    """
    engine = _TimedEngine(
        runner,
        EngineOptions(
            max_num_seqs=max_num_seqs,
            max_batched_tokens=max_batched_tokens,
            has_prefix_cache=False,
        ),
        clock,
    )
    start_s = clock()
    rows: list[tuple[int, ...]] = []
    seconds: list[float] = []
    loads = _loads(engine.config)
    if not loads:
        raise ConfigError(
            f"a context of {engine.config.max_seq_len} tokens is too short to time steps in"
        )
    engine.run(loads[0])  # first calls allocate
    for load in loads:
        runs = [engine.run(load) for _ in range(REPEATS)]
        rows += engine.features
        seconds += np.min(runs, axis=0).tolist()
        if clock() - start_s > max_s:
            break
    return _fit(np.array(rows, dtype=np.float64), np.array(seconds))


class _NotingRunner:
    """A runner that computes its steps in `submit` and notes what they were."""

    overlaps = False

    def __init__(self, runner: Runner) -> None:
        self.info = runner.info
        self.features: list[tuple[int, ...]] = []
        """Of each step."""
        self._runner = runner
        self._result: StepResult | None = None

    def allocate_cache(self, num_blocks: tuple[int, ...], block_size: int) -> None:
        self._runner.allocate_cache(num_blocks, block_size)

    def submit(self, batch: Batch) -> None:
        self.features.append(features(batch))
        self._runner.submit(batch)
        self._result = self._runner.collect()

    def collect(self) -> StepResult:
        assert self._result is not None, "no step is under way"
        return self._result

    def close(self) -> None:
        self._runner.close()


@dataclass(frozen=True, slots=True)
class _Load:
    """Equal requests that begin together."""

    num_sequences: int
    input_len: int
    output_len: int

    def requests(self) -> Iterator[Request]:
        """All of them."""
        params = SamplingParams(max_tokens=self.output_len, ignore_eos=True, temperature=0.0)
        for index in range(self.num_sequences):
            # Which ids they are does not matter to the time; 0 is in every vocabulary.
            yield Request(
                request_id=f"fit-{index}",
                prompt_token_ids=[0] * self.input_len,
                sampling_params=params,
                seed=0,
            )


class _TimedEngine:
    """An engine whose steps are timed, and whose rounds are the same in each run of a load.

    How many rounds a step has follows from the time that the engine is told, so it is told one that
    has nothing to do with the clock.
    """

    def __init__(self, runner: Runner, options: EngineOptions, clock: Clock) -> None:
        self._noting = _NotingRunner(runner)
        self._engine = start_engine(self._noting, options)
        self._clock = clock
        self._told_s = 0.0

    @property
    def config(self) -> EngineConfig:
        """The engine's sizes."""
        return self._engine.config

    @property
    def features(self) -> list[tuple[int, ...]]:
        """Of each step of the last run."""
        return self._noting.features

    def run(self, load: _Load) -> list[float]:
        """Seconds of each step of `load`."""
        for request in load.requests():
            self._engine.add_request(request)
        self._noting.features = []
        seconds: list[float] = []
        while self._engine.has_work:
            seconds.append(
                self._step(may_repeat=len(seconds) % STEPS_TOGETHER == STEPS_TOGETHER - 1)
            )
        return seconds

    def _step(self, *, may_repeat: bool) -> float:
        """Seconds of a step: of as many rounds as can be, or of one."""
        if not may_repeat:
            # So long that no round of the step before fits a second time.
            self._told_s += self.config.block_size * self.config.most_rounds_s
        start_s = self._clock()
        outputs = self._engine.step(self._told_s)
        seconds = self._clock() - start_s
        if error := next((output.error for output in outputs if output.error), None):
            raise EngineError(f"the model cannot be timed: {error}")
        return seconds


def _loads(config: EngineConfig) -> list[_Load]:
    """Loads for short and long contexts and one to many sequences, the lightest first."""
    longest = min(config.max_seq_len, LONGEST_PROMPT)
    loads = []
    for count in NUM_SEQUENCES:
        for share in CONTEXT_SHARES:
            input_len = max(1, int(longest * share))
            # The first has to last until the last one's prompt is computed, and then through the
            # steps together, the last of which draws more than a token.
            output_len = 2 * STEPS_TOGETHER + count * input_len // config.max_batched_tokens
            if count <= config.max_num_seqs and input_len + output_len <= config.max_seq_len:
                loads.append(_Load(count, input_len, output_len))
    return sorted(loads, key=lambda load: load.num_sequences * load.input_len)


def _fit(rows: FloatArray, seconds: FloatArray) -> CostFit:
    """`rows` is [steps, features]."""
    coefficients = non_negative_least_squares(rows / seconds[:, None], np.ones(len(rows)))
    predicted = rows @ coefficients
    errors = np.abs(predicted / seconds - 1)
    fields = (field for field, _ in UNITS.values())
    # Of one round: the first column counts them.
    most = dict(zip(UNITS, (rows / rows[:, :1]).max(axis=0).astype(np.int64).tolist(), strict=True))
    return CostFit(
        cost=CostModel(**dict(zip(fields, coefficients.tolist(), strict=True))),
        num_steps=len(rows),
        median_error=float(np.median(errors)),
        p90_error=float(np.percentile(errors, 90)),
        total_error=float(predicted.sum() / seconds.sum() - 1),
        most_tokens=most["token_us"],
        most_sequences=most["seq_us"],
        most_context=most["context_ns"],
    )


def non_negative_least_squares(columns: FloatArray, target: FloatArray) -> FloatArray:
    """The x >= 0 with the least |columns @ x - target|, found by trying every set of columns.

    The best x solves the plain problem over those columns where it is above 0 (the conditions of
    Karush, Kuhn and Tucker), so with six columns there are 63 sets to try.
    """
    scale = np.linalg.norm(columns, axis=0)
    scale[scale == 0] = 1.0
    whole = float(target @ target)
    best, least = np.zeros(columns.shape[1]), whole
    for chosen in _sets(columns.shape[1]):
        scaled = columns[:, chosen] / scale[chosen]
        x, *_ = np.linalg.lstsq(scaled, target, rcond=None)
        error = float(((scaled @ x - target) ** 2).sum())
        # Fewer columns come first, and more of them must be better than by rounding: where two
        # cannot be told apart (one sequence in every step), one of them carries the cost.
        if (x >= 0).all() and error < least - ROUNDING * whole:
            best, least = np.zeros(columns.shape[1]), error
            best[chosen] = x / scale[chosen]
    return best


def _sets(count: int) -> Iterator[list[int]]:
    for size in range(1, count + 1):
        yield from map(list, combinations(range(count), size))
