"""`llmserve generate` and `chat`: what their options do to a small model's answers."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from llmserve.checkpoint import Checkpoint
from llmserve.cli import main
from support.adapter_folders import make_adapter_folder
from support.models import make_model_folder

SAMPLED = ["--max-tokens", "12", "--temperature", "1", "--top-p", "1", "--seed", "3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    config = Checkpoint.open(folder).config
    return make_adapter_folder(tmp_path_factory.mktemp("adapter") / "lora", config)


def generate(
    capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str, code: int = 0
) -> str:
    """What is printed, the arguments being more prompts first, then options."""
    assert main(["generate", str(folder), "Once upon", *arguments, *SAMPLED]) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


def test_options_of_sampling_reach_the_sampler(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = generate(capsys, folder)
    assert generate(capsys, folder) == plain
    for option in (["--typical-p", "0.05"], ["--top-k", "1"], ["--min-p", "0.9"]):
        assert generate(capsys, folder, *option) != plain, option


def test_guessing_ahead_changes_nothing_but_the_speed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = generate(capsys, folder)
    for settings in (
        {"method": "ngram", "prompt_lookup_min": 1, "always": True},
        {"method": "draft", "model": str(folder), "always": True},
    ):
        log = tmp_path / "steps.log"
        arguments = ["--speculative-config", json.dumps(settings), "--record", str(log)]
        assert generate(capsys, folder, *arguments) == plain
        config = json.loads(log.read_text().splitlines()[0])[3]
        assert config["speculation"]["method"] == settings["method"]
    works = [json.loads(line) for line in log.read_text().splitlines() if '["work"' in line]
    assert any(entry[3] for work in works for entry in work[1]), "the draft model guessed nothing"


def test_an_adapter_answers_in_the_models_place(
    folder: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = generate(capsys, folder)
    adapted = generate(capsys, folder, "--adapter", f"tuned={adapter}")
    assert adapted != plain
    as_json = generate(capsys, folder, "--adapter", f"tuned={adapter}", "--json")
    assert "Once upon" + json.loads(as_json)["choices"][0]["text"] + "\n" == adapted
    assert "NAME=VALUE" in generate(capsys, folder, "--adapter", str(adapter), code=2)


def test_the_mode_without_neighbours_influence_is_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "steps.log"
    generate(capsys, folder, "--runner", "torch", "--deterministic", "--record", str(log))
    assert "deterministic" in json.loads(log.read_text().splitlines()[0])[2]["executed_form"]


def test_settings_that_cannot_be_used_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = str(tmp_path / "none" / "steps.log")
    assert "cannot be written" in generate(capsys, folder, "--record", nowhere, code=2)
    assert "known: method" in generate(capsys, folder, "--speculative-config", '{"n": 1}', code=2)


def test_a_person_who_waits_for_several_prompts_sees_progress(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=120)
    for module in ("llmserve.cli_generate", "llmserve.console"):
        monkeypatch.setattr(f"{module}.console", lambda: terminal)
    generate(capsys, folder)
    assert not screen.getvalue(), "one prompt is written as it is made"
    several = generate(capsys, folder, "She saw")
    assert "prompts" in screen.getvalue()
    assert "24 tokens" in screen.getvalue()
    monkeypatch.undo()
    assert generate(capsys, folder, "She saw") == several


def test_a_conversation_is_answered_by_the_adapter(
    folder: Path,
    adapter: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def answer(*arguments: str) -> str:
        monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\n"))
        assert main(["chat", str(folder), *SAMPLED, *arguments]) == 0
        return capsys.readouterr().out

    plain = answer()
    assert answer() == plain
    assert answer("--adapter", f"tuned={adapter}") != plain
