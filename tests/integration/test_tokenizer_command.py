"""`llmserve tokenizer` as its user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmserve.cli import main
from llmserve.text.tokenizer import Tokenizer
from support.training_runs import SEPARATOR, write_text


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.txt")


@pytest.mark.parametrize("kind", ["bpe", "word", "char"])
def test_train_writes_a_folder_that_training_takes(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    options = ["--separator", SEPARATOR, "--kind", kind, "--vocab-size", "300"]
    out = tmp_path / "new" / "tokenizer"
    assert main(["tokenizer", "train", str(text), "--out", str(out), *options]) == 0
    documents = text.read_text().split(SEPARATOR)
    expected = Tokenizer.train(kind, documents, vocab_size=300)  # type: ignore[arg-type]
    assert Tokenizer.load(out).files() == expected.files()
    assert f"{expected.vocab_size} tokens" in capsys.readouterr().out
    assert (out / "manifest.json").is_file()


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_compare_trains_the_same_model_on_each_at_equal_compute(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmserve.training.tokenizer_measure.ADVERSARIAL_CHARS", 500)
    options = ["--separator", SEPARATOR, "--steps", "2", "--threads", "1", "--json"]
    command = ["tokenizer", "compare", str(text), "--tokenizers", "char:300", "bpe:320", *options]
    assert main([*command, "--out", str(tmp_path / "runs")]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == ["char:300", "bpe:320"]
    assert rows[0]["model"]["steps"] == 2
    assert all(0 < row["model"]["bits_per_byte"] < 8 for row in rows)
    assert rows[0]["figures"]["bytes_per_token"] < rows[1]["figures"]["bytes_per_token"]
    assert (tmp_path / "runs" / "bpe-320" / "run" / "model" / "config.json").is_file()
    assert main([*command, "--out", str(tmp_path / "runs")]) == 0  # what is there is used again
    again = json.loads(capsys.readouterr().out)
    assert [row["model"] for row in again] == [row["model"] for row in rows]


def test_compare_without_models_is_a_table(
    text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmserve.training.tokenizer_measure.ADVERSARIAL_CHARS", 500)
    options = ["--separator", SEPARATOR, "--steps", "0"]
    assert main(["tokenizer", "compare", str(text), "--tokenizers", "word:400", *options]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split()[:2] == ["tokenizer", "vocabulary"]
    assert table[1].startswith("word:400")
    assert "bits/byte" not in table[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["compare", "-"], "read only once"),
        (["compare", "x.txt", "--tokenizers", "letters:300"], "neither bpe:SIZE"),
        (["compare", "x.txt", "--steps", "-1"], "--steps must be 0 or more"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["tokenizer", *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


def test_folder_with_files_is_not_replaced(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["tokenizer", "train", str(text), "--out", str(tmp_path)]
    assert main(command) == 2
    assert "not empty" in capsys.readouterr().err
    assert text.is_file()
