"""From text to a model folder that others open, by the command line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmserve.checkpoint import Checkpoint
from llmserve.cli import main
from llmserve.model.weights import load_model
from llmserve.text.tokenizer import Tokenizer
from llmserve.training import finish
from llmserve.training.corpus import read_corpus
from llmserve.training.log import read_log
from support.training_runs import SEPARATOR, write_picture, write_text

TINY = [
    *("--vocab-size", "300", "--held-out", "0.1", "--hidden-size", "16", "--num-layers", "2"),
    *(
        "--num-heads",
        "2",
        "--num-kv-heads",
        "1",
        "--intermediate-size",
        "24",
        "--max-seq-len",
        "16",
    ),
    *("--steps", "20", "--batch-size", "4", "--warmup-steps", "2", "--learning-rate", "0.01"),
    *("--precision", "float32", "--threads", "1", "--evaluate-every", "10"),
]
GPT2 = [
    *("--positions", "learned", "--norm", "layernorm", "--activation", "gelu_tanh", "--bias"),
    *("--num-kv-heads", "2"),
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def run(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    assert train(text, out) == 0
    return out


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every run but the first one, which has its own before any test begins."""
    monkeypatch.setattr(finish, "draw_loss_curve", write_picture)


def train(text: Path, out: Path, *options: str) -> int:
    source = ["--text", str(text), "--separator", SEPARATOR]
    return main(["train", *source, "--out", str(out), "--quiet", *TINY, *options])


def test_run_leaves_model_log_picture_and_figures(run: Path) -> None:
    assert {path.name for path in (run / "model").iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "lineage.json",
        "training_log.jsonl",
        "evaluation.txt",
        "calibration.txt",
        "manifest.json",
    }
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    log = read_log(run / "training_log.jsonl")
    assert [line["step"] for line in log if "loss" in line] == [10, 20]
    assert [line["step"] for line in log if "held_out_loss" in line] == [10, 20]


def test_log_has_the_figures_of_each_layer(run: Path) -> None:
    layers = ["embedding", "layer 0", "layer 1", "output"]
    for line in read_log(run / "training_log.jsonl"):
        if "loss" in line:
            assert list(line["grad_norms"]) == list(line["update_ratios"]) == layers
            total = math.hypot(*line["grad_norms"].values())
            assert 0.2 < total / line["grad_norm"] < 5  # the last step's and the mean of ten
            assert line["tokens_per_s"] > 0
            assert 0 < line["mfu"] < 1
        else:
            assert list(line["dead_units"]) == layers[1:-1]


def test_page_and_event_files_tell_of_the_run(run: Path) -> None:
    page = (run / "training.html").read_text(encoding="utf-8")
    log = read_log(run / "training_log.jsonl")
    assert "Training in run" in page
    assert f"{log[-1]['held_out_loss']:.4f}" in page
    module: Any = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = module.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    expected = [pytest.approx(line["loss"]) for line in log if "loss" in line]
    assert [event.value for event in events.Scalars("loss")] == expected


def test_evaluation_text_gives_the_held_out_tokens(run: Path) -> None:
    model = run / "model"
    text = (model / "evaluation.txt").read_text(encoding="utf-8")
    ids = Tokenizer.load(model).encode(text, add_special_tokens=False)
    assert len(ids) == json.loads((run / "result.json").read_text())["held_out_tokens"] + 1


def test_figures_are_those_of_the_model_folder(run: Path, text: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    tokenizer = Tokenizer.load(run / "model")
    model = load_model(Checkpoint.open(run / "model"))
    corpus = read_corpus([str(text)], separator=SEPARATOR, held_out=0.1)
    ids = [token for document in corpus.held_out for token in tokenizer.encode(document)]
    tokens = torch.tensor(ids)
    total = 0.0
    for start in range(0, len(ids) - 1, 16):
        window = tokens[start : start + 17]
        logits = model(window[None, :-1])[0]
        total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    assert result["held_out_tokens"] == len(ids) - 1
    assert result["held_out_loss"] == pytest.approx(total / (len(ids) - 1), rel=1e-4)
    num_bytes = sum(len(document.encode()) for document in corpus.held_out)
    assert result["bits_per_byte"] == pytest.approx(total / math.log(2) / num_bytes, rel=1e-4)
    assert result["steps"] == 20
    assert result["trained_tokens"] == 20 * 4 * 16
    assert result["perplexity"] < 300


@pytest.mark.parametrize(
    ("options", "model_type"),
    [
        ([], "llama"),
        (["--tokenizer", "char", "--tie-word-embeddings"], "llama"),
        (["--tokenizer", "word", "--no-tie-word-embeddings", "--bias"], "llama"),
        (
            [
                "--positions",
                "learned",
                "--norm",
                "layernorm",
                "--activation",
                "gelu_tanh",
                "--bias",
                "--num-kv-heads",
                "2",
            ],
            "gpt2",
        ),
        (["--positions", "sinusoidal", "--activation", "gelu"], "llmserve"),
    ],
)
def test_every_kind_of_model_is_trained_and_saved(
    text: Path, tmp_path: Path, options: list[str], model_type: str
) -> None:
    assert train(text, tmp_path / "run", *options, "--steps", "4") == 0
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["model_type"] == model_type
    load_model(Checkpoint.open(tmp_path / "run" / "model"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_model_folder_opens_in_transformers(run: Path) -> None:
    transformers: Any = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "model")
    ids = tokenizer("The list holds a value", return_tensors="pt").input_ids
    assert ids[0].tolist() == Tokenizer.load(run / "model").encode("The list holds a value")
    ours = load_model(Checkpoint.open(run / "model"))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)


def test_tokenizer_of_another_folder_is_used(run: Path, text: Path, tmp_path: Path) -> None:
    assert train(text, tmp_path / "run", "--tokenizer", str(run / "model"), "--steps", "2") == 0
    mine = (tmp_path / "run" / "model" / "tokenizer.json").read_bytes()
    assert mine == (run / "model" / "tokenizer.json").read_bytes()


def test_lineage_names_data_tokenizer_config_run_and_weights(run: Path, tmp_path: Path) -> None:
    lineage = json.loads((run / "model" / "lineage.json").read_text())
    assert list(lineage) == ["data", "tokenizer", "config", "run", "checkpoint"]
    record = json.loads((run / "run.json").read_text())
    assert lineage["data"]["sha256"] == record["text_sha256"]
    assert all(len(stage["sha256"]) == 64 for stage in lineage.values())


def test_run_goes_on_without_its_options(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--out", str(run), "--quiet", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["model"] == str(run / "model")
    assert result["steps"] == 20


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        (b"", 1, "no text"),
        (b"a\xff", 1, "not UTF-8"),
        (f"Too short{SEPARATOR}to train on{SEPARATOR}at all".encode() * 12, 1, "too little text"),
    ],
)
def test_r28_bad_text_is_one_line_and_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, code: int, message: str
) -> None:
    (tmp_path / "text.txt").write_bytes(content)
    assert train(tmp_path / "text.txt", tmp_path / "run", "--max-seq-len", "512") == code
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run" / "model").exists()


def test_unknown_option_and_recipe_are_refused(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--text", str(text), "--out", str(tmp_path), "--recipe", "none"]) == 2
    (tmp_path / "r.toml").write_text("stepz = 1")
    recipe = str(tmp_path / "r.toml")
    assert main(["train", "--text", str(text), "--out", str(tmp_path), "--recipe", recipe]) == 2
    assert "stepz" in capsys.readouterr().err
    assert main(["train", "--text", str(text), "--out", str(tmp_path / "run")]) == 2
    assert "steps or minutes" in capsys.readouterr().err


def test_r28_damaged_tokens_are_found_before_the_first_step(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert train(text, out) == 0
    (out / "result.json").unlink()
    ids = np.fromfile(out / "tokens" / "train-00000.bin", dtype="<u2")
    ids[5] ^= 1
    ids.tofile(out / "tokens" / "train-00000.bin")
    assert train(text, out) == 1
    assert "train-00000.bin" in capsys.readouterr().err
