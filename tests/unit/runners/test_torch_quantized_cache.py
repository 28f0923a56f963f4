"""The torch runner with a cache in eight bits, against whole rows whose keys were rounded."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from llmserve.checkpoint import Checkpoint, save_model
from llmserve.errors import ConfigError
from llmserve.export.int8_cache import Int8CacheAttention
from llmserve.model.attention import CausalAttention
from llmserve.model.weights import load_model
from llmserve.runners.native_options import NativeOptions
from llmserve.runners.registry import load_runner
from llmserve.runners.torch_cache_form import CACHE_FORMS
from llmserve.runners.torch_runner import TorchRunner
from support.batches import Share, make_batch, make_row
from support.quantized_folders import write_quantized
from support.variants import GEMMA2, LLAMA, random_tensors

IDS = [(11 * i + 3) % 67 for i in range(30)]
STEPS = [(0, 13), (13, 14), (14, 29), (29, 30)]
"""A prompt, a decode, a chunk behind it, a decode."""


class Fp8CacheAttention(CausalAttention):
    """Whole rows, each token's keys and values rounded as an fp8 cache keeps them."""

    def __call__(self, layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        form = CACHE_FORMS["fp8"]
        k, v = (form.decode(*form.encode(x)) for x in (k, v))
        return super().__call__(layer_index, q, k, v)


def logits(runner: TorchRunner, tables: list[list[int]]) -> np.ndarray:
    """Of all of `IDS`, step by step."""
    runner.allocate_cache((8,) * len(tables), 16)
    rows = []
    for start, stop in STEPS:
        share = Share(
            token_ids=IDS[start:stop], first=start, tables=tables, rows=[make_row(IDS[:stop])]
        )
        runner.submit(make_batch([share], block_size=16))
        runner.collect()
        rows.append(runner.logits(range(stop - start)))
    return np.concatenate(rows)


@pytest.mark.parametrize("config", [LLAMA, GEMMA2], ids=["llama", "gemma2"])
@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_equals_whole_rows_with_rounded_keys_and_values(
    config: object, form: str, tmp_path: Path
) -> None:
    save_model(tmp_path, config, random_tensors(config))  # type: ignore[arg-type]
    checkpoint = Checkpoint.open(tmp_path)
    runner = TorchRunner(checkpoint, cache_dtype=form)
    tables = [[5, 2], [3, 7]][: len(runner.info.cache_groups)]
    found = logits(runner, tables)
    rounded = Int8CacheAttention if form == "int8" else Fp8CacheAttention
    with torch.inference_mode():
        ids = torch.tensor([IDS])
        wanted = load_model(checkpoint)(ids, rounded(checkpoint.config))[0].numpy()
        plain = load_model(checkpoint)(ids)[0].numpy()
    cost = np.abs(wanted - plain).mean()
    assert cost > 1e-3, "nothing was rounded"
    # A number that roundings of float32 put on the other side of a half is one code off.
    assert np.abs(found - wanted).mean() < 0.05 * cost


def test_it_says_what_it_keeps_and_what_that_takes(tmp_path: Path) -> None:
    save_model(tmp_path, LLAMA, random_tensors(LLAMA))
    checkpoint = Checkpoint.open(tmp_path)
    info = load_runner("torch", checkpoint, native=NativeOptions(cache_dtype="fp8")).info
    assert info.cache_dtype == "fp8"
    assert info.cache_bytes_per_token == 2 * 2 * (LLAMA.kv_size + 4 * LLAMA.num_kv_heads)
    with pytest.raises(ConfigError, match="got fp8: choose one of these, or --runner torch"):
        load_runner("native", checkpoint, native=NativeOptions(cache_dtype="fp8"))


def test_deterministic_bits_do_not_depend_on_the_steps(tmp_path: Path) -> None:
    config = dataclasses.replace(LLAMA, vocab_size=68)
    save_model(tmp_path, config, random_tensors(config))
    runner = TorchRunner(Checkpoint.open(tmp_path), deterministic=True, cache_dtype="int8")
    by_steps = logits(runner, [[5, 2]])
    runner.allocate_cache((8,), 16)
    share = Share(token_ids=IDS, tables=[[0, 1]], rows=[make_row(IDS)])
    runner.submit(make_batch([share], block_size=16))
    assert np.array_equal(runner.logits(range(30)), by_steps)


def test_a_folder_that_asks_for_int8_gets_it(tmp_path: Path) -> None:
    save_model(tmp_path / "model", LLAMA, random_tensors(LLAMA))
    write_quantized(tmp_path / "model", tmp_path / "quantized", "int8", has_int8_cache=True)
    checkpoint = Checkpoint.open(tmp_path / "quantized")
    assert TorchRunner(checkpoint).info.cache_dtype == "int8"
    assert TorchRunner(checkpoint, cache_dtype="float32").info.cache_dtype == "float32"
