"""Models whose operations are joined in kernels, interpreted, against the same in torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

import support.triton_interpreter  # before the kernels
from llmserve.checkpoint import Checkpoint, save_model
from llmserve.config import ModelConfig
from llmserve.errors import ConfigError
from llmserve.runners.tensor_parallel import Rank
from llmserve.runners.torch_gpu_layers import JoinedAttention, JoinedBlock, JoinedMlp
from llmserve.runners.torch_parallel_model import join_model
from llmserve.runners.torch_runner import TorchRunner
from support.adapters import random_adapter
from support.batches import Share, make_batch
from support.variants import VARIANTS, random_tensors

NAMES = [
    "llama-biases", "qwen3", "olmo2", "phi3", "gemma3_text", "qwen2_moe", "own-mixed-experts",
    "own-geglu-post", "gpt2", "own-scaled-rope",
]  # fmt: skip


def logits(runner: TorchRunner, *, adapter_id: int = 0) -> np.ndarray:
    """Of two prompts, then of a token behind each; the second has the adapter."""
    num_groups = len(runner.info.cache_groups)
    runner.allocate_cache((8,) * num_groups, 16)
    prompts, rows = [[3, 5, 9, 1, 7], [4, 4]], []
    steps = [[(prompt, 0) for prompt in prompts], [([6], 5), ([8], 2)]]
    for step in steps:
        shares = [
            Share(
                token_ids=ids, first=first, tables=[[4 - index]] * num_groups,
                adapter_id=adapter_id * index,
            )
            for index, (ids, first) in enumerate(step)
        ]  # fmt: skip
        runner.submit(make_batch(shares, block_size=16))
        rows.append(runner.logits(range(sum(len(ids) for ids, _ in step))))
    return np.concatenate(rows)


def runners(
    config: ModelConfig, folder: Path, monkeypatch: pytest.MonkeyPatch, **options: object
) -> tuple[TorchRunner, TorchRunner]:
    """With torch's operations, and with kernels."""
    save_model(folder, config, random_tensors(config))
    checkpoint = Checkpoint.open(folder)
    plain = TorchRunner(checkpoint, **options)  # type: ignore[arg-type]
    support.triton_interpreter.use_kernels(monkeypatch)
    return plain, TorchRunner(checkpoint, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_equals_torchs_operations(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = VARIANTS[name]
    plain, joined = runners(config, tmp_path, monkeypatch)
    assert joined.info == plain.info
    wanted = logits(plain)
    atol = 1e-5 * float(np.abs(wanted).max())  # roundings of float32, some forty in a row
    np.testing.assert_allclose(logits(joined), wanted, atol=atol)
    block = joined._model.layers[0]
    assert isinstance(block, JoinedBlock) == (config.norm == "rmsnorm")
    assert isinstance(block.self_attn, JoinedAttention)
    has_gate = config.is_gated and not config.has_experts(0)
    assert isinstance(block.mlp, JoinedMlp) == has_gate


def test_bfloat16_errs_no_more_than_torchs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = VARIANTS["gemma3_text"]
    save_model(tmp_path / "exact", config, random_tensors(config))
    exact = logits(TorchRunner(Checkpoint.open(tmp_path / "exact")))
    plain, joined = runners(config, tmp_path / "model", monkeypatch, dtype="bfloat16")
    errors = [np.abs(logits(runner) - exact).mean() for runner in (plain, joined)]
    assert errors[1] < 1.3 * errors[0]


def test_a_cache_in_eight_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, joined = runners(VARIANTS["phi3"], tmp_path, monkeypatch, cache_dtype="int8")
    assert joined.info == plain.info
    # A code that falls between two by a rounding of float32 is one step off.
    np.testing.assert_allclose(logits(joined), logits(plain), atol=5e-3)


def test_adapters_act_on_their_own_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = VARIANTS["gemma2"]
    plain, joined = runners(config, tmp_path, monkeypatch, adapters=[random_adapter(config)])
    wanted = logits(plain, adapter_id=1)
    np.testing.assert_allclose(logits(joined, adapter_id=1), wanted, atol=1e-5)
    assert np.abs(wanted - logits(plain)).max() > 1e-2


class Alone:
    """What `join_model` takes for the ranks' meeting, of one rank."""

    rank = Rank(index=0, count=1)

    def __init__(self) -> None:
        self.num_sums = 0

    def sum(self, part: Tensor) -> Tensor:
        self.num_sums += 1
        return part

    def from_first(self, own: Tensor) -> Tensor:
        return own


@pytest.mark.parametrize("name", ["olmo2", "qwen2_moe"])
def test_ranks_add_up_what_joined_halves_make(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, joined = runners(VARIANTS[name], tmp_path, monkeypatch)
    wanted, group = logits(plain), Alone()
    join_model(joined._model, group)  # type: ignore[arg-type]
    atol = 1e-5 * float(np.abs(wanted).max())
    np.testing.assert_allclose(logits(joined), wanted, atol=atol)
    halves, norms = 2, 2 if name == "olmo2" else 0
    assert group.num_sums == 2 * (1 + 2 * (halves + norms)), "two steps, an embedding, two layers"


def test_heads_that_no_tile_holds_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(VARIANTS["llama"], head_dim=514)
    with pytest.raises(ConfigError, match="at most 512 values, the model's have 514"):
        runners(config, tmp_path, monkeypatch)
