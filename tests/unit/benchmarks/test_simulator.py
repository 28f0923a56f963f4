"""Simulated times against sums by hand, cache hits against sets and lists of blocks."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from llmserve.benchmarks import simulator
from llmserve.benchmarks.cost_model import CostModel, parse_cost_model
from llmserve.benchmarks.equal_requests import EqualRequests
from llmserve.benchmarks.simulator import SimulatedEngine, Simulation, simulate
from llmserve.benchmarks.traces import Trace, TraceOptions, open_trace
from llmserve.errors import ConfigError, DataError
from llmserve.startup import EngineOptions
from support.traces import azure_trace, mooncake_trace

ONE_SECOND = CostModel(base_s=1.0)
Row = tuple[float, int, int, list[int]]


def play(path: Path, *, block_size: int = 16, **changes: object) -> Simulation:
    trace = open_trace(path, TraceOptions())
    values: dict[str, object] = {"cost": ONE_SECOND, "block_size": block_size, **changes}
    return simulate(trace, trace.size(block_size), SimulatedEngine(**values))  # type: ignore[arg-type]


def shared_rows(seed: int, count: int, *, gap_s: float) -> list[Row]:
    """Conversations: each request goes on from an earlier one, or begins anew."""
    rng = random.Random(seed)
    chains: list[list[int]] = [[]]
    next_key = 0
    rows = []
    for index in range(count):
        chain = list(rng.choice(chains))[: rng.randint(0, 8)]
        new = rng.randint(0 if chain else 1, 3)
        chain += range(next_key, next_key + new)
        next_key += new
        # A name always stands for a block of the same length, here a full one.
        rows.append((index * gap_s, 512 * len(chain), rng.randint(1, 3), chain))
        chains.append(chain)
    return rows


def test_times_are_the_sums_of_the_steps(tmp_path: Path) -> None:
    # 40 tokens take three steps of 16, 16 and 8; then two more tokens, a step each.
    path = azure_trace(tmp_path / "a.csv", [(0, 40, 3), (100, 5, 1)])
    result = play(path, max_batched_tokens=16, max_num_seqs=2)
    times = result.times
    assert list(times.arrival_s) == [0, 100]
    assert list(times.scheduled_s) == [0, 100]
    assert list(times.first_token_s) == [3, 101]
    assert list(times.last_token_s) == [5, 101]
    assert (list(times.input_len), list(times.output_len)) == ([40, 5], [3, 1])
    assert (result.duration_s, result.busy_s) == (101, 6)  # the clock jumped over the idle time
    assert result.stats.num_steps == 6


def test_request_waits_for_the_step_under_way_and_for_its_turn(tmp_path: Path) -> None:
    path = azure_trace(tmp_path / "a.csv", [(0, 8, 4), (0.5, 8, 2), (0.75, 8, 1)])
    result = play(path, max_batched_tokens=16, max_num_seqs=2)
    # The second comes in the first one's first step and shares the next two; the third has no
    # place before the second ends at 3.
    assert list(result.times.scheduled_s) == [0, 1, 3]
    assert list(result.times.first_token_s) == [1, 2, 4]
    assert list(result.times.last_token_s) == [4, 3, 4]
    assert result.most_running == 2


def test_closed_loop_sends_the_next_request_when_the_last_one_ended() -> None:
    requests = EqualRequests(arrivals_s=[0.0] * 5, input_len=8, output_len=3)
    engine = SimulatedEngine(cost=ONE_SECOND, block_size=16, max_num_seqs=4)
    result = simulate(requests, requests.size(16), engine, max_concurrency=2)
    assert list(result.times.arrival_s) == [0, 0, 3, 3, 6]
    assert list(result.times.scheduled_s) == [0, 0, 3, 3, 6]
    assert list(result.times.last_token_s) == [3, 3, 6, 6, 9]
    assert result.most_running == 2


def test_engine_goes_on_while_a_request_comes_to_it(tmp_path: Path) -> None:
    path = azure_trace(tmp_path / "a.csv", [(0, 8, 4), (0.75, 8, 1)])
    result = play(path, max_num_seqs=2, entry_s=1.5)
    assert list(result.times.arrival_s) == [0, 0.75]
    assert list(result.times.scheduled_s) == [1.5, 2.5]
    assert list(result.times.last_token_s) == [5.5, 3.5]
    assert result.duration_s - result.busy_s == 1.5


def test_client_of_a_closed_loop_waits_for_the_way_of_each_request() -> None:
    requests = EqualRequests(arrivals_s=[0.0] * 3, input_len=8, output_len=3)
    engine = SimulatedEngine(cost=ONE_SECOND, block_size=16, max_num_seqs=4, entry_s=0.5)
    result = simulate(requests, requests.size(16), engine, max_concurrency=1)
    assert list(result.times.arrival_s) == [0, 3.5, 7]
    assert list(result.times.scheduled_s) == [0.5, 4, 7.5]


def test_costs_follow_what_is_in_the_steps(tmp_path: Path) -> None:
    path = azure_trace(tmp_path / "a.csv", [(0, 20, 2)])
    result = play(path, cost=parse_cost_model("token_us=1e6,context_ns=1e9"), max_batched_tokens=64)
    assert result.times.first_token_s[0] == 20 + 20
    assert result.times.last_token_s[0] == 40 + 1 + 21


def test_rounds_are_as_many_as_fit_into_a_servers_time_on_the_virtual_clock(
    tmp_path: Path,
) -> None:
    most_s = EngineOptions().most_rounds_s
    cost = CostModel(base_s=0.2 * most_s, step_s=0.1 * most_s)
    path = azure_trace(tmp_path / "a.csv", [(0, 8, 13)])
    # The prompt and a decode take 0.3 each, so 3 fit; those take 0.7, so 4 do, twice.
    several = play(path, cost=cost)
    assert several.stats.num_steps == 5
    assert several.duration_s == pytest.approx((5 * 0.1 + 13 * 0.2) * most_s)
    assert several.times.first_token_s[0] == pytest.approx(0.3 * most_s)
    single = play(path, cost=cost, repeats_decodes=False)
    assert single.stats.num_steps == 13
    assert single.duration_s == pytest.approx(13 * 0.3 * most_s)


@pytest.mark.parametrize("seed", range(4))
def test_simulation_with_rounds_is_the_same_each_time(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    gap_s = EngineOptions().most_rounds_s
    rows = [(i * gap_s, rng.randint(1, 60), rng.randint(1, 120)) for i in range(60)]
    path = azure_trace(tmp_path / "a.csv", rows)
    values = {"cost": CostModel(base_s=0.1 * gap_s, step_s=0.1 * gap_s), "max_num_seqs": 4}
    first, second = play(path, **values), play(path, **values)
    assert first.stats == second.stats
    for column in ("scheduled_s", "first_token_s", "last_token_s"):
        assert getattr(first.times, column) == getattr(second.times, column)
    assert not np.isnan(first.times.last_token_s).any()
    assert first.stats.num_steps < play(path, repeats_decodes=False, **values).stats.num_steps


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("block_size", [512, 128])
def test_unbounded_cache_hits_every_repeated_block(
    tmp_path: Path, seed: int, block_size: int
) -> None:
    rows = shared_rows(seed, 40, gap_s=0.2)
    result = play(mooncake_trace(tmp_path / "m.jsonl", rows), block_size=block_size, max_num_seqs=8)
    seen: set[int] = set()
    repeated = 0
    for _, _, _, keys in rows:
        repeated += len(seen & set(keys))
        seen |= set(keys)
    pieces = 512 // block_size
    assert result.stats.num_prefix_block_hits == repeated * pieces
    assert result.stats.num_prefix_block_queries == sum(len(row[3]) for row in rows) * pieces
    assert result.stats.num_preemptions == 0
    assert repeated > 20


@pytest.mark.parametrize("num_blocks", [12, 20, 40])
def test_bounded_cache_forgets_the_least_recently_used(tmp_path: Path, num_blocks: int) -> None:
    rows = shared_rows(5, 120, gap_s=1000.0)  # one at a time
    result = play(mooncake_trace(tmp_path / "m.jsonl", rows), block_size=512, num_blocks=num_blocks)
    assert result.most_running == 1
    assert result.stats.num_prefix_block_hits == lru_hits(rows, num_blocks)


def lru_hits(rows: Sequence[Row], num_blocks: int) -> int:
    """Hits of a list of blocks, last used last; a request's last block is the first to go.

    Each request also takes blocks without a name: one for its answer, whose last token is never
    stored, and one for the copy of its last block where everything was found and one token must
    be computed anew.
    """
    cache: OrderedDict[int, None] = OrderedDict()
    num_unused, hits = num_blocks, 0
    for _, _, output_len, keys in rows:
        found = next((i for i, key in enumerate(keys) if key not in cache), len(keys))
        hits += found
        is_whole = found == len(keys)
        held = keys[:found]
        for key in held:
            del cache[key]
        num_nameless = is_whole + (output_len > 1)
        num_new = len(keys) - found + num_nameless
        evicted = max(0, num_new - num_unused)
        for _ in range(evicted):
            cache.popitem(last=False)
        num_unused -= num_new - evicted
        num_unused += num_nameless  # given back at the end
        for key in reversed(keys):
            cache[key] = None
    return hits


def test_traces_without_names_share_nothing(tmp_path: Path) -> None:
    path = azure_trace(tmp_path / "a.csv", [(i, 64, 2) for i in range(4)])
    assert play(path).stats.num_prefix_block_queries == 0  # nothing could be found: not even asked
    bounded = play(path, num_blocks=64).stats
    assert (bounded.num_prefix_block_queries, bounded.num_prefix_block_hits) == (16, 0)


def test_prefix_cache_can_be_left_out(tmp_path: Path) -> None:
    path = mooncake_trace(tmp_path / "m.jsonl", [(100 * i, 1024, 2, [1, 2]) for i in range(3)])
    result = play(path, block_size=512, has_prefix_cache=False, max_batched_tokens=1024)
    assert result.stats.num_prefix_block_queries == 0
    assert result.stats.num_prefill_tokens == 3 * 1024


def test_unbounded_is_enough_without_sharing(tmp_path: Path) -> None:
    rows = [(0, 160, 100) for _ in range(30)]
    result = play(azure_trace(tmp_path / "a.csv", rows), max_num_seqs=30)
    assert result.stats.num_preemptions == 0
    assert result.most_running == 30


def test_too_few_blocks_preempt_and_everybody_ends(tmp_path: Path) -> None:
    rows = [(0, 60, 100) for _ in range(10)]
    result = play(azure_trace(tmp_path / "a.csv", rows), num_blocks=30, max_num_seqs=10)
    assert result.stats.num_preemptions > 0
    assert not np.isnan(result.times.last_token_s).any()


def test_cache_below_the_longest_request_is_refused(tmp_path: Path) -> None:
    path = azure_trace(tmp_path / "a.csv", [(0, 60, 101)])
    with pytest.raises(ConfigError, match="161 tokens in 11 blocks: give more blocks"):
        play(path, num_blocks=10)
    assert play(path, num_blocks=11).stats.num_steps > 0


def test_short_queue_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests are handed over late where the order is fcfs; the engine must not notice."""
    rng = random.Random(1)
    rows = [(0.01 * i, rng.randint(1, 60), rng.randint(1, 120)) for i in range(150)]
    path = azure_trace(tmp_path / "a.csv", rows)
    sizes = {"max_num_seqs": 5, "max_batched_tokens": 64, "num_blocks": 24}
    short = play(path, **sizes)
    most_waiting = 0

    class Whole(simulator._Run):
        def __init__(self, trace: Trace, engine, clock, **facts: float) -> None:
            super().__init__(trace, engine, clock, **facts)
            self._most_without_token = float("inf")

        def _step(self) -> None:
            nonlocal most_waiting
            super()._step()
            most_waiting = max(most_waiting, self.engine.stats().num_waiting)

    monkeypatch.setattr(simulator, "_Run", Whole)
    whole = play(path, **sizes)
    assert most_waiting > 100
    assert short.stats == whole.stats
    assert short.stats.num_preemptions > 0
    for column in ("scheduled_s", "first_token_s", "last_token_s"):
        assert getattr(short.times, column) == getattr(whole.times, column)


def test_policies_look_at_the_traces_columns(tmp_path: Path) -> None:
    rows = [(0, 8, 1, [i]) for i in range(4)]
    path = mooncake_trace(
        tmp_path / "m.jsonl", rows, priority=[2, 1, 1, 0], tenant=["a", "a", "a", "b"]
    )
    sizes = {"block_size": 512, "max_num_seqs": 1, "max_batched_tokens": 8}
    assert list(play(path, **sizes).times.first_token_s) == [1, 2, 3, 4]
    by_priority = play(path, policy="priority", **sizes)
    assert list(by_priority.times.first_token_s) == [4, 2, 3, 1]
    by_tenant = play(path, policy="fair", **sizes)
    assert list(by_tenant.times.first_token_s) == [1, 3, 4, 2]


@pytest.mark.parametrize(("policy", "column"), [("priority", "priority"), ("fair", "tenant")])
def test_line_without_what_the_policy_needs_is_named(
    tmp_path: Path, policy: str, column: str
) -> None:
    rows = [(0, 8, 1, [0]), (0, 8, 1, [1])]
    path = mooncake_trace(tmp_path / "m.jsonl", rows, priority=[1, None], tenant=["a", None])
    with pytest.raises(DataError, match=f"line 2: the request has no {column}"):
        play(path, block_size=512, policy=policy)


def test_progress_tells_how_many_ended(tmp_path: Path) -> None:
    trace = open_trace(azure_trace(tmp_path / "a.csv", [(0, 8, 600), (0, 8, 20)]), TraceOptions())
    told: list[int] = []
    engine = SimulatedEngine(cost=ONE_SECOND, block_size=16)
    simulate(trace, trace.size(16), engine, on_progress=told.append)
    assert told == [1, 1]
