"""Masks over the next token: what they allow, who gets them, and that nothing else changes them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmserve.engine.config import SpeculationConfig
from llmserve.engine.engine import Engine
from llmserve.engine.grammar import Grammar, GrammarKind
from llmserve.engine.request import FinishReason, Request
from llmserve.errors import RequestError
from llmserve.runners.fake import FakeRunner
from llmserve.runners.protocol import MaskArray, SamplingRow
from llmserve.runners.sampler import sample, unpack_mask
from llmserve.sampling import SamplingParams
from support.engines import VOCAB, make_engine, make_info, make_request, run, tokens_by_choice

END = 96
ANY = Grammar(GrammarKind.REGEX, "")


class Ladder:
    """A matcher of the ids `steps[0]`, `steps[1]`, ... and then the end."""

    def __init__(self, steps: list[set[int]], place: int = 0) -> None:
        self.steps = steps
        self.place = place
        self.problem: str | None = None

    def copy(self) -> Ladder:
        return Ladder(self.steps, self.place)

    def advance(self, token_ids: list[int]) -> None:
        for token_id in token_ids:
            if token_id not in self.allowed():
                self.problem = f"{token_id} at {self.place}"
            self.place += 1

    def allowed(self) -> set[int]:
        return self.steps[self.place] if self.place < len(self.steps) else {END}

    def mask(self) -> MaskArray:
        return packed(self.allowed())

    def error(self) -> str | None:
        return self.problem


def packed(ids: set[int]) -> MaskArray:
    bits = np.zeros(-(-VOCAB // 32) * 32, dtype=np.uint8)
    bits[sorted(ids)] = 1
    return np.packbits(bits, bitorder="little").view(np.uint32)


STEPS = [{3, 4, 5}, {40, 41}, {7, 60, 95}, set(range(50))]


def grammar_engine(**changes: Any) -> Engine:
    runner = FakeRunner(make_info(eos_token_ids=(END,)))
    return make_engine(runner, **changes)


def ask(name: str, prompt: list[int], **changes: Any) -> Request:
    return make_request(name, prompt, grammar=ANY, max_tokens=20, **changes)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_choice_follows_its_grammar_to_the_end(temperature: float) -> None:
    engine = grammar_engine()
    engine.add_request(ask("a", [1, 2], n=3, temperature=temperature), Ladder(STEPS))
    outputs = run(engine)
    made = tokens_by_choice(outputs)
    for choice in range(3):
        *ids, last = made["a", choice]
        assert last == END
        assert all(token_id in step for token_id, step in zip(ids, STEPS, strict=True))
    assert {output.finish_reason for output in outputs} == {None, FinishReason.STOP}


def test_a_neighbours_grammar_changes_nobody_else() -> None:
    alone = grammar_engine()
    alone.add_request(make_request("free", [9, 8, 7], max_tokens=12))
    both = grammar_engine()
    both.add_request(make_request("free", [9, 8, 7], max_tokens=12))
    both.add_request(ask("bound", [1]), Ladder(STEPS))
    assert tokens_by_choice(run(alone))["free", 0] == tokens_by_choice(run(both))["free", 0]


def test_a_preempted_and_a_resumed_sequence_have_the_masks_they_would_have_had() -> None:
    def tokens(engine: Engine, **changes: Any) -> list[int]:
        for index in range(4):
            request = ask(f"r{index}", [index] * 30, **changes)
            engine.add_request(request, Ladder(STEPS * 3))
        return [made for _, made in sorted(tokens_by_choice(run(engine)).items())]

    tight = grammar_engine(num_blocks=32, max_seq_len=64)
    whole = tokens(grammar_engine(num_blocks=128))
    assert tokens(tight) == whole
    resumed = grammar_engine()
    made = whole[0][:5]
    resumed.add_request(ask("r0", [0] * 30, output_token_ids=[made]), Ladder(STEPS * 3))
    assert made + tokens_by_choice(run(resumed))["r0", 0] == whole[0]


def test_nothing_is_guessed_for_a_constrained_sequence() -> None:
    speculation = SpeculationConfig(method="ngram", num_draft_tokens=3, is_always_on=True)
    engine = grammar_engine(speculation=speculation)
    engine.add_request(ask("a", [5, 6, 5, 6, 5, 6]), Ladder([{5}, {6}, {5}, {6}, {5}]))
    assert tokens_by_choice(run(engine))["a", 0] == [5, 6, 5, 6, 5, END]
    assert engine.stats().num_draft_tokens == 0


def test_a_matcher_that_gives_up_ends_its_own_sequence() -> None:
    class Broken(Ladder):
        def copy(self) -> Broken:
            return Broken(self.steps)

        def advance(self, token_ids: list[int]) -> None:
            if token_ids:
                self.problem = "too complex"

        def mask(self) -> MaskArray:
            return packed({1})

    engine = grammar_engine()
    engine.add_request(ask("bad", [1]), Broken(STEPS))
    engine.add_request(make_request("good", [2], max_tokens=6))
    outputs = run(engine)
    ends = {output.request_id: output for output in outputs if output.finish_reason}
    assert ends["good"].finish_reason is FinishReason.LENGTH
    assert ends["bad"].finish_reason is FinishReason.ERROR
    assert ends["bad"].error == "too complex"


@pytest.mark.parametrize(
    ("changes", "param"),
    [({"ignore_eos": True}, "ignore_eos"), ({"min_tokens": 2}, "min_tokens")],
)
def test_what_cannot_end_with_its_grammar_is_refused(changes: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        grammar_engine().add_request(ask("a", [1], **changes), Ladder(STEPS))
    assert caught.value.param == param


def test_a_model_without_an_end_is_refused() -> None:
    with pytest.raises(RequestError, match="end id"):
        make_engine().add_request(ask("a", [1]), Ladder(STEPS))


@pytest.mark.parametrize("params", [{}, {"allowed_token_ids": (1, 5, 70)}, {"top_k": 3}])
def test_the_sampler_draws_what_the_mask_allows(params: dict[str, Any]) -> None:
    logits = np.random.default_rng(0).normal(0, 2, (200, VOCAB)).astype(np.float32)
    allowed = {5, 31, 32, 70, 95}
    rows = [
        SamplingRow(
            params=SamplingParams(**params), seed=seed, choice_index=0, token_ids=[1],
            num_prompt_tokens=1, allowed_mask=packed(allowed),
        )
        for seed in range(200)
    ]  # fmt: skip
    drawn = set(sample(logits, rows).token_ids.tolist())
    left = allowed & set(params.get("allowed_token_ids", allowed))
    assert drawn <= left
    assert len(drawn) > 1
    assert set(np.flatnonzero(unpack_mask(packed(allowed), VOCAB)).tolist()) == allowed
