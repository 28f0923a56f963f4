"""The torch runner as it is on a GPU: a step is only started, and waited for when it is collected.

On a CPU nothing runs beside the host, but everything else is the same: where sampling is done,
when results are read, and that nothing is read before.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmserve.checkpoint import Checkpoint, save_model
from llmserve.config import Head
from llmserve.engine.config import SpeculationConfig
from llmserve.engine.engine import Engine
from llmserve.engine.request import FinishReason, Pooling, RequestOutput, Scoring
from llmserve.runners import torch_runner
from llmserve.runners.protocol import HeadRows, HiddenSum, PromptRows
from llmserve.runners.torch_answers import DeviceAnswers
from llmserve.runners.torch_runner import TorchRunner
from llmserve.runners.torch_transfer import Download
from support.batches import Share, make_batch, make_row
from support.engines import make_engine, make_request, run, tokens_by_choice
from support.no_waiting import never_waiting
from support.sampling_strategies import check_entry
from support.variants import VARIANTS, random_tensors

PROMPTS = [[(5 * i + 3 * j) % 60 for j in range(1 + 4 * i)] for i in range(6)]
LIMITS = {"num_blocks": 60, "max_seq_len": 48, "max_batched_tokens": 64, "max_num_seqs": 8}
NGRAM = SpeculationConfig(method="ngram", num_draft_tokens=3, min_ngram=1, is_always_on=True)


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_runner, "works_ahead", lambda device: True)


def write_model(folder: Path, **changes: Any) -> Checkpoint:
    config = dataclasses.replace(VARIANTS["llama"], eos_token_ids=(), **changes)
    save_model(folder, config, random_tensors(config))
    return Checkpoint.open(folder)


def answers(checkpoint: Checkpoint, **changes: Any) -> list[RequestOutput]:
    """Of requests that ask for everything, each for something else."""
    asked: list[dict[str, Any]] = [
        {"logprobs": 3},
        {"temperature": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
        {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "prompt_logprobs": 2, "n": 2},
        {"temperature": 1.3, "min_p": 0.02, "typical_p": 0.9, "logprobs": 0},
        {"max_tokens": 0, "prompt_logprobs": 0},
        {"pooling": Pooling.MEAN},
    ]
    engine = make_engine(TorchRunner(checkpoint), **{**LIMITS, **changes})
    for index, (prompt, each) in enumerate(zip(PROMPTS, asked, strict=True)):
        values = {"max_tokens": 16, "seed": index, **each}
        engine.add_request(make_request(str(index), [*prompt, 7, 8], **values))
    return run(engine)


@pytest.mark.parametrize(
    "changes",
    [{}, {"max_batched_tokens": 9}, {"num_blocks": 26}, {"speculation": NGRAM}],
    ids=["whole prompts", "chunks", "preemption", "speculation"],
)
def test_answers_are_those_of_the_synchronous_runner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    checkpoint = write_model(tmp_path / "model")
    wanted = answers(checkpoint, **changes)
    monkeypatch.setattr(torch_runner, "works_ahead", lambda device: True)
    found = answers(checkpoint, **changes)
    assert tokens_by_choice(found) == tokens_by_choice(wanted)
    for one, two in zip(in_order(found), in_order(wanted), strict=True):
        for place, entries in enumerate((one.logprobs, one.prompt_logprobs or [])):
            others = (two.logprobs, two.prompt_logprobs or [])[place]
            for entry, exact in zip(entries, others, strict=True):
                check_entry(entry, exact)
        assert one.vector == two.vector
    assert any(output.vector for output in found)


def in_order(outputs: list[RequestOutput]) -> list[RequestOutput]:
    """By choice; those of one choice as they came."""
    return sorted(outputs, key=lambda output: (output.request_id, output.choice_index))


def test_scores_of_a_head_are_those_of_the_synchronous_runner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = write_model(tmp_path, head=Head(kind="span", labels=("start", "end")))
    found = []
    for is_ahead in (False, True):
        monkeypatch.setattr(torch_runner, "works_ahead", lambda device, ahead=is_ahead: ahead)
        engine = make_engine(TorchRunner(checkpoint), **{**LIMITS, "max_batched_tokens": 9})
        for index, prompt in enumerate(PROMPTS):
            engine.add_request(make_request(str(index), prompt, scoring=Scoring.EACH))
        found.append({output.request_id: output.scores for output in run(engine)})
    assert found[0] == found[1]
    assert len(found[1]["5"]) == len(PROMPTS[5])


@pytest.mark.parametrize("max_seqs", [1, 6])
def test_tokens_of_steps_chosen_ahead_are_those_of_the_synchronous_runner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_seqs: int
) -> None:
    """Their tokens never come to the host before they are used; ends and masks go by position."""
    checkpoint = write_model(tmp_path)
    asked: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0, "min_tokens": 9, "stop_token_ids": tuple(range(0, 60, 4))},
        {"temperature": 0.8, "top_p": 0.9, "logprobs": 2, "n": 2},
        {"temperature": 2.0, "logit_bias": {5: 2.0}, "banned_token_ids": (7, 9)},
        {"temperature": 1.0, "stop_token_ids": tuple(range(30))},
    ]
    fed: list[int] = []

    def generate() -> list[RequestOutput]:
        engine = make_engine(TorchRunner(checkpoint), **{**LIMITS, "max_num_seqs": max_seqs})
        for index, each in enumerate(asked):
            request = make_request(str(index), PROMPTS[index], seed=index, max_tokens=14, **each)
            engine.add_request(request)
        return in_order(run(engine))

    wanted = generate()
    monkeypatch.setattr(torch_runner, "works_ahead", lambda device: True)
    drawn = DeviceAnswers.drawn

    def spy(self: DeviceAnswers, rows: np.ndarray) -> Tensor:
        fed.append(len(rows))
        return drawn(self, rows)

    monkeypatch.setattr(DeviceAnswers, "drawn", spy)
    found = generate()
    assert tokens_by_choice(found) == tokens_by_choice(wanted)
    assert [out.finish_reason for out in found] == [out.finish_reason for out in wanted]
    assert any(out.finish_reason is FinishReason.STOP for out in found)
    assert len(fed) > 8
    assert max(fed) == max_seqs


@pytest.mark.usefixtures("ahead")
def test_nothing_is_waited_for_before_the_step_is_collected(tmp_path: Path) -> None:
    """Decodes beside a prefill, every kind of question; more positions than a first table has."""
    runner = TorchRunner(write_model(tmp_path, max_seq_len=9000))
    runner.allocate_cache((8,), 16)
    rows = [make_row([4, 9, 3], temperature=1.0, top_p=0.9, presence_penalty=1.0, logprobs=2)]
    shares = [
        Share(token_ids=[3], first=2, tables=[[0]], rows=rows),
        Share(token_ids=[5] * 20, tables=[[1, 2]], rows=[make_row([5] * 20)]),
    ]
    batch = make_batch(
        shares,
        block_size=16,
        copies=[[(0, 3)]],
        prompt_rows=[PromptRows(start=1, targets=[5] * 19, num_top=2)],
        hidden_sums=[HiddenSum(start=1, stop=9, carry=np.ones(runner.info.hidden_size))],
    )
    follows = make_batch([Share(token_ids=[-1], first=3, tables=[[0]], rows=rows)], block_size=16)
    follows.fed_rows = np.array([0])
    with never_waiting():
        runner.submit(batch)
        runner.submit(follows)
    result = runner.collect()
    assert len(result.token_ids) == 2
    assert len(runner.collect().token_ids) == 1
    assert len(result.prompt_logprobs[0]) == 19
    assert result.hidden_sums[0].dtype == np.float64


@pytest.mark.usefixtures("ahead")
def test_scores_are_not_waited_for(tmp_path: Path) -> None:
    runner = TorchRunner(write_model(tmp_path, head=Head(kind="sequence", labels=("a", "b"))))
    runner.allocate_cache((2,), 16)
    batch = make_batch([Share(token_ids=[5] * 4, tables=[[1]])], block_size=16)
    batch.head_rows = [HeadRows(start=1, stop=4)]
    with never_waiting():
        runner.submit(batch)
    assert np.shape(runner.collect().head_scores[0]) == (3, 2)


@pytest.mark.usefixtures("ahead")
def test_error_of_the_device_surfaces_when_the_step_is_collected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ran ends, what did not goes on, and later requests are served as ever."""
    checkpoint = write_model(tmp_path)
    engine = make_engine(TorchRunner(checkpoint), **{**LIMITS, "max_num_seqs": 1})
    for name in ("a", "b"):
        engine.add_request(make_request(name, PROMPTS[3]))
    assert engine.step(0.0) == []

    def fail(self: Download) -> list[np.ndarray]:
        raise RuntimeError("an illegal memory access was encountered")

    with monkeypatch.context() as broken:
        broken.setattr(Download, "wait", fail)
        with pytest.raises(RuntimeError, match="illegal memory access"):
            engine.step(1.0)
    engine.fail_running("the device failed")
    outputs = run(engine)
    ended = {out.request_id: out.finish_reason for out in outputs if out.finish_reason}
    assert ended == {"a": FinishReason.ERROR, "b": FinishReason.LENGTH}
    alone = Engine(TorchRunner(checkpoint), engine.config)
    alone.add_request(make_request("b", PROMPTS[3]))
    assert tokens_by_choice(run(alone))["b", 0] == tokens_by_choice(outputs)["b", 0]


def test_a_cpu_is_not_worked_ahead_of() -> None:
    assert not torch_runner.works_ahead(torch.device("cpu"))
    assert torch_runner.works_ahead(torch.device("cuda:1"))
