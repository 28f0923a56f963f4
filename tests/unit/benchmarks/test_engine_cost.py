"""The engine's own cost: what is measured, not how much it is."""

from __future__ import annotations

import argparse

import pytest

from llmserve.benchmarks.engine_cost import (
    EngineCostOptions,
    bench_engine_cost,
    engine_cost_options,
    measure_step,
)
from llmserve.errors import ConfigError


def test_every_sequence_decodes_in_every_step() -> None:
    assert measure_step(3, 40) > 0  # asserts inside that all of them gave a token each time


def test_document_holds_a_figure_for_each_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_engine_cost(EngineCostOptions(sizes=(1, 2), steps=5, repeats=2)) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert '"num_seqs":1' in last
    assert '"num_seqs":2' in last


def test_sizes_are_read_from_the_command_line() -> None:
    args = argparse.Namespace(num_seqs="32,1", steps=5, repeats=1)
    assert engine_cost_options(args).sizes == (1, 32)
    with pytest.raises(ConfigError, match="whole numbers"):
        engine_cost_options(argparse.Namespace(num_seqs="many", steps=5, repeats=1))
    with pytest.raises(ConfigError, match="at least 1"):
        EngineCostOptions(steps=0)
