"""A run written down and played again: the same decisions and tokens, or the first that differ."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from llmserve.engine.config import SpeculationConfig
from llmserve.engine.engine import Engine
from llmserve.engine.replay import replay
from llmserve.engine.request import FinishReason, Pooling
from llmserve.engine.speculator import make_drafter
from llmserve.engine.step_log import StepLog, parse_engine, parse_request, read_log
from llmserve.errors import DataError, EngineError
from llmserve.runners.fake import FakeRunner
from llmserve.runners.protocol import Batch
from support.engine_life import EngineLife, OverlappingRunner, random_setting
from support.engines import make_config, make_info, make_request


def record(path: Path, *, runner: FakeRunner | None = None, **changes: object) -> Engine:
    """A busy run with everything in it: choices, aborts, finishes, vectors, preemption."""
    config = make_config(**{"num_blocks": 40, "max_batched_tokens": 16, **changes})
    runner = runner or FakeRunner(make_info())
    with path.open("w", encoding="utf-8") as file:
        engine = Engine(
            runner, config, drafter=make_drafter(runner.info, config), watcher=StepLog(file)
        )
        for index in range(8):
            engine.add_request(
                make_request(
                    f"r{index}",
                    [index % 3] * (5 + 4 * index),
                    n=1 + index % 2,
                    temperature=float(index % 2),
                    logit_bias={3: 1.5},
                    max_tokens=30,
                )
            )
        engine.add_request(make_request("v", [1, 2, 3], pooling=Pooling.MEAN))
        engine.add_request(make_request("p", [1] * 20, prompt_logprobs=1))
        now = 0.0
        while engine.has_work:
            now += 0.5
            engine.step(now)
            if now == 3.0:
                engine.abort("r1")
            if now == 4.0:
                engine.finish("r3", 0)
    return engine


@pytest.mark.parametrize("kind", [FakeRunner, OverlappingRunner])
@pytest.mark.parametrize(
    "speculation", [None, SpeculationConfig(method="ngram", num_draft_tokens=3)]
)
def test_recorded_run_plays_again_alike(
    tmp_path: Path, kind: type[FakeRunner], speculation: SpeculationConfig | None
) -> None:
    path = tmp_path / "steps.jsonl"
    stats = record(path, runner=kind(make_info()), speculation=speculation).stats()
    report = replay(path)
    assert report.difference is None
    assert (report.num_requests, report.num_steps) == (10, stats.num_steps)
    assert report.num_preemptions == stats.num_preemptions > 0
    assert replay(path, kind(make_info())).difference is None


def test_random_lives_play_again_alike(tmp_path: Path) -> None:
    for seed in range(30):
        rng = random.Random(seed)
        path = tmp_path / f"{seed}.jsonl"
        with path.open("w", encoding="utf-8") as file:
            life = EngineLife(random_setting(seed), watcher=StepLog(file))
            for _ in range(60):
                life.random_operation(rng)
            life.drain()
        assert replay(path).difference is None


def test_other_tokens_of_a_model_are_the_first_difference(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    record(path)
    report = replay(path, FakeRunner(make_info(), script=lambda row: 7))
    assert report.difference is not None
    assert "drawn" in report.difference


def test_changed_decision_is_found(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    record(path)
    lines = path.read_text().splitlines()
    place = next(i for i, line in enumerate(lines) if line.startswith('["work"') and i > 40)
    work = json.loads(lines[place])
    work[1][0][1] += 1
    lines[place] = json.dumps(work)
    path.write_text("\n".join(lines) + "\n")
    report = replay(path)
    assert report.difference is not None
    assert "work" in report.difference


def test_step_that_failed_fails_again(tmp_path: Path) -> None:
    class FailsOnce(FakeRunner):
        num_steps = 0

        def submit(self, batch: Batch) -> None:
            self.num_steps += 1
            if self.num_steps == 3:
                raise EngineError("broken kernel")
            super().submit(batch)

    path = tmp_path / "steps.jsonl"
    with path.open("w", encoding="utf-8") as file:
        engine = Engine(FailsOnce(make_info()), make_config(max_num_seqs=2), watcher=StepLog(file))
        for index in range(4):
            engine.add_request(make_request(f"r{index}", [index] * 9))
        now = 0.0
        while engine.has_work:
            now += 1.0
            try:
                engine.step(now)
            except EngineError as error:
                engine.fail_running(str(error))
    assert replay(path).difference is None
    assert replay(path, FakeRunner(make_info())).difference is None


def test_run_that_was_killed_plays_up_to_its_last_whole_step(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    record(path)
    data = path.read_bytes()
    for cut in (len(data) // 2, len(data) // 2 + 7, len(data) - 1):
        path.write_bytes(data[:cut])
        assert replay(path).difference is None


def test_header_and_requests_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    engine = record(path, speculation=SpeculationConfig(method="ngram", num_draft_tokens=2))
    records = list(read_log(path))
    assert parse_engine(records[0]) == (make_info(), engine.config, False)
    request = make_request(
        "r", [1, 2], allowed_token_ids=(1, 2), stop=("x",), logit_bias={5: -1.0}, deadline=3.0
    )
    with path.open("w", encoding="utf-8") as file:
        StepLog(file).added(request)
    assert parse_request(next(read_log(path))[1]) == request


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("not json\n", "line 1"),
        ('{"a": 1}\n', "line 1"),
        ('["engine", 99, {}, {}, false]\n', "version"),
        ('["engine", 1, {}, {}, false]\n', "first line"),
    ],
)
def test_file_that_is_no_step_log_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "steps.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        replay(path)


@pytest.mark.parametrize(
    "line",
    [
        '["abort", "r1", "boredom"]',
        '["work", [[1, 0]], []]',
        '["drawn", 7, []]',
        '["drawn", ["x"], []]',
        '["drawn", [1], [9]]',
        '["dance"]',
        '["add", {}]',
    ],
)
def test_damaged_record_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "steps.jsonl"
    record(path)
    lines = path.read_text().splitlines()
    kind = json.loads(line)[0]
    same = [i for i, text in enumerate(lines) if text.startswith(f'["{kind}"')]
    place = same[0] if same else 20
    path.write_text("\n".join([*lines[:place], line, *lines[place + 1 :]]) + "\n")
    with pytest.raises(DataError, match="step log"):
        replay(path)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        replay(tmp_path / "none.jsonl")


def test_abort_reasons_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    with path.open("w", encoding="utf-8") as file:
        engine = Engine(FakeRunner(make_info()), make_config(), watcher=StepLog(file))
        engine.add_request(make_request("a", [1]))
        engine.abort("a", FinishReason.TIMEOUT)
        engine.step(0.0)
    assert ["abort", "a", "timeout"] in list(read_log(path))
    assert replay(path).difference is None
