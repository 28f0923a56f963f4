"""Products with quantized weights in Triton, interpreted on the CPU, against dequantized ones."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import support.triton_interpreter  # before the kernels
from llmserve.checkpoint import Checkpoint, save_model
from llmserve.quant.bnb import BitsAndBytesFormat, BitsAndBytesLinear
from llmserve.quant.dtypes import StoredArray
from llmserve.quant.groups import Bits, QuantizedLinear, quantize_rtn
from llmserve.runners.torch_integer_layers import IntegerLinear, Part
from llmserve.runners.torch_runner import TorchRunner
from support.batches import Share, make_batch, make_row
from support.foreign_folders import FOREIGN, write_foreign_folder
from support.quantized_folders import write_quantized
from support.variants import QWEN2, QWEN2_MOE, random_tensors

CPU = torch.device("cpu")
WIDTH = 172


def integers(
    out: int, bits: Bits, group_size: int | None, *, has_zeros: bool = False,
    order: int | None = None, scale_dtype: str = "bfloat16", width: int = WIDTH,
) -> QuantizedLinear:  # fmt: skip
    """Rounded random weights; `order` is the seed of an activation order."""
    rng = np.random.default_rng(out)
    weight = rng.normal(size=(out, width)).astype(np.float32) + has_zeros
    linear = quantize_rtn(
        weight, bits, group_size, is_symmetric=not has_zeros, scale_dtype=scale_dtype
    )
    index = None
    if order is not None:
        index = np.random.default_rng(order).permutation(linear.groups())
    return QuantizedLinear(
        bits, group_size, linear.values, linear.scales, scale_dtype, linear.zeros, index
    )


def codes(out: int, width: int = WIDTH, *, is_double: bool = False) -> BitsAndBytesLinear:
    """Random codes of a random book; the last block is short, and half a byte may be left."""
    rng = np.random.default_rng(out)
    count = out * width
    blocks = -(-count // 64)
    tensors = {
        "weight": StoredArray("uint8", rng.integers(0, 256, (-(-count // 2), 1), np.uint8)),
        "weight.quant_map": StoredArray("float32", np.linspace(-1, 1, 16, dtype=np.float32)),
    }
    if is_double:
        state = np.frombuffer(json.dumps({"nested_offset": 0.25}).encode(), np.uint8)
        tensors |= {
            "weight.quant_state.bitsandbytes__nf4": StoredArray("uint8", state),
            "weight.absmax": StoredArray("uint8", rng.integers(0, 256, blocks, np.uint8)),
            "weight.nested_absmax": StoredArray(
                "float32", rng.uniform(0.5, 2, -(-blocks // 256)).astype(np.float32)
            ),
            "weight.nested_quant_map": StoredArray(
                "float32", np.linspace(-0.2, 1, 256, dtype=np.float32)
            ),
        }
    else:
        absmax = rng.uniform(0.5, 2, blocks).astype(np.float32)
        tensors["weight.absmax"] = StoredArray("float32", absmax)
    form = BitsAndBytesFormat(kind="nf4", double_quant=is_double)
    return BitsAndBytesLinear(form, (out, width), tensors)


CASES: dict[str, tuple[list[Part], int, torch.dtype, int]] = {
    "int4": ([integers(70, 4, 43), integers(5, 4, 43)], 1, torch.float32, 1),
    "int4-rows": ([integers(70, 4, None), integers(5, 4, None)], 19, torch.bfloat16, 1),
    "int8-rows": ([integers(70, 8, None)], 3, torch.float16, 1),
    "int8": ([integers(70, 8, 86), integers(5, 8, 86)], 65, torch.float32, 1),
    "int4-zeros": ([integers(66, 4, 43, has_zeros=True)] * 2, 2, torch.float32, 1),
    "int8-zeros": ([integers(9, 8, 86, has_zeros=True)], 17, torch.bfloat16, 1),
    "int4-128": ([integers(66, 4, 128, has_zeros=True, width=384)], 1, torch.bfloat16, 1),
    "int4-32": ([integers(66, 4, 32, has_zeros=True, width=160)], 2, torch.bfloat16, 1),
    "int8-64": ([integers(66, 8, 64, width=192)], 2, torch.float32, 1),
    "int4-order": (
        [integers(70, 4, 43, order=1), integers(5, 4, 43, order=1)], 4, torch.float32, 1
    ),
    "int4-zeros-order": ([integers(7, 4, 4, has_zeros=True, order=2)], 3, torch.float32, 1),
    "two-orders": ([integers(7, 4, 43, order=1), integers(5, 4, 43, order=3)], 3, torch.float32, 2),
    "bits-differ": ([integers(7, 4, 43), integers(70, 8, 43)], 3, torch.float32, 2),
    "groups-differ": (
        [integers(7, 4, 43), integers(9, 4, 43), integers(5, 4, 4)], 18, torch.float32, 2
    ),
    "scales-differ": (
        [integers(7, 4, 43), integers(5, 4, 43, scale_dtype="float32")], 3, torch.float32, 2
    ),
    "float-part": ([integers(7, 4, 43), torch.linspace(-1, 1, 5 * WIDTH).view(5, WIDTH)], 3,
                   torch.float32, 2),
    "zeros-differ": ([integers(7, 4, 43), integers(5, 4, 43, has_zeros=True)], 3, torch.float32, 2),
    "codes": ([codes(70)], 2, torch.float32, 1),
    "codes-odd": ([codes(65, 171), codes(3, 171)], 5, torch.float32, 2),
    "codes-joined": ([codes(64, 128), codes(3, 128, is_double=False)], 17, torch.bfloat16, 1),
    "codes-whole": ([codes(66, 192)], 1, torch.float32, 1),
    "codes-double": ([codes(200, is_double=True)], 1, torch.float32, 1),
}  # fmt: skip


def dequantized(part: Part) -> torch.Tensor:
    return part if isinstance(part, torch.Tensor) else torch.from_numpy(part.dequantize())


@pytest.mark.parametrize("name", CASES)
def test_equals_the_product_with_dequantized_weights(name: str) -> None:
    parts, num_rows, dtype, num_matrices = CASES[name]
    num_outputs = sum(part.shape[0] for part in parts)
    bias = nn.Parameter(torch.linspace(-3, 3, num_outputs, dtype=dtype), requires_grad=False)
    layer = IntegerLinear(parts, bias, CPU)
    assert len(layer.matrices) == num_matrices
    rng = np.random.default_rng(1)
    x = torch.from_numpy(rng.normal(size=(num_rows, 1, parts[0].shape[1]))).to(dtype)
    weight = torch.cat([dequantized(part) for part in parts]).to(dtype)
    wanted = F.linear(x.double(), weight.double(), bias.double())
    # One rounding of a result below 64, and of sums of 384 products in float32.
    tolerance = {torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 0.25}[dtype]
    torch.testing.assert_close(layer(x).double(), wanted, atol=tolerance, rtol=0)
    layer.bias = None
    unbiased = wanted - bias.double()
    torch.testing.assert_close(layer(x).double(), unbiased, atol=tolerance, rtol=0)


def assert_the_same(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> TorchRunner:
    """Logits with kernels are those without; the runner that has them."""
    plain = TorchRunner(checkpoint)
    support.triton_interpreter.use_kernels(monkeypatch)
    kept = TorchRunner(checkpoint)
    assert kept.info.num_parameters == plain.info.num_parameters
    assert kept.info.weight_bytes < plain.info.weight_bytes
    scheme = checkpoint.quantization.scheme if checkpoint.quantization else ""
    assert kept.info.executed_form == f"{scheme} weights times float32"
    share = Share(token_ids=[3, 5, 9], tables=[[0]], rows=[make_row([3, 5, 9])])
    for runner in (plain, kept):
        runner.allocate_cache((2,), 16)
        runner.submit(make_batch([share], block_size=16))
    wanted = plain.logits(range(3))
    atol = 1e-6 * float(np.abs(wanted).max()) + 1e-5
    np.testing.assert_allclose(kept.logits(range(3)), wanted, atol=atol)
    return kept


@pytest.mark.parametrize("scheme", ["int4", "int8"])
def test_a_folder_keeps_its_integers(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path / "model", QWEN2, random_tensors(QWEN2))
    write_quantized(tmp_path / "model", tmp_path / "quantized", scheme)
    assert_the_same(Checkpoint.open(tmp_path / "quantized"), monkeypatch)


@pytest.mark.parametrize("form", FOREIGN)
def test_folders_of_others_keep_theirs(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_foreign_folder(tmp_path / "model", form)  # type: ignore[arg-type]
    assert_the_same(Checkpoint.open(tmp_path / "model"), monkeypatch)


@pytest.mark.bnb
@pytest.mark.parametrize("scheme", ["nf4", "fp4", "bnb-int8"])
def test_bitsandbytes_folders_keep_their_codes(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes")
    config = dataclasses.replace(QWEN2, hidden_size=64, head_dim=16, intermediate_size=64)
    save_model(tmp_path / "model", config, random_tensors(config))
    write_quantized(tmp_path / "model", tmp_path / "quantized", scheme)
    assert_the_same(Checkpoint.open(tmp_path / "quantized"), monkeypatch)


def test_parts_that_differ_and_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A projection with two forms, one with a float part behind them, experts in integers."""
    tensors = random_tensors(QWEN2_MOE)
    layers = {}
    for name, weight in tensors.items():
        is_linear = name.endswith("_proj.weight")
        if is_linear and not name.endswith("layers.1.self_attn.v_proj.weight"):
            layers[name] = quantize_rtn(weight, 8 if "k_proj" in name else 4, weight.shape[1] // 2)
    save_model(tmp_path / "model", QWEN2_MOE, {**tensors, **layers})
    kept = assert_the_same(Checkpoint.open(tmp_path / "model"), monkeypatch)
    blocks = kept._model.layers
    assert len(blocks[0].self_attn.qkv_proj.matrices) == 3
    assert len(blocks[1].self_attn.qkv_proj.matrices) == 3
    assert isinstance(blocks[1].mlp.experts[0].gate_up_proj, IntegerLinear)
