"""How many tokens are guessed, and when guessing stops and begins again."""

from __future__ import annotations

import itertools
import random

import pytest

from llmserve.engine.config import SpeculationConfig, StepCost
from llmserve.engine.speculation import LONGEST_WAIT, SpeculationPolicy, best_counts
from llmserve.errors import ConfigError

# A row costs as much as a tenth of the step: guesses pay for few sequences, and little for many.
STEEP = StepCost(base_s=10e-3, token_s=1e-3)
# A row costs nearly nothing.
FLAT = StepCost(base_s=10e-3, token_s=1e-6)


def make_policy(
    cost: StepCost | None = STEEP, draft_cost: StepCost | None = None, **changes: object
) -> SpeculationPolicy:
    values: dict[str, object] = {"method": "ngram", "num_draft_tokens": 4, **changes}
    return SpeculationPolicy(SpeculationConfig(**values), cost, draft_cost)  # type: ignore[arg-type]


class Crowd:
    """Decoding sequences whose guesses come true with a given chance each."""

    def __init__(self, policy: SpeculationPolicy, size: int, seed: int = 0) -> None:
        self.policy = policy
        self.keys = list(range(size))
        self._rng = random.Random(seed)

    def step(self, acceptance: float, num_other_tokens: int = 0) -> tuple[list[int], int]:
        """One step: guesses planned for each, and tokens gained by all."""
        counts = self.policy.plan(self.keys, num_other_tokens)
        gained = 0
        for key, count in zip(self.keys, counts, strict=True):
            num_accepted = 0
            while num_accepted < count and self._rng.random() < acceptance:
                num_accepted += 1
            self.policy.observe(key, count, num_accepted)
            gained += 1 + num_accepted
        return counts, gained

    def run(self, acceptance: float, num_steps: int) -> list[list[int]]:
        """Guesses planned in each of some steps."""
        return [self.step(acceptance)[0] for _ in range(num_steps)]


def expected_rate(
    means: list[float],
    counts: list[int],
    num_tokens: int,
    seconds: float,
    row_s: float,
    depth_s: float,
) -> float:
    """Tokens a second by the sum of section 3.1, term by term."""
    gain = sum(
        mean**place
        for mean, count in zip(means, counts, strict=True)
        for place in range(1, count + 1)
    )
    cost = seconds + row_s * sum(counts) + depth_s * max(counts, default=0)
    return (num_tokens + gain) / cost


@pytest.mark.parametrize("seed", range(40))
def test_best_counts_are_the_best_of_all(seed: int) -> None:
    rng = random.Random(seed)
    most = rng.randint(1, 4)
    means = [rng.choice([0.0, rng.random(), 1.0]) for _ in range(rng.randint(1, 3))]
    num_tokens = len(means) + rng.choice([0, 30])
    row_s = rng.choice([0.001, 0.1, 1.0])
    depth_s = rng.choice([0.0, 0.1, 1.0])
    seconds = rng.choice([0.1, 1.0, 10.0]) + row_s * num_tokens
    prices = (num_tokens, seconds, row_s, depth_s)
    counts = best_counts(
        means, num_tokens=num_tokens, seconds=seconds, row_s=row_s, depth_s=depth_s, most=most
    )
    best = max(
        expected_rate(means, list(choice), *prices)
        for choice in itertools.product(range(most + 1), repeat=len(means))
    )
    assert expected_rate(means, counts, *prices) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("size", [1, 4, 24])
@pytest.mark.parametrize("acceptance", [0.0, 0.4, 0.8, 0.97])
@pytest.mark.parametrize("cost", [STEEP, FLAT], ids=["steep", "flat"])
def test_policy_is_nearly_as_good_as_the_best_fixed_number(
    cost: StepCost, acceptance: float, size: int
) -> None:
    """It has to find out what the fixed number knows, errs, and probes: for at most a tenth."""
    crowd = Crowd(make_policy(cost), size)
    tokens = seconds = 0.0
    for _ in range(600):
        counts, gained = crowd.step(acceptance)
        tokens += gained
        seconds += cost.seconds(size + sum(counts))
    best = max(
        size * sum(acceptance**place for place in range(k + 1)) / cost.seconds(size * (1 + k))
        for k in range(5)
    )
    assert tokens / seconds > 0.9 * best


def test_guesses_that_come_true_are_made_in_full() -> None:
    plans = Crowd(make_policy(), 1).run(0.95, 100)
    assert sum(count for [count] in plans) > 350


def test_guesses_that_never_come_true_stop_after_few_steps() -> None:
    plans = Crowd(make_policy(), 24).run(0.0, 12)
    assert all(plans[0])
    assert sum(map(sum, plans[4:])) == 0


def waits_between_guesses(plans: list[list[int]]) -> list[int]:
    """Steps from one step with guesses of a lone sequence to the next, where that was not next."""
    guessed = [index for index, [count] in enumerate(plans) if count]
    gaps = [after - before for before, after in itertools.pairwise(guessed)]
    return [gap for gap in gaps if gap > 1]


def test_probes_grow_rarer_up_to_a_bound() -> None:
    plans = Crowd(make_policy(), 1).run(0.0, 2_000)
    assert max(plans[100:]) == [2]
    waits = waits_between_guesses(plans)
    assert waits[:5] == [16, 32, 64, 128, 256]
    assert set(waits[5:]) == {LONGEST_WAIT}


@pytest.mark.parametrize("size", [1, 16])
def test_sequences_come_back_when_their_guesses_come_true_again(size: int) -> None:
    crowd = Crowd(make_policy(), size)
    crowd.run(0.0, 1_000)
    plans = crowd.run(0.95, 2 * LONGEST_WAIT + 50)
    assert sum(map(sum, plans[-20:])) > 2.5 * 20 * size


def test_waits_begin_anew_once_guesses_paid() -> None:
    crowd = Crowd(make_policy(), 1)
    crowd.run(0.0, 1_000)
    crowd.run(0.95, LONGEST_WAIT + 50)
    assert waits_between_guesses(crowd.run(0.0, 200))[:3] == [16, 32, 64]


def test_large_batch_turns_guesses_off_and_a_small_one_on_again() -> None:
    crowd = Crowd(make_policy(), 64)
    plans = crowd.run(0.5, 200)
    assert sum(map(sum, plans[100:])) < 0.05 * 100 * 64
    crowd.keys = crowd.keys[:1]
    assert sum(count for [count] in crowd.run(0.5, 50)) > 25


def test_long_prompt_in_the_step_leaves_no_time_for_unsure_guesses() -> None:
    crowd = Crowd(make_policy(), 1)
    crowd.run(0.6, 50)
    assert crowd.policy.plan([0], 0)[0] > 0
    assert crowd.policy.plan([0], 500) == [0]


def test_sure_sequences_get_more_guesses_than_unsure_ones() -> None:
    policy = make_policy()
    for _ in range(20):
        for key, count in enumerate(policy.plan(list(range(8)), 0)):
            policy.observe(key, count, count if key % 2 else 0)
    counts = policy.plan(list(range(8)), 0)
    assert min(counts[1::2]) == 4
    assert max(counts[::2]) == 0


def test_dear_draft_model_gets_fewer_guesses_than_a_cheap_one() -> None:
    def mean_count(draft_cost: StepCost) -> float:
        plans = Crowd(make_policy(FLAT, draft_cost, method="draft"), 1).run(0.8, 200)
        return sum(count for [count] in plans) / len(plans)

    cheap = mean_count(StepCost(base_s=FLAT.base_s / 100, token_s=1e-9))
    dear = mean_count(StepCost(base_s=FLAT.base_s / 2, token_s=1e-9))
    too_dear = mean_count(StepCost(base_s=FLAT.base_s, token_s=1e-9))
    assert cheap > 3.8
    assert 0.5 < dear < 2.5
    assert too_dear < 0.3


@pytest.mark.parametrize("method", ["ngram", "draft"])
def test_costs_that_were_not_measured_are_assumed(method: str) -> None:
    assert sum(c for [c] in Crowd(make_policy(None, method=method), 1).run(0.9, 50)) > 150
    plans = Crowd(make_policy(None, method=method), 256).run(0.3, 60)
    assert sum(map(sum, plans[30:])) < 0.1 * 30 * 256


def test_always_on_ignores_costs_and_failures() -> None:
    crowd = Crowd(make_policy(is_always_on=True), 64)
    assert crowd.run(0.0, 30)[-1] == [4] * 64
    crowd.policy.check(set())


def test_short_sequences_do_not_each_learn_the_same_lesson() -> None:
    policy = make_policy()
    shares = []  # guesses for each token, at first and in the end
    for acceptance in (0.0, 0.95, 0.0):
        num_guesses = []
        for seed in range(250):
            crowd = Crowd(policy, 16, seed)
            num_guesses.append(sum(map(sum, crowd.run(acceptance, 8))) / (8 * 16))
            for key in crowd.keys:
                policy.forget(key)
        shares.append([sum(num_guesses[:50]) / 50, sum(num_guesses[-50:]) / 50])
    wrong, right, wrong_again = shares
    assert wrong[1] < 0.02
    assert right[1] > 2.0
    assert wrong_again[0] < 0.06


def test_counts_say_what_came_of_the_guesses() -> None:
    policy = make_policy()
    policy.plan([1, 2], 0)
    policy.observe(1, 4, 2)
    policy.observe(2, 3, 3)
    policy.observe(2, 1, 0)
    policy.observe(1, 0, 0)
    assert (policy.num_drafts, policy.num_draft_tokens, policy.num_accepted_tokens) == (3, 8, 5)
    assert policy.accepted_per_position == [2, 2, 1, 0]


def test_steps_without_a_guess_teach_nothing() -> None:
    policy = make_policy()
    before = policy.plan([1], 0)
    for _ in range(100):
        policy.observe(1, 0, 0)
        assert policy.plan([1], 0) == before


def test_probe_goes_on_until_something_is_guessed() -> None:
    crowd = Crowd(make_policy(), 1)
    crowd.run(0.0, 500)
    policy = crowd.policy
    waited = 0
    while policy.plan([0], 0) == [0]:
        waited += 1
        assert waited <= LONGEST_WAIT
    assert all(policy.plan([0], 0) == [2] for _ in range(20))
    policy.observe(0, 1, 0)
    assert policy.plan([0], 0) == [0]


def test_forgotten_sequence_counts_for_the_engine_alone() -> None:
    policy = make_policy()
    policy.plan([1], 0)
    policy.forget(1)
    policy.forget(1)
    policy.observe(1, 4, 0)
    assert policy.num_draft_tokens == 4
    policy.check(set())


def test_check_finds_an_estimate_without_its_sequence() -> None:
    policy = make_policy()
    policy.plan([1, 2], 0)
    policy.check({1, 2})
    with pytest.raises(AssertionError, match="outlived"):
        policy.check({1})


def test_no_sequences_no_guesses() -> None:
    assert make_policy().plan([], 0) == []
    assert make_policy().plan([], 100) == []


def test_equal_runs_decide_alike() -> None:
    acceptances = [0.9] * 50 + [0.1] * 300 + [0.8] * 200
    first, second = (Crowd(make_policy(), 5, seed=3) for _ in range(2))
    assert [first.step(a) for a in acceptances] == [second.step(a) for a in acceptances]


@pytest.mark.parametrize(
    ("method", "step_cost"), [("ngram", STEEP), ("draft", None)], ids=["ngram", "alone"]
)
def test_draft_cost_without_a_use_is_refused(method: str, step_cost: StepCost | None) -> None:
    with pytest.raises(ConfigError, match="goes with step_cost"):
        make_policy(step_cost, FLAT, method=method)
