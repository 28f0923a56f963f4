"""An engine over the scripted runner, driven at random, with a model that knows every answer.

Shared by the property tests and the soak: operations are checked as they happen, and `drain` checks
that everybody got the tokens of the rule and exactly one end.
"""

from __future__ import annotations

import random
import zlib
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from llmserve.engine.config import EngineConfig, SpeculationConfig
from llmserve.engine.engine import Engine
from llmserve.engine.request import FinishReason, Request
from llmserve.engine.sizing import blocks_of_one
from llmserve.engine.speculator import make_drafter
from llmserve.engine.watcher import Watcher
from llmserve.runners.fake import Context, FakeRunner, Script
from llmserve.runners.protocol import Batch, CacheGroup, IntArray, RunnerInfo, StepResult
from llmserve.sampling import SamplingParams

from .engines import VOCAB, make_info

__all__ = ["BASES", "EngineLife", "OverlappingRunner", "Setting", "answer", "random_setting"]

MAX_SEQ_LEN = 64

BASES = [[random.Random(seed).randrange(VOCAB) for _ in range(40)] for seed in range(3)] + [
    [1, 2, 3, 4] * 10
]  # something for n-grams to find
"""Beginnings that prompts have in common."""


class OverlappingRunner(FakeRunner):
    """Computes when collected, step after step, as a GPU seems to.

    A step's tokens may be those that the step before it draws.
    """

    overlaps = True

    def __init__(self, info: RunnerInfo, *, script: Script | None = None) -> None:
        super().__init__(info, script=script)
        self.batches: deque[Batch] = deque()
        self._drawn: IntArray | None = None

    def submit(self, batch: Batch) -> None:
        assert len(self.batches) == (batch.fed_rows is not None), "steps too many under way"
        if batch.fed_rows is not None:
            batch.token_ids = np.full_like(batch.token_ids, -1)  # means nothing
        self.batches.append(batch)

    def collect(self) -> StepResult:
        batch = self.batches.popleft()
        if batch.fed_rows is not None:
            assert self._drawn is not None
            batch.token_ids = self._drawn[batch.fed_rows]
        super().submit(batch)
        result = super().collect()
        self._drawn = result.token_ids
        return result


@dataclass(frozen=True, slots=True)
class Setting:
    """One engine's shape."""

    config: EngineConfig
    windows: tuple[int | None, ...]
    overlaps: bool
    feeds_tokens: bool = False
    """Whether the engine may choose decodes ahead."""
    repeats_decodes: bool = False
    """Whether a step may have several rounds of them."""


def random_setting(seed: int) -> Setting:
    """A small engine, every feature on or off; pools hold one sequence and little more."""
    rng, rounds = random.Random(seed), random.Random(seed + 1)
    windows = rng.choice([(None,), (None,), (rng.randint(1, 20),), (None, rng.randint(1, 20))])
    block_size = rng.choice([1, 2, 4, 8])
    max_batched_tokens = rng.randint(4, 24)
    max_prefill_tokens = rounds.choice([0, 3, 40])
    pools = [
        blocks_of_one(
            CacheGroup(num_layers=1, window=window, bytes_per_token=8),
            max_seq_len=MAX_SEQ_LEN,
            block_size=block_size,
            max_batched_tokens=max(max_batched_tokens, max_prefill_tokens),
        )
        for window in windows
    ]
    speculation = None
    if block_size > 1 and rng.random() < 0.4:
        speculation = SpeculationConfig(
            method="ngram",
            num_draft_tokens=rng.randint(1, block_size - 1),
            min_ngram=1,
            max_ngram=3,
            is_always_on=rng.random() < 0.7,
        )
    config = EngineConfig(
        most_rounds_s=rounds.choice([0.0, 2.5, 7.0]),
        num_blocks=tuple(count + rng.randint(0, 30) for count in pools),
        block_size=block_size,
        max_seq_len=MAX_SEQ_LEN,
        max_batched_tokens=max_batched_tokens,
        max_prefill_tokens=max_prefill_tokens,
        max_num_seqs=rng.randint(1, 8),
        has_prefix_cache=rng.random() < 0.8,
        policy=rng.choice(["fcfs", "priority", "fair"]),
        speculation=speculation,
    )
    overlaps = rng.random() < 0.5
    return Setting(
        config,
        windows,
        overlaps,
        feeds_tokens=overlaps and rng.random() < 0.7,
        repeats_decodes=not overlaps,
    )


def answer(
    prompt: list[int],
    count: int,
    windows: tuple[int | None, ...] = (None,),
    *,
    seed: int | None = None,
    choice_index: int = 0,
) -> list[int]:
    """The `count` ids that follow `prompt` by the scripted runner's rule; greedy without a seed."""
    context, made = Context(prompt, windows), []
    for position in range(len(prompt), len(prompt) + count):
        digest = context.digest()
        if seed is not None:
            key = np.array([seed, choice_index, position], dtype=np.int64)
            digest = zlib.crc32(key.tobytes(), digest)
        made.append(digest % VOCAB)
        context.append(made[-1])
    return made


@dataclass(slots=True)
class _Known:
    answer: list[int]
    tokens: list[int]
    reason: FinishReason | None = None
    was_aborted: bool = False
    was_finished: bool = False


@dataclass(slots=True)
class EngineLife:
    """An engine, what was asked of it, and what must come of it."""

    setting: Setting
    watcher: Watcher | None = None
    engine: Engine = field(init=False)
    requests: dict[str, list[_Known]] = field(default_factory=dict)
    now: float = 0.0

    def __post_init__(self) -> None:
        groups = tuple(
            CacheGroup(num_layers=1, window=window, bytes_per_token=8)
            for window in self.setting.windows
        )
        info = make_info(
            cache_groups=groups,
            feeds_tokens=self.setting.feeds_tokens,
            repeats_decodes=self.setting.repeats_decodes,
        )
        kind = OverlappingRunner if self.setting.overlaps else FakeRunner
        config = self.setting.config
        drafter = make_drafter(info, config)
        self.engine = Engine(kind(info), config, drafter=drafter, watcher=self.watcher)

    @classmethod
    def random(cls, seed: int, *, num_operations: int) -> EngineLife:
        """A life of that many operations, checked after each."""
        rng = random.Random(seed)
        life = cls(random_setting(seed))
        for _ in range(num_operations):
            life.random_operation(rng)
            life.engine.check()
        return life

    def random_operation(self, rng: random.Random) -> None:
        """Add, abort or finish something, or step."""
        turn = rng.random()
        if turn < 0.3:
            base = rng.choice(BASES)
            tail = [rng.randrange(VOCAB) for _ in range(rng.choice([0, 0, 3]))]
            self.add(
                [*base[: rng.randint(1, 40)], *tail],
                max_tokens=rng.randint(0, 20),
                n=rng.choice([1, 1, 1, 2, 3]),
                seed=rng.choice([None, rng.randrange(10)]),
                made=rng.choice([0, 0, 0, rng.randint(1, 5)]),
            )
        elif turn < 0.35 and self.requests:
            self.abort(rng.choice(list(self.requests)))
        elif turn < 0.38 and self.requests:
            self.finish(rng.choice(list(self.requests)))
        else:
            self.step()

    def add(
        self, prompt: list[int], *, max_tokens: int, n: int, seed: int | None, made: int
    ) -> None:
        """Ask for a prompt's answer; with `made` tokens of it given, as after a restart."""
        name = f"r{len(self.requests)}"
        made = min(made, max_tokens - 1)
        answers = [
            answer(prompt, max_tokens, self.setting.windows, seed=seed, choice_index=index)
            for index in range(n)
        ]
        given = [ids[:made] for ids in answers] if made > 0 else []
        self.engine.add_request(
            Request(
                request_id=name,
                prompt_token_ids=prompt,
                sampling_params=SamplingParams(
                    max_tokens=max_tokens, n=n, temperature=0.0 if seed is None else 1.0
                ),
                seed=seed or 0,
                arrival_time=self.now,
                priority=0 if self.setting.config.policy == "fcfs" else len(prompt) % 3,
                tenant=str(len(prompt) % 2),
                output_token_ids=given,
            )
        )
        self.requests[name] = [
            _Known(ids, list(given[index]) if given else []) for index, ids in enumerate(answers)
        ]

    def step(self) -> None:
        """One step; its outputs are checked against what is known."""
        self.now += 1.0
        for output in self.engine.step(self.now):
            known = self.requests[output.request_id][output.choice_index]
            assert known.reason is None, "an output after the end"
            assert not known.was_finished, "an output after it was finished"
            known.tokens += output.token_ids
            assert known.tokens == known.answer[: len(known.tokens)], "a wrong token"
            known.reason = output.finish_reason

    def abort(self, name: str) -> None:
        """End a request, live or not; the output that says so comes with the next step."""
        for known in self.requests[name]:
            known.was_aborted = True
        self.engine.abort(name)

    def finish(self, name: str) -> None:
        """End a choice as if its text had met a stop string."""
        known = self.requests[name][0]
        known.was_finished |= known.reason is None and not known.was_aborted
        self.engine.finish(name, 0)

    def drain(self) -> None:
        """Step to the end: nobody is stuck, everybody ended once, every block is back."""
        last = self.now + 20_000
        while self.engine.has_work:
            self.step()
            self.engine.check()
            assert self.now < last, "somebody is stuck"
        for known in (known for choices in self.requests.values() for known in choices):
            if known.reason is FinishReason.LENGTH:
                assert known.tokens == known.answer
            else:
                assert known.was_finished or known.reason is FinishReason.ABORT
        stats = self.engine.stats()
        assert stats.num_free_blocks == stats.num_blocks
