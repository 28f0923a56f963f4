"""`llmserve generate --record` and `llmserve replay`, on a small model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmserve.cli import main
from support.models import make_model_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def log(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    path = tmp_path / "steps.log"
    arguments = ["--record", str(path), "--deterministic", "--max-tokens", "12", "--seed", "3"]
    assert main(["generate", str(folder), "Once upon", "She saw", *arguments]) == 0
    capsys.readouterr()
    return path


def test_a_run_goes_alike_without_and_with_its_model(
    log: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", str(log)]) == 0
    alone = capsys.readouterr().out
    assert alone.startswith("2 requests, ")
    assert "everything came out as it was" in alone
    assert main(["replay", str(log), "--model", str(folder), "--deterministic"]) == 0
    assert capsys.readouterr().out == alone


def test_another_models_draws_are_the_first_difference(
    log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_model_folder(tmp_path / "other", seed=1)
    assert main(["replay", str(log), "--model", str(other)]) == 1
    assert "it went another way at " in capsys.readouterr().out


def test_a_changed_decision_is_the_first_difference(
    log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [json.loads(line) for line in log.read_text().splitlines()]
    works = [index for index, record in enumerate(records) if record[0] == "work" and record[1]]
    records[works[2]][1][0][2] += 1
    log.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert main(["replay", str(log)]) == 1
    assert "'work'" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "no log\n", '["now",1]\n'])
def test_what_is_no_log_is_said_so(
    tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "steps.log"
    path.write_text(content)
    assert main(["replay", str(path)]) == 1
    assert "llmserve: error:" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option",
    [
        ["--deterministic"], ["--runner", "torch"], ["--dtype", "float16"], ["--device", "cuda"],
        ["--threads", "2"], ["--no-verify"], ["--lora-modules", "a=b"],
    ],
)  # fmt: skip
def test_options_about_a_model_need_one(
    tmp_path: Path, option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", str(tmp_path / "none"), *option]) == 2
    assert f"{option[0]} needs --model" in capsys.readouterr().err
