"""Random lives of requests: whatever happens around it, a request gets its own tokens, and one end.

The scripted runner's answers can be computed from the prompt alone, so every history is checked
against a model without batching, blocks or preemption.
"""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llmserve.engine.request import FinishReason, RequestOutput
from llmserve.runners.fake import FakeRunner
from support.engines import VOCAB, expected, make_engine, make_info, make_request

prompts = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40)


class EngineLife(RuleBasedStateMachine):
    """Requests come, end, are aborted or finished, in any order, over a small pool."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = make_engine(
            num_blocks=24, max_seq_len=64, max_batched_tokens=16, policy="priority"
        )
        self.now = 0.0
        self.prompts: dict[str, list[int]] = {}
        self.lengths: dict[str, int] = {}
        self.tokens: dict[str, list[int]] = {}
        self.ends: dict[str, list[FinishReason]] = {}
        self.finished: set[str] = set()

    @rule(prompt=prompts, max_tokens=st.integers(1, 24), priority=st.integers(-1, 1))
    def add(self, prompt: list[int], max_tokens: int, priority: int) -> None:
        name = f"r{len(self.prompts)}"
        self.engine.add_request(
            make_request(name, prompt, max_tokens=max_tokens, priority=priority)
        )
        self.prompts[name], self.lengths[name] = prompt, max_tokens
        self.tokens[name], self.ends[name] = [], []

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.now += 1.0
            self.take(self.engine.step(self.now))

    @precondition(lambda self: self.prompts)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.engine.abort(data.draw(st.sampled_from(sorted(self.prompts))))

    @precondition(lambda self: self.prompts)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.prompts)))
        if not self.ends[name]:
            self.finished.add(name)
        self.engine.finish(name, 0)

    def take(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            assert not self.ends[output.request_id], "an output after the end"
            self.tokens[output.request_id] += output.token_ids
            if output.finish_reason is not None:
                self.ends[output.request_id].append(output.finish_reason)

    @invariant()
    def holds_together(self) -> None:
        self.engine.check()

    def teardown(self) -> None:
        while self.engine.has_work:
            self.now += 1.0
            assert self.now < 20_000, "somebody is stuck"
            self.take(self.engine.step(self.now))
        for name, prompt in self.prompts.items():
            answer = expected(prompt, self.lengths[name])
            assert self.tokens[name] == answer[: len(self.tokens[name])]
            if self.ends[name] == [FinishReason.LENGTH]:
                assert self.tokens[name] == answer
            else:
                assert self.ends[name] == [FinishReason.ABORT] or name in self.finished
        stats = self.engine.stats()
        assert stats.num_free_blocks == stats.num_blocks


TestEngineLife = EngineLife.TestCase
TestEngineLife.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(prompts, min_size=1, max_size=8),
    st.integers(10, 30),
    st.integers(8, 64),
    st.integers(1, 8),
)
def test_tokens_are_those_of_the_request_alone(
    batch: list[list[int]], num_blocks: int, budget: int, max_num_seqs: int
) -> None:
    engine = make_engine(
        FakeRunner(make_info()),
        num_blocks=num_blocks + 6,
        max_seq_len=60,
        max_batched_tokens=budget,
        max_num_seqs=max_num_seqs,
    )
    tokens: dict[str, list[int]] = {}
    for index, prompt in enumerate(batch):
        engine.add_request(
            make_request(f"r{index}", prompt, max_tokens=20, temperature=index % 2, seed=index)
        )
    alone = {}
    for index, prompt in enumerate(batch):
        single = make_engine(FakeRunner(make_info()))
        single.add_request(
            make_request("r", prompt, max_tokens=20, temperature=index % 2, seed=index)
        )
        outputs = [output for step in range(100) for output in single.step(float(step))]
        alone[f"r{index}"] = [token_id for output in outputs for token_id in output.token_ids]
    now = 0.0
    while engine.has_work:
        now += 1.0
        for output in engine.step(now):
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
        engine.check()
    assert tokens == alone
