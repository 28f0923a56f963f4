"""The torch runner under the engine, against the plain loop over the same model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from llmserve.checkpoint import Checkpoint, save_model
from llmserve.engine.config import SpeculationConfig
from llmserve.engine.engine import Engine
from llmserve.engine.request import FinishReason
from llmserve.errors import ConfigError, EngineError
from llmserve.model.plain import generate_plain
from llmserve.model.weights import load_model
from llmserve.runners.registry import load_runner
from llmserve.runners.torch_runner import TorchRunner
from support.batches import Share, make_batch, make_row
from support.engines import make_config, make_request, run, tokens_by_choice
from support.engines import make_engine as make_engine_over
from support.variants import VARIANTS, random_tensors

PROMPTS = [[(5 * i + 3 * j) % 60 for j in range(1 + 4 * i)] for i in range(6)]
NEW_TOKENS = 16


@pytest.fixture(params=["llama", "llama-mqa", "llama-biases", "gpt2", "own-sinusoidal", "own-none"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Checkpoint:
    config = dataclasses.replace(VARIANTS[request.param], eos_token_ids=())
    save_model(tmp_path / "model", config, random_tensors(config))
    return Checkpoint.open(tmp_path / "model")


def make_engine(checkpoint: Checkpoint, **changes: object) -> Engine:
    values = {"num_blocks": 60, "max_seq_len": 48, "max_batched_tokens": 64, "max_num_seqs": 8}
    return Engine(TorchRunner(checkpoint), make_config(**{**values, **changes}))


def generate(engine: Engine, **changes: object) -> dict[tuple[str, int], list[int]]:
    for index, prompt in enumerate(PROMPTS):
        engine.add_request(
            make_request(str(index), prompt, max_tokens=NEW_TOKENS, seed=index, **changes)
        )
    return tokens_by_choice(run(engine))


@pytest.mark.parametrize(
    "changes",
    [{}, {"max_batched_tokens": 9}, {"num_blocks": 26}, {"max_num_seqs": 1}],
    ids=["whole prompts", "chunks", "preemption", "one by one"],
)
def test_greedy_tokens_are_those_of_the_plain_loop(
    checkpoint: Checkpoint, changes: dict[str, int]
) -> None:
    engine = make_engine(checkpoint, **changes)
    tokens = generate(engine)
    model = load_model(checkpoint)
    for index, prompt in enumerate(PROMPTS):
        assert tokens[str(index), 0] == generate_plain(model, prompt, NEW_TOKENS)
    assert (engine.stats().num_preemptions > 0) == ("num_blocks" in changes)


def test_seeded_tokens_do_not_depend_on_the_batch(checkpoint: Checkpoint) -> None:
    together = generate(make_engine(checkpoint), temperature=1.0)
    apart = generate(make_engine(checkpoint, max_num_seqs=1), temperature=1.0)
    assert together == apart


def test_logprobs_are_those_of_the_whole_forward(checkpoint: Checkpoint) -> None:
    engine = make_engine(checkpoint)
    engine.add_request(make_request("a", PROMPTS[3], max_tokens=4, logprobs=2))
    outputs = run(engine)
    ids = [*PROMPTS[3], *tokens_by_choice(outputs)["a", 0]]
    with torch.inference_mode():
        logits = load_model(checkpoint)(torch.tensor([ids]))[0].log_softmax(-1).numpy()
    for place, output in enumerate(outputs):
        row = logits[len(PROMPTS[3]) - 1 + place]
        assert output.logprobs[0].logprob == pytest.approx(row[output.token_ids[0]], abs=1e-5)
        assert [i for i, _ in output.logprobs[0].top] == np.argsort(-row, kind="stable")[
            :2
        ].tolist()


def test_row_with_nan_weights_ends_as_an_error(tmp_path: Path) -> None:
    config = VARIANTS["llama"]
    tensors = random_tensors(config)
    tensors["model.norm.weight"][0] = np.nan
    save_model(tmp_path / "model", config, tensors)
    engine = make_engine(Checkpoint.open(tmp_path / "model"))
    engine.add_request(make_request("a", [1, 2, 3]))
    outputs = run(engine)
    assert [output.finish_reason for output in outputs] == [FinishReason.ERROR]


def test_info_says_what_is_executed(checkpoint: Checkpoint) -> None:
    runner = TorchRunner(checkpoint, dtype="bfloat16")
    config = checkpoint.config
    assert runner.info.executed_form == "bfloat16"
    assert runner.info.weight_bytes == 2 * runner.info.num_parameters
    assert runner.info.cache_bytes_per_token == 2 * 2 * config.num_layers * config.kv_size


def test_use_before_its_time_is_an_error(checkpoint: Checkpoint) -> None:
    runner = TorchRunner(checkpoint)
    with pytest.raises(EngineError, match="submit first"):
        runner.collect()


def test_a_step_that_nobody_collected_is_forgotten(checkpoint: Checkpoint) -> None:
    runner = TorchRunner(checkpoint)
    runner.allocate_cache((2,), 16)
    for count in (2, 1):
        share = Share(token_ids=[3] * count, tables=[[0]], rows=[make_row([3])] * count)
        runner.submit(make_batch([share], block_size=16))
    assert len(runner.collect().token_ids) == 1
    with pytest.raises(EngineError, match="submit first"):
        runner.collect()


def test_tokens_drawn_on_the_host_are_not_fed(checkpoint: Checkpoint) -> None:
    runner = TorchRunner(checkpoint)
    assert not runner.info.feeds_tokens
    runner.allocate_cache((2,), 16)
    batch = make_batch([Share(token_ids=[3], tables=[[0]])], block_size=16)
    batch.fed_rows = np.array([0])
    with pytest.raises(EngineError, match="drawn on the host"):
        runner.submit(batch)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "int3"}, "dtype must be one of"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"runner": "abacus"}, "runner must be one of"),
        ({"enforce_eager": True}, "the device is cpu"),
        ({"enforce_eager": True, "runner": "native"}, "the device is cpu"),
    ],
)
def test_unknown_setting_is_refused(
    checkpoint: Checkpoint, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_runner(**{"runner": "torch", "checkpoint": checkpoint, **settings})  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "changes",
    [
        {"max_batched_tokens": 9},
        {"num_blocks": 26},
        {"max_num_seqs": 1},
        {
            "speculation": SpeculationConfig(
                method="ngram", num_draft_tokens=3, min_ngram=1, is_always_on=True
            )
        },
    ],
    ids=["chunks", "preemption", "one by one", "speculation"],
)
def test_deterministic_logprobs_are_equal_to_the_bit(
    tmp_path: Path, dtype: str, changes: dict[str, object]
) -> None:
    config = dataclasses.replace(VARIANTS["llama"], eos_token_ids=())
    save_model(tmp_path / "model", config, random_tensors(config))
    checkpoint = Checkpoint.open(tmp_path / "model")

    def answers(**changes: object) -> dict[str, list[object]]:
        runner = load_runner("torch", checkpoint, dtype=dtype, deterministic=True)
        assert runner.info.executed_form == f"{dtype}, deterministic"
        values = {"num_blocks": 60, "max_seq_len": 48, "max_batched_tokens": 64, "max_num_seqs": 8}
        engine = make_engine_over(runner, **{**values, **changes})
        for index, prompt in enumerate(PROMPTS * 2):  # the second time from the prefix cache
            engine.add_request(
                make_request(str(index), prompt, max_tokens=16, seed=index, logprobs=2)
            )
        found: dict[str, list[object]] = {}
        for output in run(engine):
            found.setdefault(output.request_id, []).extend(
                zip(output.token_ids, output.logprobs, strict=True)
            )
        return found

    assert answers(**changes) == answers()
