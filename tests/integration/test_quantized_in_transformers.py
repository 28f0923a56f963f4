"""Quantized folders in transformers: the same logits as our own dequantization gives."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from llmserve.checkpoint import Checkpoint, save_model
from llmserve.config import ModelConfig
from llmserve.export.quant_plan import parse_override
from llmserve.export.quantize import Scheme, quantize_model
from llmserve.families import family_of
from llmserve.model.weights import load_model
from support.variants import GEMMA3, LLAMA, OLMO2, QWEN2, QWEN3, random_tensors

pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

# 172 wide: no usual group size divides it. 64 wide: bitsandbytes takes it.
CONFIG = dataclasses.replace(
    LLAMA, vocab_size=105, hidden_size=64, num_heads=8, num_kv_heads=4, head_dim=8,
    intermediate_size=172,
)  # fmt: skip
FLOAT_ERROR = 1e-4  # other order of sums, over logits of size 10


def quantized(
    path: Path,
    config: ModelConfig,
    scheme: Scheme,
    group_size: int | None = None,
    *,
    has_int8_cache: bool = False,
    **choices: Any,
) -> Checkpoint:
    save_model(path / "model", config, random_tensors(config, scale=0.2))
    source = Checkpoint.open(path / "model")
    windows = np.random.default_rng(0).integers(0, config.vocab_size, (4, 30)).tolist()
    model = quantize_model(source, scheme, group_size, windows=windows, **choices)
    save_model(
        path / "small",
        source.config,
        model.tensors(source),
        has_int8_activations=scheme == "w8a8",
        has_int8_cache=has_int8_cache,
    )
    return Checkpoint.open(path / "small")


def open_in_transformers(checkpoint: Checkpoint) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        checkpoint.path, dtype=torch.float32, output_loading_info=True
    )


def assert_same_logits(theirs: Any, checkpoint: Checkpoint) -> None:
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 105, (2, 30)))
    ours = load_model(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids), rtol=0, atol=FLOAT_ERROR)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("scheme", "group_size"), [("int8", None), ("int8", 16), ("int4", None), ("int4", 32)]
)
def test_integers_give_the_logits_of_our_own_dequantization(
    tmp_path: Path,
    scheme: Scheme,
    group_size: int | None,
    dtype: Literal["float32", "bfloat16"],
) -> None:
    config = dataclasses.replace(CONFIG, dtype=dtype)
    checkpoint = quantized(tmp_path, config, scheme, group_size)
    theirs, loading = open_in_transformers(checkpoint)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert_same_logits(theirs.eval(), checkpoint)


@pytest.mark.parametrize(
    "choices",
    [
        {"method": "gptq"},
        {"method": "awq"},
        {"overrides": [parse_override("down_proj=int8:row"), parse_override("o_proj=float")]},
    ],
    ids=lambda choices: " ".join(choices),
)
def test_choices_of_integers_give_the_logits_of_our_own_dequantization(
    tmp_path: Path, choices: dict[str, Any]
) -> None:
    """Layers of several widths, and what calibration changed."""
    checkpoint = quantized(tmp_path, CONFIG, "int4", 16, **choices)
    theirs, loading = open_in_transformers(checkpoint)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert_same_logits(theirs.eval(), checkpoint)


@pytest.mark.parametrize("group_size", [None, 32])
def test_packed_zero_points_give_the_logits_of_our_own_dequantization(
    tmp_path: Path, group_size: int | None
) -> None:
    config = dataclasses.replace(CONFIG, intermediate_size=96)  # one group size for all layers
    checkpoint = quantized(tmp_path, config, "int4", group_size, is_symmetric=False)
    theirs, loading = open_in_transformers(checkpoint)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert_same_logits(theirs.eval(), checkpoint)


def test_int8_activations_are_rounded_for_each_token(tmp_path: Path) -> None:
    """Against our model with every quantized layer's inputs rounded as the package rounds them."""
    checkpoint = quantized(tmp_path, CONFIG, "w8a8", method="smoothquant")
    theirs, loading = open_in_transformers(checkpoint)
    assert not loading["missing_keys"]
    ours = load_model(checkpoint, dtype=torch.float32)
    for name, module in ours.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(lambda _, inputs: (rounded_by_token(inputs[0]),))
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 105, (2, 30)))
    with torch.no_grad():
        found, wanted = theirs.eval()(ids).logits, ours(ids)
        plain = load_model(checkpoint, dtype=torch.float32)(ids)
    assert (wanted - plain).abs().max() > 10 * ROUNDING_TIES, "rounding shows"
    torch.testing.assert_close(found, wanted, rtol=0, atol=ROUNDING_TIES)


ROUNDING_TIES = 5e-3  # an activation may fall to the other side of a half


def rounded_by_token(x: torch.Tensor) -> torch.Tensor:
    steps = x.abs().amax(-1, keepdim=True) / 127.5
    return (x / steps).round().clamp(-128, 127) * steps


def test_folder_that_asks_for_an_int8_cache_opens(tmp_path: Path) -> None:
    checkpoint = quantized(tmp_path, CONFIG, "int8", has_int8_cache=True)
    assert checkpoint.quantization is not None
    assert checkpoint.quantization.has_int8_cache
    theirs, loading = open_in_transformers(checkpoint)
    assert not loading["unexpected_keys"]
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 105, (2, 30)))
    with torch.no_grad():
        found = theirs.eval()(ids, use_cache=False).logits
        wanted = load_model(checkpoint, dtype=torch.float32)(ids)
    assert (found - wanted).abs().max() < 0.3


@pytest.mark.parametrize("family", [QWEN2, QWEN3, OLMO2, GEMMA3], ids=lambda one: family_of(one))
def test_integers_of_other_families_give_the_same_logits(
    tmp_path: Path, family: ModelConfig
) -> None:
    config = dataclasses.replace(family, vocab_size=105)
    checkpoint = quantized(tmp_path, config, "int8")
    theirs, loading = open_in_transformers(checkpoint)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert_same_logits(theirs.eval(), checkpoint)


def test_biases_and_an_untied_head_stay_as_they_are(tmp_path: Path) -> None:
    config = dataclasses.replace(
        CONFIG, tie_word_embeddings=False, attention_bias=True, attention_output_bias=True,
        mlp_bias=True,
    )  # fmt: skip
    checkpoint = quantized(tmp_path, config, "int4", 32)
    theirs, loading = open_in_transformers(checkpoint)
    assert not loading["missing_keys"]
    assert_same_logits(theirs.eval(), checkpoint)


@pytest.mark.bnb
@pytest.mark.parametrize(
    ("scheme", "choices"),
    [("nf4", {}), ("fp4", {}), ("nf4", {"double_quant": True}), ("bnb-int8", {})],
)
def test_bitsandbytes_gives_the_logits_of_our_own_dequantization(
    tmp_path: Path, scheme: Scheme, choices: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes")
    # transformers asks for accelerate, which it does not need on a CPU.
    for bits in ("4bit", "8bit"):
        module = f"transformers.quantizers.quantizer_bnb_{bits}"
        monkeypatch.setattr(f"{module}.is_accelerate_available", lambda *_: True)
    checkpoint = quantized(tmp_path, CONFIG, scheme, **choices)
    theirs, loading = open_in_transformers(checkpoint)
    assert not loading["missing_keys"]
    assert_same_logits(theirs.train(), checkpoint)  # evaluating, a kernel computes in bfloat16


@pytest.mark.bnb
@pytest.mark.parametrize("scheme", ["nf4", "bnb-int8"])
def test_configuration_has_the_keys_that_transformers_writes(
    tmp_path: Path, scheme: Scheme
) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    checkpoint = quantized(tmp_path, CONFIG, scheme)
    written = json.loads((checkpoint.path / "config.json").read_text())["quantization_config"]
    theirs = BitsAndBytesConfig(
        load_in_4bit=scheme == "nf4",
        load_in_8bit=scheme == "bnb-int8",
        bnb_4bit_quant_type="nf4" if scheme == "nf4" else "fp4",
        bnb_4bit_compute_dtype="float32",
        llm_int8_skip_modules=written["llm_int8_skip_modules"],
    )
    assert written == theirs.to_dict()
