"""Layers kept in nf4: the forward pass and the gradients are those of the dequantized weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from llmserve.checkpoint import Checkpoint, save_model
from llmserve.config import ModelConfig
from llmserve.errors import ConfigError
from llmserve.llm import LLM
from llmserve.model.weights import load_canonical, load_model
from llmserve.text.tokenizer import Tokenizer
from llmserve.training.finetune_frozen import FrozenLinear
from llmserve.training.finetune_model import TunedModel, open_tuned
from llmserve.training.finetune_recipe import FinetuneRecipe
from llmserve.training.lora_merge import merge_adapter
from support.finetuning import finetune, rows_for, tiny_finetune_recipe, write_rows
from support.models import TEXT
from support.training_runs import tiny_config
from support.variants import random_tensors

pytestmark = pytest.mark.bnb
IDS = torch.randint(300, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", autouse=True)
def _needs_bitsandbytes() -> None:
    pytest.importorskip("bitsandbytes")


def wide_config() -> ModelConfig:
    """Every layer has a shape that bitsandbytes' kernels take."""
    return tiny_config(
        hidden_size=64, head_dim=32, intermediate_size=128, max_seq_len=64,
        bos_token_id=0, eos_token_ids=(0,),
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "wide"
    files = Tokenizer.train("bpe", [TEXT] * 4, vocab_size=300).files()
    tensors = random_tensors(wide_config(), scale=0.1)
    save_model(path, wide_config(), tensors, extra_files=files)
    return path


def open_qlora(folder: Path) -> TunedModel:
    recipe = FinetuneRecipe(method="qlora", rank=4)
    tuned = open_tuned(Checkpoint.open(folder), recipe, None)
    generator = torch.Generator().manual_seed(2)
    for parameter in tuned.trainable().values():
        parameter.data.normal_(0.0, 0.1, generator=generator)
    return tuned


def test_logits_and_gradients_are_those_of_the_dequantized_weights(folder: Path) -> None:
    frozen = open_qlora(folder)
    assert len(frozen.frozen) == 14
    assert sum(isinstance(m, FrozenLinear) for m in frozen.model.modules()) == 8
    dense = open_qlora(folder)
    for path, module in list(dense.model.named_modules()):
        if isinstance(module, FrozenLinear):
            layer = torch.nn.Linear(1, 1, bias=False)
            layer.weight = torch.nn.Parameter(module.dequantized(), requires_grad=False)
            parent, _, name = path.rpartition(".")
            setattr(dense.model.get_submodule(parent), name, layer)
    gradients = []
    for tuned in (frozen, dense):
        loss = tuned.logits(IDS).logsumexp(-1).sum()
        gradients.append(torch.autograd.grad(loss, list(tuned.trainable().values())))
    torch.testing.assert_close(frozen.logits(IDS), dense.logits(IDS))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_merged_weights_are_the_dequantized_ones_and_the_adapter(folder: Path) -> None:
    tuned = open_qlora(folder)
    merged = load_model(Checkpoint.open(folder))
    load_canonical(merged, tuned.tensors())
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS), tuned.logits(IDS), rtol=1e-5, atol=1e-5)
        plain = load_model(Checkpoint.open(folder))(IDS)
    assert not torch.allclose(plain, tuned.logits(IDS), atol=1e-2)


def test_a_run_leaves_the_nf4_base_that_its_adapter_was_trained_on(
    folder: Path, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", rows_for("text"))
    recipe = tiny_finetune_recipe(task="text", method="qlora")
    result = finetune(recipe, folder, data, tmp_path / "run").result
    assert result is not None
    assert result["after"]["held_out_loss"] < result["before"]["held_out_loss"]
    base, adapter = tmp_path / "run" / "base", tmp_path / "run" / "adapter"
    quantization = Checkpoint.open(base).quantization
    assert quantization is not None
    assert quantization.bitsandbytes is not None
    merge_adapter(base, adapter, tmp_path / "merged")
    own, again = (
        Checkpoint.open(path) for path in (tmp_path / "run" / "model", tmp_path / "merged")
    )
    for name in own.names():
        np.testing.assert_array_equal(own.float32(name), again.float32(name))
    with (
        LLM(base, runner="torch", adapters={"tuned": adapter}) as beside,
        LLM(tmp_path / "merged", runner="torch") as merged,
    ):
        [one] = beside.score([IDS[0].tolist()], adapter="tuned")
        [other] = merged.score([IDS[0].tolist()])
    assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    # LoRA on a folder that is quantized already keeps it so.
    again_run = finetune(
        tiny_finetune_recipe(task="text", method="lora"), base, data, tmp_path / "run2"
    )
    assert again_run.result is not None
    assert not (tmp_path / "run2" / "base").exists()


def test_shapes_that_cannot_be_kept_in_nf4_are_refused(tmp_path: Path) -> None:
    config = tiny_config()
    save_model(tmp_path / "m", config, random_tensors(config))
    with pytest.raises(ConfigError, match="no layer of this model can be kept in nf4"):
        open_tuned(Checkpoint.open(tmp_path / "m"), FinetuneRecipe(method="qlora"), None)


def test_quantized_layers_are_refused_on_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    config = tiny_config(hidden_size=64, intermediate_size=64, num_heads=2, num_kv_heads=2)
    save_model(tmp_path / "m", config, random_tensors(config))
    recipe = FinetuneRecipe(method="qlora", device="cuda")
    with pytest.raises(ConfigError, match="stay quantized are trained beside on cpu alone"):
        open_tuned(Checkpoint.open(tmp_path / "m"), recipe, None)
