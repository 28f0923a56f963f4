"""The step function, driven by a runner whose right answers can be computed without an engine."""

from __future__ import annotations

import numpy as np
import pytest

from llmserve.engine.engine import Engine
from llmserve.engine.request import FinishReason, Pooling
from llmserve.errors import EngineError, PromptTooLongError, RequestError
from llmserve.runners.fake import FakeRunner
from llmserve.runners.protocol import Batch, SamplingRow, StepResult
from support.engine_life import OverlappingRunner
from support.engines import expected, make_engine, make_info, make_request, run, tokens_by_choice

PROMPTS = [[(7 * i + j) % 97 for j in range(1 + 3 * i)] for i in range(12)]


def test_one_request_gets_the_tokens_of_the_rule() -> None:
    engine = make_engine()
    engine.add_request(make_request("a", [1, 2, 3]))
    outputs = run(engine)
    assert tokens_by_choice(outputs) == {("a", 0): expected([1, 2, 3], 8)}
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    assert engine.stats().num_free_blocks == 64


@pytest.mark.parametrize("runner_class", [FakeRunner, OverlappingRunner])
@pytest.mark.parametrize("budget", [16, 17, 512])
@pytest.mark.parametrize("num_blocks", [32, 200])
def test_tokens_do_not_depend_on_batch_chunking_or_preemption(
    runner_class: type[FakeRunner], budget: int, num_blocks: int
) -> None:
    engine = make_engine(
        runner_class(make_info()), max_batched_tokens=budget, num_blocks=num_blocks
    )
    for index, prompt in enumerate(PROMPTS):
        engine.add_request(make_request(f"r{index}", prompt, max_tokens=40))
    tokens = tokens_by_choice(run(engine))
    for index, prompt in enumerate(PROMPTS):
        assert tokens[f"r{index}", 0] == expected(prompt, 40)
    assert (engine.stats().num_preemptions > 0) == (num_blocks == 32)


def test_request_with_output_ids_goes_on_where_it_was() -> None:
    engine = make_engine()
    made = expected([4, 5], 3)
    engine.add_request(make_request("a", [4, 5], output_token_ids=[made]))
    assert tokens_by_choice(run(engine))["a", 0] == expected([4, 5], 8)[3:]


def test_choices_that_had_ended_are_not_taken_up_again() -> None:
    whole = make_engine()
    whole.add_request(make_request("a", [9], n=3, temperature=1.0))
    wanted = tokens_by_choice(run(whole))
    engine = make_engine()
    made = [wanted["a", 0][:5], wanted["a", 1], []]
    engine.add_request(
        make_request("a", [9], n=3, temperature=1.0, output_token_ids=made, ended_choices=[1])
    )
    outputs = run(engine)
    assert tokens_by_choice(outputs) == {("a", 0): wanted["a", 0][5:], ("a", 2): wanted["a", 2]}
    assert sorted(out.choice_index for out in outputs if out.finish_reason) == [0, 2]


def test_choices_draw_different_tokens_and_each_ends_once() -> None:
    engine = make_engine()
    engine.add_request(make_request("a", [9], n=3, temperature=1.0))
    outputs = run(engine)
    tokens = tokens_by_choice(outputs)
    assert len({tuple(ids) for ids in tokens.values()}) == 3
    ends = [output.choice_index for output in outputs if output.finish_reason]
    assert sorted(ends) == [0, 1, 2]


def test_end_id_stops_and_ignore_eos_goes_on() -> None:
    eos = expected([1], 4)[3]
    engine = make_engine(FakeRunner(make_info(eos_token_ids=(eos,))))
    engine.add_request(make_request("stops", [1]))
    engine.add_request(make_request("goes-on", [1], ignore_eos=True))
    outputs = run(engine)
    tokens = tokens_by_choice(outputs)
    first_end = expected([1], 8).index(eos) + 1
    assert tokens["stops", 0] == expected([1], first_end)
    assert tokens["goes-on", 0] == expected([1], 8)
    last = next(o for o in outputs if o.request_id == "stops" and o.finish_reason)
    assert (last.finish_reason, last.stop_token_id) == (FinishReason.STOP, eos)


def test_min_tokens_bans_end_ids_until_reached() -> None:
    eos = expected([1], 1)[0]
    engine = make_engine(FakeRunner(make_info(eos_token_ids=(eos,))))
    engine.add_request(make_request("a", [1], min_tokens=4))
    tokens = tokens_by_choice(run(engine))["a", 0]
    assert eos not in tokens[:4]
    assert len(tokens) >= 4


def test_context_end_ends_a_request_without_max_tokens() -> None:
    engine = make_engine()
    engine.add_request(make_request("a", [1] * 100, max_tokens=None))
    assert len(tokens_by_choice(run(engine))["a", 0]) == 28


def test_abort_frees_everything_and_says_so_once() -> None:
    engine = make_engine(max_num_seqs=1)
    engine.add_request(make_request("runs", [1, 2]))
    engine.add_request(make_request("waits", [3, 4], n=2))
    engine.step(0.0)
    engine.abort("runs")
    engine.abort("waits")
    engine.abort("unknown")
    outputs = engine.step(1.0)
    engine.check()
    ends = [(o.request_id, o.choice_index, o.finish_reason) for o in outputs]
    abort = FinishReason.ABORT
    assert ends == [("runs", 0, abort), ("waits", 0, abort), ("waits", 1, abort)]
    assert not engine.has_work
    assert engine.stats().num_free_blocks == 64


def test_abort_while_the_step_is_computed_gives_no_token() -> None:
    engine = make_engine(OverlappingRunner(make_info()))
    engine.add_request(make_request("a", [1, 2]))
    assert engine.step(0.0) == []
    engine.abort("a")
    outputs = engine.step(1.0)
    assert [(o.token_ids, o.finish_reason) for o in outputs] == [([], FinishReason.ABORT)]
    assert not engine.has_work


def test_finish_ends_one_choice_without_another_output() -> None:
    engine = make_engine()
    engine.add_request(make_request("a", [9], n=2))
    engine.step(0.0)
    engine.finish("a", 0)
    engine.check()
    outputs = run(engine)
    assert {output.choice_index for output in outputs} == {1}


def test_deadline_ends_waiting_and_running_requests() -> None:
    engine = make_engine(max_num_seqs=1)
    engine.add_request(make_request("runs", [1], deadline=5.0, max_tokens=100))
    engine.add_request(make_request("waits", [1], deadline=5.0, max_tokens=100))
    assert all(output.finish_reason is None for output in engine.step(4.9))
    outputs = engine.step(5.0)
    assert {(o.request_id, o.finish_reason) for o in outputs if o.finish_reason} == {
        ("runs", FinishReason.TIMEOUT),
        ("waits", FinishReason.TIMEOUT),
    }


def test_row_that_is_not_finite_fails_alone() -> None:
    class Poisoned(FakeRunner):
        def collect(self) -> StepResult:
            result = super().collect()
            result.is_finite = np.arange(len(result.token_ids)) > 0
            return result

    engine = make_engine(Poisoned(make_info()))
    engine.add_request(make_request("bad", [1]))
    engine.add_request(make_request("good", [2], max_tokens=1))
    outputs = {output.request_id: output for output in engine.step(0.0)}
    assert outputs["bad"].finish_reason is FinishReason.ERROR
    assert "not finite" in (outputs["bad"].error or "")
    assert outputs["good"].token_ids == expected([2], 1)
    engine.check()


def test_fail_running_makes_the_engine_usable_after_a_runner_error() -> None:
    class FailsOnce(FakeRunner):
        failed = False

        def submit(self, batch: Batch) -> None:
            if not self.failed and batch.num_tokens > 2:
                self.failed = True
                raise EngineError("broken kernel")
            super().submit(batch)

    engine = make_engine(FailsOnce(make_info()))
    engine.add_request(make_request("a", [1, 2, 3]))
    with pytest.raises(EngineError, match="broken kernel"):
        engine.step(0.0)
    engine.fail_running("broken kernel")
    engine.check()
    engine.add_request(make_request("b", [1, 2, 3]))
    outputs = run(engine)
    failed = [output for output in outputs if output.request_id == "a"]
    assert [(o.error, o.finish_reason) for o in failed] == [("broken kernel", FinishReason.ERROR)]
    assert tokens_by_choice(outputs)["b", 0] == expected([1, 2, 3], 8)


@pytest.mark.parametrize(
    ("prompt", "changes"),
    [([1] * 100, {"max_tokens": 0}), ([1] * 128, {"max_tokens": None, "pooling": Pooling.MEAN})],
    ids=["scored", "pooled"],
)
def test_a_prompt_that_is_only_read_may_be_taken_up_again(
    prompt: list[int], changes: dict[str, object]
) -> None:
    engine = make_engine()
    engine.add_request(make_request("a", prompt, output_token_ids=[[]], **changes))  # type: ignore[arg-type]
    (output,) = run(engine)
    assert output.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [97]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [1] * 100, "max_tokens": 29}, "max_tokens"),
        ({"logit_bias": {97: 1.0}}, "logit_bias"),
        ({"stop_token_ids": (97,)}, "stop_token_ids"),
        ({"output_token_ids": [[1], [2]]}, "output_token_ids"),
        ({"output_token_ids": [[1] * 8]}, "output_token_ids"),
        ({"output_token_ids": [[97]]}, "output_token_ids"),
        ({"ended_choices": [0]}, "ended_choices"),
        ({"ended_choices": [3], "n": 2}, "ended_choices"),
        ({"allowed_token_ids": (5, 6), "min_tokens": 1, "stop_token_ids": (5, 6, 7)}, "min_tokens"),
        ({"adapter": "unknown"}, "model"),
        ({"priority": 1}, "priority"),
        ({"block_keys": [1, 2]}, "block_keys"),
        ({"pooling": Pooling.MEAN, "n": 2}, "n"),
    ],
)
def test_request_that_cannot_be_served_is_refused(changes: dict[str, object], param: str) -> None:
    engine = make_engine()
    prompt = changes.pop("prompt", [1])
    with pytest.raises(RequestError) as caught:
        engine.add_request(make_request("a", prompt, **changes))  # type: ignore[arg-type]
    assert caught.value.param == param
    assert not engine.has_work


def test_too_long_a_prompt_names_both_numbers() -> None:
    with pytest.raises(PromptTooLongError, match=r"128 tokens.*at most 127"):
        make_engine().add_request(make_request("a", [1] * 128))


def test_id_in_use_is_refused() -> None:
    engine = make_engine()
    engine.add_request(make_request("a", [1]))
    with pytest.raises(RequestError, match="in use"):
        engine.add_request(make_request("a", [1]))


def test_rows_show_the_sampler_the_sequence_so_far() -> None:
    seen: list[tuple[int, int, list[int]]] = []

    def script(row: SamplingRow) -> int:
        seen.append((row.position, row.num_prompt_tokens, list(row.token_ids)))
        return 50 + len(seen)

    engine = make_engine(FakeRunner(make_info(), script=script))
    engine.add_request(make_request("a", [1, 2], max_tokens=3))
    run(engine)
    assert seen == [(2, 2, [1, 2]), (3, 2, [1, 2, 51]), (4, 2, [1, 2, 51, 52])]


def test_request_without_tokens_to_make_ends_when_its_prompt_is_computed() -> None:
    engine = make_engine(max_batched_tokens=16)
    engine.add_request(make_request("a", list(range(40)), max_tokens=0))
    outputs = run(engine)
    assert [(o.token_ids, o.finish_reason) for o in outputs] == [([], FinishReason.LENGTH)]
    assert engine.stats().num_steps == 3


def test_prompt_logprobs_come_once_whole_and_do_not_depend_on_chunks() -> None:
    prompt = list(range(37))
    gathered = []
    for budget in (16, 64):
        engine = make_engine(max_batched_tokens=budget)
        engine.add_request(make_request("a", prompt, prompt_logprobs=1, n=2, max_tokens=2))
        outputs = [output for output in run(engine) if output.prompt_logprobs]
        assert [output.choice_index for output in outputs] == [0]
        gathered.append(outputs[0].prompt_logprobs)
    assert len(gathered[0]) == len(prompt) - 1
    assert gathered[0] == gathered[1]


@pytest.mark.parametrize("pooling", list(Pooling))
def test_vector_does_not_depend_on_chunks_or_preemption(pooling: Pooling) -> None:
    prompt = list(range(50))
    vectors = []
    for budget, others in ((64, 0), (16, 0), (16, 6)):
        engine = make_engine(max_batched_tokens=budget, num_blocks=33)
        for index in range(others):
            engine.add_request(make_request(f"o{index}", [index] * 15, max_tokens=60))
        engine.add_request(make_request("a", prompt, pooling=pooling, arrival_time=1.0))
        (output,) = [output for output in run(engine) if output.request_id == "a"]
        assert output.finish_reason is FinishReason.LENGTH
        vectors.append(output.vector)
    assert vectors[0] is not None
    assert vectors == [vectors[0]] * 3


def test_blocks_wasted_are_under_one_for_each_sequence() -> None:
    engine = make_engine(num_blocks=200, has_prefix_cache=False)
    for index, prompt in enumerate(PROMPTS):
        engine.add_request(make_request(f"r{index}", prompt, max_tokens=30))

    def check_waste(engine: Engine) -> None:
        running = engine._scheduler.running
        held = engine.stats().num_blocks - engine.stats().num_free_blocks
        needed = sum(-(-int(running.num_computed[s.row]) // 4) for s in running.sequences)
        assert held - needed <= len(running)

    run(engine, each_step=check_waste)


def test_starved_cache_gives_the_same_tokens_and_everybody_ends() -> None:
    """reliability R11: a pool of a quarter of what 64 prompts need."""
    prompts = [[(5 * i + j) % 97 for j in range(8 + i % 8)] for i in range(64)]
    need = sum(-(-(len(prompt) + 64) // 4) for prompt in prompts)
    engine = make_engine(num_blocks=need // 4, max_num_seqs=64, max_batched_tokens=64)
    for index, prompt in enumerate(prompts):
        engine.add_request(make_request(f"r{index}", prompt, max_tokens=64, temperature=index % 2))
    tokens = tokens_by_choice(run(engine))
    ample = make_engine(num_blocks=need, max_num_seqs=64, max_batched_tokens=64)
    for index, prompt in enumerate(prompts):
        ample.add_request(make_request(f"r{index}", prompt, max_tokens=64, temperature=index % 2))
    assert tokens == tokens_by_choice(run(ample))
    assert ample.stats().num_preemptions == 0
    assert engine.stats().num_preemptions >= 20


@pytest.mark.parametrize("policy", ["fcfs", "priority", "fair"])
def test_policies_serve_the_same_tokens_to_everybody(policy: str) -> None:
    engine = make_engine(policy=policy, num_blocks=40, max_num_seqs=5)
    for index, prompt in enumerate(PROMPTS):
        priority = 0 if policy == "fcfs" else -index
        request = make_request(f"r{index}", prompt, priority=priority, tenant=str(index % 3))
        engine.add_request(request)
    tokens = tokens_by_choice(run(engine))
    for index, prompt in enumerate(PROMPTS):
        assert tokens[f"r{index}", 0] == expected(prompt, 8)


def test_tenant_with_few_requests_is_not_behind_one_with_many() -> None:
    """reliability R12: under `fair`, the light tenant waits for its share and not for the queue."""
    ends: dict[str, dict[str, float]] = {}
    for policy in ("fcfs", "fair"):
        engine = make_engine(policy=policy, max_num_seqs=2)
        for index in range(30):
            engine.add_request(make_request(f"heavy{index}", [index], tenant="heavy"))
        engine.add_request(make_request("light", [50], tenant="light"))
        ends[policy] = {}
        now = 0.0
        while engine.has_work:
            now += 1.0
            for output in engine.step(now):
                if output.finish_reason is not None:
                    ends[policy][output.request_id] = now
    assert ends["fair"]["light"] <= 3 * 8
    assert ends["fcfs"]["light"] > 10 * 8
