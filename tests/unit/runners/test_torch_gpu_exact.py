"""The deterministic mode over kernels, interpreted: bits do not depend on steps (decision 6)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

import support.triton_interpreter  # before the kernels
from llmserve.checkpoint import Checkpoint, save_model
from llmserve.errors import ConfigError
from llmserve.runners import torch_forward
from llmserve.runners.torch_forward import tile_attention_for
from llmserve.runners.torch_runner import TorchRunner
from support.batches import Share, make_batch
from support.quantized_folders import write_quantized
from support.variants import VARIANTS, random_tensors

PROMPT = [3, 17, 5, 29, 11, 8]
OTHERS = [[4, 9, 21], [6]]
Logits = npt.NDArray[np.float32]


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    support.triton_interpreter.use_kernels(monkeypatch)


class Asking:
    """A runner with a cache, of which every question gets blocks of its own."""

    def __init__(self, runner: TorchRunner) -> None:
        self.runner, self._next_block = runner, 0
        self._num_groups = len(runner.info.cache_groups)
        runner.allocate_cache((32,) * self._num_groups, 16)

    def logits(self, pieces: list[int], others: list[list[int]] | None = None) -> Logits:
        """Of the prompt's tokens, computed in pieces, in the first step beside others."""
        table, rows, first = self._new_table(), [], 0
        for size in pieces:
            ids = PROMPT[first : first + size]
            shares = [Share(token_ids=ids, first=first, tables=table)]
            for other in (others or []) if first == 0 else []:
                shares.insert(0, Share(token_ids=other, first=0, tables=self._new_table()))
            batch = make_batch(shares, block_size=16)
            self.runner.submit(batch)
            rows.append(self.runner.logits(range(batch.num_tokens - size, batch.num_tokens)))
            first += size
        return np.concatenate(rows)

    def _new_table(self) -> list[list[int]]:
        self._next_block += 1
        return [[self._next_block]] * self._num_groups


def independent_logits(runner: TorchRunner) -> Logits:
    """Of the whole prompt; those of pieces, and beside others, must be the same bits."""
    asking = Asking(runner)
    whole = asking.logits([6])
    assert np.isfinite(whole).all()
    assert np.array_equal(asking.logits([6], OTHERS), whole)
    assert np.array_equal(asking.logits([2, 4]), whole)
    return whole


@pytest.mark.parametrize("name", ["llama-biases", "gpt2"])
def test_bits_do_not_depend_on_pieces_and_neighbours(tmp_path: Path, name: str) -> None:
    config = dataclasses.replace(VARIANTS[name], num_layers=1)
    save_model(tmp_path, config, random_tensors(config))
    runner = TorchRunner(Checkpoint.open(tmp_path), dtype="float32", deterministic=True)
    assert runner.info.executed_form == "float32, deterministic"
    whole = independent_logits(runner)
    plain = Asking(TorchRunner(Checkpoint.open(tmp_path), dtype="float32"))
    np.testing.assert_allclose(whole, plain.logits([6]), atol=2e-5)


def row_by_row(self: object, a: TensorHandle, b: TensorHandle, d: TensorHandle, *_: object) -> Any:
    """A product whose rows do not know each other, as tensor cores make them and numpy does not."""
    return TensorHandle(d.data + (a.data[:, :, None] * b.data[None]).sum(1), d.dtype.scalar)


def test_nor_with_weights_that_stay_integers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(InterpreterBuilder, "create_dot", row_by_row)
    config = dataclasses.replace(VARIANTS["llama"], num_layers=1)
    save_model(tmp_path / "model", config, random_tensors(config))
    write_quantized(tmp_path / "model", tmp_path / "small", "int4", 8)
    checkpoint = Checkpoint.open(tmp_path / "small")
    independent_logits(TorchRunner(checkpoint, dtype="float32", deterministic=True))


def test_on_cuda_it_needs_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_forward, "has_kernels", lambda device: False)
    with pytest.raises(ConfigError, match="deterministic mode on CUDA needs triton"):
        tile_attention_for(torch.device("cuda"))
