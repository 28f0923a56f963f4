"""An engine in a process of its own: rates, errors, ends."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from llmserve.benchmarks.peer_process import EngineProcess, peer_environment
from llmserve.errors import ConfigError, EngineError

# Prefill takes half a second by its own clock, decoding a tenth for every token of a sequence.
WORKER = """
import os, sys
from llmserve.benchmarks.peer_worker import run_worker

class Engine:
    def describe(self):
        print("a library's greeting")
        os.write(1, b"and one from C\\n")
        return {"engine": "scripted"}

    def prefill(self, prompt):
        if prompt[0] == 13:
            raise ValueError("an unlucky id")
        if prompt[0] == 0:
            sys.exit(7)
        return 0.5

    def decode(self, prompts, num_tokens):
        assert len({len(prompt) for prompt in prompts}) == 1
        return 0.1 * num_tokens

run_worker(Engine)
"""


def start() -> EngineProcess:
    return EngineProcess([sys.executable, "-c", WORKER])


def test_rates_are_tokens_over_the_seconds_it_says() -> None:
    with start() as engine:
        assert engine.description == {"engine": "scripted"}
        assert engine.prefill([1, 2, 3]) == 3 / 0.5
        assert engine.decode([[1, 2]] * 4, 20) == pytest.approx(4 * 20 / 2.0)


def test_error_of_the_engine_is_told_and_it_goes_on() -> None:
    with start() as engine:
        with pytest.raises(EngineError, match="ValueError: an unlucky id"):
            engine.prefill([13])
        assert engine.prefill([1]) == 2.0


def test_process_that_ends_is_an_error() -> None:
    with start() as engine:
        with pytest.raises(EngineError, match="ended with code 7"):
            engine.prefill([0])
        with pytest.raises(EngineError, match="ended with code 7"):
            engine.prefill([1])


def test_process_that_cannot_load_is_an_error() -> None:
    with pytest.raises(EngineError, match="ended with code 3"):
        EngineProcess([sys.executable, "-c", "raise SystemExit(3)"])


def test_missing_program_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no-python cannot be run"):
        EngineProcess.of_peer(tmp_path / "no-python", "peer_transformers")


def test_module_of_this_folder_runs_without_llmserve(tmp_path: Path) -> None:
    """A bare interpreter finds the worker's loop by the bootstrap alone."""
    with pytest.raises(EngineError, match="ended with code 1"):
        EngineProcess.of_peer(Path(sys.executable), "peer_no_such", "model", "1")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')  # -S: no site packages
    python.chmod(0o755)
    with pytest.raises(EngineError, match="ended with code 0"):
        EngineProcess.of_peer(python, "peer_worker")  # imports, and has nothing to run


def test_peers_wait_by_their_own_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    environment = peer_environment()
    assert "OMP_WAIT_POLICY" not in environment
    assert environment["OMP_NUM_THREADS"] == "2"
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
