"""bitsandbytes' forms: our reader and writer against the package itself."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from typing import Any, Literal

import numpy as np
import pytest

from llmserve.errors import CheckpointError, ExportError, MissingDependencyError
from llmserve.quant.bnb import (
    BitsAndBytesFormat,
    BitsAndBytesLinear,
    from_stored,
    quantize_bitsandbytes,
    runs_in_kernels,
    stored_specs,
)
from llmserve.quant.dtypes import StoredArray
from llmserve.quant.layout import config_of, decode_layer, encode_layer

pytestmark = [pytest.mark.bnb, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

SHAPE = (64, 192)
FORMS = [
    BitsAndBytesFormat(kind="nf4"),
    BitsAndBytesFormat(kind="nf4", double_quant=True),
    BitsAndBytesFormat(kind="fp4"),
    BitsAndBytesFormat(kind="int8"),
]


def name_of(form: BitsAndBytesFormat) -> str:
    return form.kind + ("-double" if form.double_quant else "")


@pytest.fixture(scope="module")
def functional() -> Any:
    """The package's own functions, imported the way the product does: without `kernels`."""
    pytest.importorskip("bitsandbytes")
    quantize_bitsandbytes(weight(), FORMS[0], dtype="float32")
    return sys.modules["bitsandbytes.functional"]


def weight() -> np.ndarray:
    values = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    values[3] = 0.0
    values[4, 5] = 1e4
    values[5] = 1e-20
    return values


@pytest.mark.parametrize("form", FORMS, ids=name_of)
def test_dequantized_weight_is_the_packages_own(functional: Any, form: BitsAndBytesFormat) -> None:
    import torch

    tensor = torch.from_numpy(weight())
    if form.kind == "int8":
        oracle = functional.int8_vectorwise_dequant(
            *functional.int8_vectorwise_quant(tensor.half())[:2]
        )
    else:
        oracle = functional.dequantize_4bit(
            *functional.quantize_4bit(
                tensor, quant_type=form.kind, compress_statistics=form.double_quant
            )
        )
    linear = quantize_bitsandbytes(weight(), form, dtype="float32")
    np.testing.assert_allclose(linear.dequantize(), oracle.numpy(), rtol=1e-6)


@pytest.mark.parametrize("form", FORMS, ids=name_of)
def test_layer_comes_back_from_its_tensors(functional: Any, form: BitsAndBytesFormat) -> None:
    linear = quantize_bitsandbytes(weight(), form, dtype="bfloat16")
    config = config_of({"layer": linear}, ())
    assert config.bitsandbytes == form
    back = decode_layer(config, "layer", SHAPE, encode_layer("layer", linear))
    np.testing.assert_array_equal(back.dequantize(), linear.dequantize())


@pytest.mark.parametrize("form", FORMS, ids=name_of)
def test_quantizing_twice_gives_the_same_bytes(functional: Any, form: BitsAndBytesFormat) -> None:
    once, twice = (quantize_bitsandbytes(weight(), form, dtype="float32") for _ in range(2))
    for part, array in once.tensors.items():
        assert array.data.tobytes() == twice.tensors[part].data.tobytes()


def test_module_of_the_package_takes_the_tensors(functional: Any) -> None:
    """What transformers does when it opens such a folder."""
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit

    linear = quantize_bitsandbytes(weight(), FORMS[0], dtype="float32")
    tensors = {part: torch.from_numpy(array.data) for part, array in linear.tensors.items()}
    module = Linear4bit(SHAPE[1], SHAPE[0], bias=False, compute_dtype=torch.float32)
    module.weight = Params4bit.from_prequantized(
        data=tensors.pop("weight"), quantized_stats=tensors, device="cpu", module=module
    )
    x = torch.randn(3, SHAPE[1], generator=torch.Generator().manual_seed(0))
    y = module(x).detach()  # in training mode: without the bfloat16 kernel
    expected = x @ torch.from_numpy(linear.dequantize()).T
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
    ("shape", "kind", "is_taken"),
    [
        ((32, 64), "nf4", True),
        ((64, 192), "nf4", True),
        ((172, 64), "nf4", False),
        ((64, 172), "nf4", False),
        ((48, 288), "nf4", False),
        ((43, 105), "int8", True),
    ],
)
def test_kernels_take_these_shapes(
    shape: tuple[int, int], kind: Literal["nf4", "int8"], is_taken: bool
) -> None:
    assert runs_in_kernels(shape, kind) is is_taken


@pytest.mark.parametrize("form", FORMS, ids=name_of)
def test_weight_that_is_not_finite_is_refused_by_name(
    functional: Any, form: BitsAndBytesFormat
) -> None:
    broken = weight()
    broken[0, 0] = np.nan
    with pytest.raises(ExportError, match="up_proj holds NaN"):
        quantize_bitsandbytes(broken, form, dtype="float32", name="up_proj")


def test_weight_beyond_float16_is_refused_for_int8(functional: Any) -> None:
    with pytest.raises(ExportError, match="magnitude 70000; bitsandbytes' int8 takes at most"):
        quantize_bitsandbytes(np.full((2, 2), 7e4, np.float32), FORMS[3], dtype="float32")


def test_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'llmserve\[bnb\]'"):
        quantize_bitsandbytes(weight(), FORMS[0], dtype="float32")


def test_import_neither_asks_for_the_package_that_downloads_nor_complains() -> None:
    code = (
        "import sys, numpy as np\n"
        "from llmserve.quant.bnb import *\n"
        "quantize_bitsandbytes(np.ones((32, 64), np.float32), BitsAndBytesFormat(kind='nf4'),"
        " dtype='float32')\n"
        "assert 'kernels' not in sys.modules\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "kernels" not in result.stderr
    assert logging.getLogger("bitsandbytes").level in (logging.NOTSET, logging.ERROR)


def with_state(form: BitsAndBytesFormat, **changes: Any) -> dict[str, StoredArray]:
    """Tensors of zeros with a quant_state that is right but for `changes`."""
    state: dict[str, Any] = {"quant_type": form.kind, "blocksize": 64, "dtype": "float32"}
    state |= {"shape": list(SHAPE), "nested_blocksize": 256, "nested_offset": 0.5}
    tensors = {
        part: StoredArray(
            spec.dtypes[0],
            np.zeros([extent or 1 for extent in spec.shape], spec.dtypes[0]),
        )
        for part, spec in stored_specs(SHAPE, form).items()
    }
    text = json.dumps(state | changes).encode()
    tensors[f"weight.quant_state.bitsandbytes__{form.kind}"] = StoredArray(
        "uint8", np.frombuffer(text, np.uint8)
    )
    return tensors


def test_state_as_expected_is_read() -> None:
    form = BitsAndBytesFormat(kind="nf4", double_quant=True)
    linear = from_stored(with_state(form), SHAPE, form)
    assert isinstance(linear, BitsAndBytesLinear)
    assert linear.dequantize().shape == SHAPE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocksize": 128}, "blocksize"),
        ({"quant_type": "fp4"}, "quant_type"),
        ({"nested_blocksize": 64}, "nested_blocksize"),
        ({"shape": [1, 2]}, r"\[1, 2\]"),
        ({"nested_offset": None}, "no number nested_offset"),
    ],
)
def test_state_that_this_reader_does_not_honour_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    form = BitsAndBytesFormat(kind="nf4", double_quant=True)
    with pytest.raises(CheckpointError, match=message):
        from_stored(with_state(form, **changes), SHAPE, form)


@pytest.mark.parametrize("text", [b"{", b"[1]", b"\xff"])
def test_state_that_is_no_json_object_is_refused(text: bytes) -> None:
    form = BitsAndBytesFormat(kind="nf4")
    tensors = with_state(form)
    tensors["weight.quant_state.bitsandbytes__nf4"] = StoredArray(
        "uint8", np.frombuffer(text, np.uint8)
    )
    with pytest.raises(CheckpointError, match="quant_state is no JSON"):
        from_stored(tensors, SHAPE, form)
