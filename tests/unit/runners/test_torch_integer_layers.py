"""Products with integer weights in Triton, interpreted on the CPU, against dequantized ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import support.triton_interpreter  # noqa: F401 - before the kernels
from llmserve.checkpoint import Checkpoint, save_model
from llmserve.quant.groups import Bits, quantize_rtn
from llmserve.runners import torch_runner
from llmserve.runners.torch_integer_layers import IntegerLinear
from llmserve.runners.torch_runner import TorchRunner
from support.batches import Share, make_batch, make_row
from support.quantized_folders import write_quantized
from support.variants import QWEN2, random_tensors

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("bits", "group_size", "num_rows", "dtype"),
    [
        (4, 43, 1, torch.float32),
        (4, 172, 19, torch.bfloat16),
        (8, None, 3, torch.float16),
        (8, 86, 65, torch.float32),
    ],
)
def test_equals_the_product_with_dequantized_weights(
    bits: Bits, group_size: int | None, num_rows: int, dtype: torch.dtype
) -> None:
    rng = np.random.default_rng(bits)
    parts = [
        quantize_rtn(
            rng.normal(size=(out, 172)).astype(np.float32), bits, group_size, scale_dtype="bfloat16"
        )
        for out in (70, 5)
    ]
    bias = torch.nn.Parameter(torch.linspace(-3, 3, 75, dtype=dtype))
    layer = IntegerLinear(parts, bias, CPU)
    x = torch.from_numpy(rng.normal(size=(num_rows, 1, 172))).to(dtype)
    weight = torch.from_numpy(np.concatenate([part.dequantize() for part in parts])).to(dtype)
    wanted = F.linear(x.double(), weight.double(), bias.double())
    # Two roundings of a result below 64, and of sums of 172 products in float32.
    tolerance = {torch.float32: 1e-4, torch.float16: 6e-2, torch.bfloat16: 0.5}[dtype]
    torch.testing.assert_close(layer(x).double(), wanted, atol=tolerance, rtol=0)


@pytest.mark.parametrize("scheme", ["int4", "int8"])
def test_a_folder_keeps_its_integers(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path / "model", QWEN2, random_tensors(QWEN2))
    write_quantized(tmp_path / "model", tmp_path / "quantized", scheme)
    checkpoint = Checkpoint.open(tmp_path / "quantized")
    plain = TorchRunner(checkpoint)
    monkeypatch.setattr(torch_runner, "has_kernels", lambda device: True)
    kept = TorchRunner(checkpoint)
    assert kept.info.num_parameters == plain.info.num_parameters
    assert kept.info.weight_bytes < plain.info.weight_bytes
    assert kept.info.executed_form == f"{scheme} weights times float32"
    share = Share(token_ids=[3, 5, 9], tables=[[0]], rows=[make_row([3, 5, 9])])
    for runner in (plain, kept):
        runner.allocate_cache((2,), 16)
        runner.submit(make_batch([share], block_size=16))
    np.testing.assert_allclose(kept.logits(range(3)), plain.logits(range(3)), atol=1e-5)
