"""The exported graph under the engine: the same answers as torch, alone, together and in chunks."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from llmserve import failpoints
from llmserve import llm as llm_module
from llmserve.checkpoint import Checkpoint
from llmserve.engine.config import SpeculationConfig
from llmserve.engine.request import FinishReason, Request
from llmserve.errors import CheckpointError, ConfigError
from llmserve.export.export_onnx import export_onnx
from llmserve.llm import LLM
from llmserve.runners import host_sampling
from llmserve.runners.onnx_runner import OnnxRunner
from llmserve.runners.protocol import Batch
from llmserve.runners.registry import load_runner
from llmserve.sampling import SamplingParams
from support.models import make_model_folder

pytestmark = pytest.mark.onnx

GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
PROMPTS = [
    np.random.default_rng(length).integers(1, 320, length).tolist()
    for length in (1, 30, 5, 17, 2, 40, 9)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("run") / "model")


@pytest.fixture(scope="module")
def exported(model: Path) -> Callable[[str], Path]:
    """The model as a graph in a scheme; each made once."""

    def folder(scheme: Any) -> Path:
        out = model.with_name(f"onnx-{scheme}")
        if not out.exists():
            export_onnx(model, out, scheme=scheme)
        return out

    return folder


def answers(folder: Path, runner: str, params: SamplingParams = GREEDY, **options: Any) -> Any:
    with LLM(folder, runner=runner, threads=1, **options) as llm:
        return llm.generate(PROMPTS, params)


def test_answers_are_torchs(model: Path, exported: Callable[[str], Path]) -> None:
    assert answers(exported("fp32"), "onnx") == answers(model, "torch")


@pytest.mark.parametrize("penalty", [1.0, 1.1])
def test_seeded_draws_are_torchs(
    model: Path, exported: Callable[[str], Path], penalty: float
) -> None:
    params = SamplingParams(
        max_tokens=12, temperature=0.8, top_p=0.9, seed=7, n=2, repetition_penalty=penalty
    )
    found, wanted = (
        [[choice.token_ids for choice in answer.choices] for answer in answers(*one, params)]
        for one in ((exported("fp32"), "onnx"), (model, "torch"))
    )
    assert found == wanted


def test_log_probabilities_are_torchs(model: Path, exported: Callable[[str], Path]) -> None:
    params = SamplingParams(max_tokens=3, temperature=0.0, logprobs=2, prompt_logprobs=2)
    found, wanted = answers(exported("fp32"), "onnx", params), answers(model, "torch", params)
    for one, other in zip(found, wanted, strict=True):
        got, expected = (
            [entry.logprob for entry in [*answer.prompt_logprobs, *answer.choices[0].logprobs]]
            for answer in (one, other)
        )
        np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize("scheme", ["fp32", "int8", "int4"])
def test_answers_do_not_depend_on_the_batch(exported: Callable[[str], Path], scheme: str) -> None:
    """A few at a time, in chunks of 24 tokens, and with room for few of them."""
    together = answers(exported(scheme), "onnx")
    squeezed = answers(
        exported(scheme), "onnx", max_batched_tokens=24, max_num_seqs=3, cache_bytes=50_000
    )
    assert squeezed == together
    with LLM(exported(scheme), runner="onnx", threads=1) as llm:
        assert [llm.generate([prompt], GREEDY)[0] for prompt in PROMPTS] == together


@pytest.mark.parametrize("has_kernels", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rounds_in_one_step_change_no_token(
    exported: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    temperature: float,
    has_kernels: bool,
) -> None:
    """Over the places where rows of the cache get more room, and where one sequence ends early."""
    if not has_kernels:
        monkeypatch.setattr(host_sampling, "load_kernels", lambda: None)
    params = [
        SamplingParams(max_tokens=length, temperature=temperature, seed=length, ignore_eos=True)
        for length in (150, 20, 30)
    ]
    found, num_steps = [], []
    for seconds in (0.0, 1e9):
        monkeypatch.setattr(llm_module, "_MOST_ROUNDS_S", seconds)
        with LLM(exported("int8"), runner="onnx", threads=1) as llm:
            found.append(llm.generate(PROMPTS[:3], params))
            num_steps.append(llm.engine.stats().num_steps)
    assert found[0] == found[1]
    assert num_steps[1] < num_steps[0] / 4


def test_rounds_end_with_the_sequences(
    exported: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llm_module, "_MOST_ROUNDS_S", 1e9)
    drawn: list[int] = []
    submit = OnnxRunner.submit

    def note(runner: OnnxRunner, batch: Batch) -> None:
        submit(runner, batch)
        assert runner._result is not None
        drawn.append(len(runner._result.token_ids))

    with LLM(exported("fp32"), runner="onnx", threads=1) as llm:
        drawn_by_chance = SamplingParams(max_tokens=24, temperature=1.0, seed=1, ignore_eos=True)
        (whole,) = llm.generate(PROMPTS[3:4], drawn_by_chance)
        ids = whole.choices[0].token_ids
        place = next(n for n in range(4, 24) if ids[n] not in ids[:n])
        monkeypatch.setattr(OnnxRunner, "submit", note)
        params = dataclasses.replace(drawn_by_chance, stop_token_ids=(ids[place],))
        (ended,) = llm.generate(PROMPTS[3:4], params)
    assert ended.choices[0].token_ids == ids[: place + 1]
    assert sum(drawn) == place + 1


def test_rounds_end_with_a_row_that_cannot_be_used(
    exported: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its request ends with what was drawn before; the others get all of their tokens."""
    monkeypatch.setattr(llm_module, "_MOST_ROUNDS_S", 1e9)
    with LLM(exported("fp32"), runner="onnx", threads=1) as llm:
        wanted = [answer.choices[0].token_ids for answer in llm.generate(PROMPTS[:2], GREEDY)]
        for number, prompt in enumerate(PROMPTS[:2]):
            llm.engine.add_request(
                Request(
                    request_id=str(number), prompt_token_ids=prompt, sampling_params=GREEDY, seed=0
                )
            )
        graph = llm._runner._graph  # type: ignore[attr-defined]
        run, num_steps = graph._session.run_with_iobinding, 0

        def fail_from_sixth_on(binding: Any) -> None:
            nonlocal num_steps
            run(binding)
            if graph._last is not None and binding is graph._last.binding:
                num_steps += 1
                if num_steps >= 6 and len(graph._last.logits) == 2:
                    graph._last.logits[1, 0, 7] = np.nan

        session = SimpleNamespace(
            run_with_iobinding=fail_from_sixth_on, io_binding=graph._session.io_binding
        )
        monkeypatch.setattr(graph, "_session", session)
        found: dict[str, list[int]] = {"0": [], "1": []}
        reasons = {}
        while llm.engine.has_work:
            for output in llm.engine.step(0.0):
                found[output.request_id] += output.token_ids
                reasons[output.request_id] = output.finish_reason
    assert reasons == {"0": FinishReason.LENGTH, "1": FinishReason.ERROR}
    assert found["0"] == wanted[0]
    assert 0 < len(found["1"]) < 24
    assert found["1"] == wanted[1][: len(found["1"])]


def test_guesses_change_no_token(exported: Callable[[str], Path]) -> None:
    repeating = [[5, 6, 7, 8] * 5, [9, 10, 11] * 7]
    found = []
    for speculation in (None, SpeculationConfig(method="ngram", is_always_on=True)):
        with LLM(exported("fp32"), runner="onnx", threads=1, speculation=speculation) as llm:
            found.append(llm.generate(repeating, GREEDY))
    assert found[0] == found[1]


def test_what_runs_is_said(exported: Callable[[str], Path]) -> None:
    runner = OnnxRunner(Checkpoint.open(exported("int8")), threads=1)
    assert runner.info.runner == "onnx"
    assert runner.info.executed_form == ("int8 weights, int8 activations, int8 head (ONNX Runtime)")
    assert not runner.info.shares_blocks
    assert runner.info.weight_bytes == (exported("int8") / "model.onnx").stat().st_size


def test_failed_step_ends_its_requests_and_no_others(
    exported: Callable[[str], Path],
) -> None:
    with LLM(exported("fp32"), runner="onnx", threads=1) as llm:
        wanted = llm.generate(PROMPTS, GREEDY)
        llm.engine.add_request(
            Request(request_id="a", prompt_token_ids=[5], sampling_params=GREEDY, seed=0)
        )
        llm.engine.step(0.0)
        failpoints.arm("engine.forward=raise@1")
        with pytest.raises(failpoints.FailpointError):
            llm.engine.step(0.0)
        failpoints.disarm_all()
        llm.engine.fail_running("it failed")
        (output,) = llm.engine.step(0.0)
        assert output.finish_reason is FinishReason.ERROR
        llm.engine.check()
        assert llm.generate(PROMPTS, GREEDY) == wanted


def test_graph_alone_chooses_the_runner(exported: Callable[[str], Path]) -> None:
    assert load_runner("auto", Checkpoint.open(exported("fp32"))).info.runner == "onnx"


def test_graph_in_a_folder_beside_the_weights(model: Path, tmp_path: Path) -> None:
    both = make_model_folder(tmp_path / "both")
    with pytest.raises(ConfigError, match="holds no ONNX graph"):
        load_runner("onnx", Checkpoint.open(both))
    export_onnx(model, both / "onnx")
    assert load_runner("onnx", Checkpoint.open(both)).info.runner == "onnx"
    (both / "onnx/model.onnx").write_bytes(b"changed")
    with pytest.raises(CheckpointError, match="torn or changed"):
        load_runner("onnx", Checkpoint.open(both))


@pytest.mark.parametrize("runner", ["native", "torch"])
def test_graph_cannot_be_executed_by_others(exported: Callable[[str], Path], runner: str) -> None:
    with pytest.raises(ConfigError, match="holds an ONNX graph in place of weights"):
        load_runner(runner, Checkpoint.open(exported("fp32")))


def test_options_that_a_graph_has_settled_are_refused(exported: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match="takes no dtype and no device"):
        load_runner("onnx", Checkpoint.open(exported("fp32")), dtype="bfloat16", device="cuda")
    with pytest.raises(ConfigError, match="takes no tensor parallel size"):
        load_runner("onnx", Checkpoint.open(exported("fp32")), tensor_parallel_size=2)


def test_weights_of_a_graph_are_not_read(exported: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint.open(exported("fp32"))
    assert not checkpoint.has_weights
    with pytest.raises(CheckpointError, match="an ONNX graph in place of weights"):
        checkpoint.float32("model.norm.weight")


def test_graph_of_another_model_is_refused(tmp_path: Path, model: Path) -> None:
    folder = tmp_path / "onnx"
    export_onnx(model, folder)
    (folder / "manifest.json").unlink()
    config = (folder / "config.json").read_text().replace('"vocab_size": 320', '"vocab_size": 321')
    (folder / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match="vocabulary are"):
        load_runner("onnx", Checkpoint.open(folder))


def test_no_torch_in_the_process(exported: Callable[[str], Path]) -> None:
    code = f"""
import sys
from llmserve.llm import LLM
with LLM({str(exported("fp32"))!r}, runner="onnx") as llm:
    llm.generate([[5, 9]])
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.shared
def test_real_checkpoint_tells_the_published_text(stories260k: Path, tmp_path: Path) -> None:
    """And 64 tokens of it in batches of 1, 3 and 8 stay within 1e-4 of the training forward."""
    result = export_onnx(stories260k, tmp_path / "onnx")
    assert result.parity is not None
    assert (result.parity.num_steps, result.parity.num_prompts) == (64, 12)
    assert result.parity.max_logit_error <= 1e-4
    assert result.parity.top1_agreement == 1.0
    expected = (stories260k / "expected-greedy-200.txt").read_text(encoding="utf-8")
    with LLM(tmp_path / "onnx", threads=1) as llm:
        params = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)
        assert llm.generate([[1]], params)[0].text == expected
