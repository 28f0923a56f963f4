"""`llmserve eval` and `llmserve merge` as a user runs them, each figure against an oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmserve.checkpoint import Checkpoint
from llmserve.cli import main
from llmserve.model.plain import generate_plain
from llmserve.model.weights import load_model
from llmserve.text.tokenizer import Tokenizer
from llmserve.training.finetune_run import run_finetuning
from support.adapter_folders import make_adapter_folder
from support.finetuning import rows_for, tiny_finetune_recipe, write_rows
from support.models import TEXT, make_model_folder
from support.training_runs import SilentReporter


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("models") / "m")


def evaluate(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[dict[str, Any]]:
    assert main(["eval", *map(str, arguments), "--json"]) == 0
    results: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["results"]
    return results


def value(result: dict[str, Any], name: str) -> float:
    figure = result["figures"][name]
    assert figure["low"] <= figure["value"] <= figure["high"]
    number: float = figure["value"]
    return number


@torch.no_grad()
def log_likelihood(model: Path, prompt: str, continuation: str) -> float:
    tokenizer, network = Tokenizer.load(model), load_model(Checkpoint.open(model))
    before = tokenizer.encode(prompt)
    after = tokenizer.encode(continuation, add_special_tokens=False)
    logits = network(torch.tensor([before + after]))[0].log_softmax(-1)
    return sum(float(logits[len(before) - 1 + place, token]) for place, token in enumerate(after))


def test_choices_are_those_of_the_highest_log_likelihood(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [" dog", " a girl named Lily", " the"]
    rows = [{"prompt": f"{n} there was", "choices": options, "answer": n % 3} for n in range(8)]
    task = write_rows(tmp_path / "task.jsonl", rows)
    [result] = evaluate(capsys, model, "--task", task)
    hits = []
    for row in rows:
        scores = [log_likelihood(model, str(row["prompt"]), option) for option in options]
        per_byte = [score / len(option) for score, option in zip(scores, options, strict=True)]
        hits.append([np.argmax(scores) == row["answer"], np.argmax(per_byte) == row["answer"]])
    assert [value(result, "accuracy"), value(result, "accuracy_per_byte")] == pytest.approx(
        np.mean(hits, axis=0).tolist()
    )


def test_answers_are_greedy_ones(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer, network = Tokenizer.load(model), load_model(Checkpoint.open(model))
    rows = []
    for number in range(4):
        ids = tokenizer.encode(f"{number} dogs")
        found = generate_plain(network, ids, 6)
        ends = [place for place, token in enumerate(found) if token == tokenizer.eos_token_id]
        text = tokenizer.decode(found[: ends[0] if ends else None])
        rows.append({"n": number, "answer": text if number else f"{text} not"})
    write_rows(tmp_path / "rows.jsonl", rows)
    task = tmp_path / "task.toml"
    task.write_text(
        'kind = "generate"\ndata = "rows.jsonl"\nprompt = "{n} dogs"\nmax_new_tokens = 6\n'
    )
    [result] = evaluate(capsys, model, "--task", task, "--runner", "torch")
    assert value(result, "exact_match") == 0.75
    assert value(result, "token_f1") >= 0.75


def test_heads_are_scored_as_in_their_tuning(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind, head in (("classify", "sequence"), ("span", "span")):
        data = write_rows(tmp_path / f"{kind}.jsonl", rows_for(kind))
        held_out = write_rows(tmp_path / f"{kind}-held-out.jsonl", rows_for(kind, seed=1))
        outcome = run_finetuning(
            tiny_finetune_recipe(task=kind),
            model,
            [data],
            tmp_path / f"{kind}-run",
            reporter=SilentReporter(),
            held_out_data=[held_out],
        )
        assert outcome.result is not None
        task = tmp_path / f"{kind}.toml"
        task.write_text(f'kind = "{kind}"\ndata = "{held_out.name}"\n')
        [result] = evaluate(capsys, outcome.model, "--task", task)
        expected = {k: v for k, v in outcome.result["after"].items() if k != "held_out_loss"}
        assert {name: value(result, name) for name in expected} == pytest.approx(expected)
        assert main(["eval", str(model), "--task", str(task)]) == 2
        assert f"the task needs a {head} head" in capsys.readouterr().err


def test_texts_are_scored_and_the_document_is_written(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, rows = tmp_path / "a.txt", [{"text": TEXT[n:]} for n in range(6)]
    text.write_text(TEXT)
    documents = write_rows(tmp_path / "b.jsonl", rows)
    out = tmp_path / "scores.json"
    results = evaluate(capsys, model, "--text", text, documents, "--out", out)
    assert [(result["task"], result["rows"]) for result in results] == [
        ("a.txt", 1),
        ("b.jsonl", 6),
    ]
    assert value(results[0], "perplexity") == pytest.approx(np.exp(value(results[0], "loss")))
    written = json.loads(out.read_text())
    assert written["results"] == results
    assert written["fingerprint"] == Checkpoint.open(model).fingerprint
    assert main(["eval", str(model), "--text", str(text)]) == 0
    table = capsys.readouterr().out
    assert "bits_per_byte" in table
    assert "a.txt (1)" in table


def test_nothing_to_evaluate_on_and_missing_files_are_errors(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(model)]) == 2
    assert "give --text or --task" in capsys.readouterr().err
    assert main(["eval", str(model), "--text", str(tmp_path / "none.txt")]) == 1
    assert "none.txt: cannot be read" in capsys.readouterr().err


def test_merge_writes_a_model_that_others_open(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Checkpoint.open(model).config
    adapter = make_adapter_folder(tmp_path / "adapter", config)
    command = ["merge", str(model), str(adapter), "--out", str(tmp_path / "merged")]
    assert main([*command, "--dtype", "bfloat16"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'merged'}\n"
    merged = Checkpoint.open(tmp_path / "merged")
    assert merged.config.dtype == "bfloat16"
    assert Tokenizer.load(merged.path).chat_template is not None
    assert "merge" in json.loads((tmp_path / "merged" / "lineage.json").read_text())
    assert main(command) == 2  # the folder is there
    assert "not empty" in capsys.readouterr().err
