"""What a model's head makes of a prompt, through the engine: chunked, preempted, beside text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from llmserve.checkpoint import Checkpoint, save_model
from llmserve.config import Head, ModelConfig
from llmserve.engine.engine import Engine
from llmserve.engine.request import FinishReason, Scoring
from llmserve.errors import RequestError
from llmserve.layouts import expected_tensors
from llmserve.llm import LLM
from llmserve.model.attention import CausalAttention
from llmserve.model.weights import load_model
from llmserve.runners.fake import FakeRunner
from llmserve.runners.protocol import RunnerInfo
from llmserve.runners.torch_runner import TorchRunner
from support.engines import make_config, make_engine, make_info, make_request, run
from support.models import make_model_folder

CLASSIFIER = Head(kind="sequence", labels=("no", "yes", "maybe"))
SPAN = Head(kind="span", labels=("start", "end"))
TOLERANCE = 1e-5  # sums of float32 values about 1, in another order


def scoring_info(**changes: object) -> RunnerInfo:
    return make_info(head="sequence", labels=("a", "b"), **changes)


@pytest.mark.parametrize("scoring", list(Scoring))
def test_scores_do_not_depend_on_chunks_neighbours_or_preemption(scoring: Scoring) -> None:
    def scores(**changes: int) -> dict[str, list[list[float]]]:
        engine = make_engine(FakeRunner(scoring_info()), **changes)
        for index in range(6):
            prompt = [(7 * index + place) % 90 for place in range(40)]
            engine.add_request(make_request(f"r{index}", prompt, scoring=scoring))
        outputs = run(engine)
        assert all(output.finish_reason is FinishReason.LENGTH for output in outputs)
        return {output.request_id: output.scores for output in outputs}

    whole = scores(max_batched_tokens=512, num_blocks=256)
    assert scores(max_batched_tokens=7, num_blocks=40) == whole
    num_scored = 40 if scoring is Scoring.EACH else 1
    assert {(len(rows), len(rows[0])) for rows in whole.values()} == {(num_scored, 2)}


def test_what_a_model_does_not_give_is_refused() -> None:
    with pytest.raises(RequestError, match="scores, not text"):
        make_engine(FakeRunner(scoring_info())).add_request(make_request("a", [1]))
    with pytest.raises(RequestError, match="no head"):
        make_engine().add_request(make_request("a", [1], scoring=Scoring.LAST))
    engine = make_engine(FakeRunner(scoring_info()))
    with pytest.raises(RequestError, match="one choice"):
        engine.add_request(make_request("a", [1], scoring=Scoring.LAST, n=2))


def model_with(head: Head, folder: Path) -> Checkpoint:
    config = ModelConfig(
        vocab_size=97, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
        intermediate_size=48, max_seq_len=128, head=head,
    )  # fmt: skip
    generator = np.random.default_rng(0)
    tensors = {
        name: generator.normal(0, 0.3, shape).astype(np.float32)
        for name, shape in expected_tensors(config).items()
    }
    save_model(folder, config, tensors)
    return Checkpoint.open(folder)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    ("head", "scoring"), [(CLASSIFIER, Scoring.LAST), (SPAN, Scoring.EACH)], ids=["class", "span"]
)
def test_the_torch_runner_scores_as_the_model_does(
    tmp_path: Path, head: Head, scoring: Scoring, deterministic: bool
) -> None:
    checkpoint = model_with(head, tmp_path / "m")
    runner = TorchRunner(checkpoint, deterministic=deterministic)
    engine = Engine(runner, make_config(max_batched_tokens=16, num_blocks=64))
    prompts = {f"r{index}": [(5 * index + place) % 97 for place in range(37)] for index in range(3)}
    for name, prompt in prompts.items():
        engine.add_request(make_request(name, prompt, scoring=scoring))
    model = load_model(checkpoint, dtype=torch.float32, device="cpu")
    for output in run(engine):
        ids = torch.tensor([prompts[output.request_id]])
        with torch.inference_mode():
            hidden = model.hidden(ids, torch.arange(37), CausalAttention(model.config))
            wanted = model.scores(hidden)[0]
        wanted = wanted[-1:] if scoring is Scoring.LAST else wanted
        assert np.allclose(output.scores, wanted.numpy(), atol=TOLERANCE)
    runner.close()


def test_a_classifier_loads_with_its_steps_calibrated_and_writes_nothing(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "m", head=CLASSIFIER)
    with LLM(folder) as llm, pytest.raises(RequestError, match="scores, not text"):
        llm.generate("Once")
