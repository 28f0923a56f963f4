"""Random lives of requests: whatever happens around it, a request gets its own tokens, and one end.

The scripted runner's answers can be computed from the prompt alone, so every history is checked
against a model without batching, blocks, prefix cache, windows, guesses or preemption.
"""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from support.engine_life import BASES, EngineLife, Setting, random_setting

SETTINGS = st.integers(0, 2**20).map(random_setting)


class Life(RuleBasedStateMachine):
    """Requests come, end, are aborted, finished or resumed, in any order, over a small pool."""

    life: EngineLife

    @initialize(setting=SETTINGS)
    def begin(self, setting: Setting) -> None:
        self.life = EngineLife(setting)

    @rule(
        base=st.integers(0, len(BASES) - 1),
        length=st.integers(1, 40),
        tail=st.lists(st.integers(0, 96), max_size=3),
        max_tokens=st.integers(0, 20),
        n=st.sampled_from([1, 1, 1, 2, 3]),
        seed=st.none() | st.integers(0, 9),
        made=st.integers(0, 5),
    )
    def add(self, base: int, length: int, tail: list[int], **changes: int) -> None:
        self.life.add([*BASES[base][:length], *tail], **changes)

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.life.step()

    @precondition(lambda self: self.life.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.life.abort(data.draw(st.sampled_from(sorted(self.life.requests))))

    @precondition(lambda self: self.life.requests)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        self.life.finish(data.draw(st.sampled_from(sorted(self.life.requests))))

    @invariant()
    def holds_together(self) -> None:
        self.life.engine.check()

    def teardown(self) -> None:
        if hasattr(self, "life"):
            self.life.drain()


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**30))
def test_random_life_is_the_sum_of_lives_alone(seed: int) -> None:
    EngineLife.random(seed, num_operations=60).drain()
