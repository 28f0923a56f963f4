"""`quantization_config` of config.json: written, read back, and refused by name."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest

from llmserve.errors import ConfigError
from llmserve.quant.bnb import BitsAndBytesFormat
from llmserve.quant.config import LayerGroup, QuantizationConfig

INT4 = QuantizationConfig(
    groups=(
        LayerGroup(bits=4, group_size=32, targets=("model.layers.0.mlp.up_proj",)),
        LayerGroup(bits=4, group_size=43, targets=("model.layers.0.mlp.down_proj",)),
    )
)
INT8 = QuantizationConfig(
    groups=(LayerGroup(bits=8, group_size=None, targets=("Linear",), packing="int-quantized"),)
)
W8A8 = QuantizationConfig(groups=(dataclasses.replace(INT8.groups[0], has_int8_activations=True),))
MIXED = QuantizationConfig(
    groups=(
        *INT4.groups,
        LayerGroup(
            bits=4, group_size=None, targets=("model.layers.0.mlp.gate_proj",), is_symmetric=False
        ),
        dataclasses.replace(INT8.groups[0], targets=("model.layers.0.self_attn.q_proj",)),
    )
)  # fmt: skip
CACHED = dataclasses.replace(INT8, has_int8_cache=True)
ORDERED = QuantizationConfig(groups=(dataclasses.replace(INT4.groups[0], has_order=True),))
BNB = [
    QuantizationConfig(
        bitsandbytes=BitsAndBytesFormat(kind=kind, double_quant=double, compute_dtype="bfloat16"),
        ignore=("lm_head", "model.layers.0.mlp.up_proj"),
    )
    for kind, double in (("nf4", False), ("nf4", True), ("fp4", False))
]
LLM_INT8 = QuantizationConfig(bitsandbytes=BitsAndBytesFormat(kind="int8"))


def changed(config: QuantizationConfig, *path: str | int, value: Any) -> dict[str, Any]:
    """The rendered configuration with one value replaced."""
    rendered = copy.deepcopy(config.render())
    place: Any = rendered
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return rendered


@pytest.mark.parametrize(
    "config",
    [INT4, INT8, W8A8, CACHED, MIXED, ORDERED, *BNB, LLM_INT8],
    ids=lambda config: config.scheme,
)
def test_what_is_written_is_read_back(config: QuantizationConfig) -> None:
    assert QuantizationConfig.parse(config.render()) == config


@pytest.mark.parametrize(
    ("config", "scheme"), [(INT4, "int4"), (INT8, "int8"), (BNB[0], "nf4"), (LLM_INT8, "bnb-int8")]
)
def test_scheme_names_the_form(config: QuantizationConfig, scheme: str) -> None:
    assert config.scheme == scheme


def test_written_configuration_is_what_compressed_tensors_understands() -> None:
    package = pytest.importorskip("compressed_tensors.quantization")
    forms = ("pack-quantized", "int-quantized", "int-quantized", "mixed-precision")
    for config, form in zip((INT4, INT8, W8A8, MIXED), forms, strict=True):
        parsed = package.QuantizationConfig.model_validate(config.render())
        assert parsed.format == form
        assert parsed.quantization_status == package.QuantizationStatus.COMPRESSED
        groups = list(parsed.config_groups.values())
        assert [group.weights.group_size for group in groups] == [
            group.group_size for group in config.groups
        ]
        for group, own in zip(groups, config.groups, strict=True):
            assert group.weights.symmetric is own.is_symmetric
            assert (group.input_activations is not None) is own.has_int8_activations
            assert group.format == own.packing


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        ("model.layers.0.mlp.up_proj", 32),
        ("model.layers.0.mlp.down_proj", 43),
        ("model.layers.0.mlp.gate_proj", None),
    ],
)
def test_layer_belongs_to_the_group_that_names_it(layer: str, size: int | None) -> None:
    group = INT4.group_of(layer)
    assert (group.group_size if group else None) == size
    assert INT4.is_quantized(layer) is (size is not None)


def test_name_goes_before_pattern_before_class() -> None:
    targets = {8: "Linear", 16: r"re:.*\.mlp\.up_proj$", 32: "model.layers.0.mlp.up_proj"}
    groups = tuple(
        LayerGroup(bits=4, group_size=size, targets=(target,)) for size, target in targets.items()
    )
    config = QuantizationConfig(groups=groups, ignore=("lm_head", r"re:.*k_proj"))
    sizes = {
        "model.layers.0.mlp.up_proj": 32,
        "model.layers.1.mlp.up_proj": 16,
        "model.layers.1.mlp.down_proj": 8,
    }
    for layer, size in sizes.items():
        group = config.group_of(layer)
        assert group is not None
        assert group.group_size == size
    assert config.group_of("model.layers.1.self_attn.k_proj") is None
    assert config.group_of("lm_head") is None


@pytest.mark.parametrize(
    ("layer", "is_quantized"),
    [
        ("lm_head", False),
        ("model.layers.0.mlp.up_proj", False),
        ("model.layers.10.mlp.up_proj", True),
        ("model.layers.0.mlp.down_proj", True),
    ],
)
def test_bitsandbytes_skips_what_it_names(layer: str, is_quantized: bool) -> None:
    assert BNB[0].is_quantized(layer) is is_quantized


def test_bitsandbytes_without_a_list_skips_the_head() -> None:
    config = QuantizationConfig.parse(changed(LLM_INT8, "llm_int8_skip_modules", value=None))
    assert config.ignore == ("lm_head",)


GROUP = ("config_groups", "group_0")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"quant_method": "aqlm", "bits": 4}, "method 'aqlm' is not supported"),
        ({}, "method None is not supported"),
        (changed(INT8, "kv_cache_scheme", value={"num_bits": 8}), "kv_cache_scheme .*dynamic"),
        (changed(INT8, "kv_cache_scheme", value={"type": "float"}), "kv_cache_scheme .*float"),
        (changed(INT8, "quantization_status", value="frozen"), "status 'frozen'"),
        (changed(INT4, *GROUP, "format", value="int-quantized"), "for 4-bit weights"),
        (changed(INT8, *GROUP, "format", value="float-quantized"), "'int-quantized'"),
        (changed(W8A8, *GROUP, "input_activations", "num_bits", value=4), "symmetric int of 8"),
        (changed(W8A8, *GROUP, "input_activations", "dynamic", value=False), "symmetric int of 8"),
        (changed(INT8, *GROUP, "output_activations", value={"x": 8}), "quantized outputs"),
        (changed(INT8, *GROUP, "weights", "num_bits", value=2), "2-bit int weights"),
        (changed(INT8, *GROUP, "weights", "type", value="float"), "8-bit float weights"),
        (changed(INT8, *GROUP, "weights", "dynamic", value=True), "only static"),
        (changed(INT8, *GROUP, "weights", "strategy", value="tensor"), "strategy 'tensor'"),
        (changed(INT4, *GROUP, "weights", "group_size", value=0), "group_size 0"),
        (changed(INT4, *GROUP, "weights", "group_size", value=True), "group_size True"),
        (changed(INT4, *GROUP, "weights", "group_size", value="32"), "group_size '32'"),
        (changed(INT4, *GROUP, "targets", value="Linear"), "a list of layer names"),
        (changed(INT4, *GROUP, "targets", value=["re:(a+)+$"]), "pattern 're:.* is not supported"),
        (changed(INT4, *GROUP, "targets", value=["re:" + ".*a" * 9]), "is not supported"),
        (changed(INT4, *GROUP, "targets", value=["re:(a"]), "malformed"),
        (changed(INT4, *GROUP, "weights", value=None), "malformed"),
        (changed(INT4, "config_groups", value=[1]), "malformed"),
        (changed(INT4, "config_groups", value={}), "either groups of layers or bitsandbytes"),
        (changed(INT4, "ignore", value=[7]), "a list of layer names"),
        (changed(BNB[0], "bnb_4bit_quant_type", value="af4"), "here 'af4'"),
        (changed(BNB[0], "load_in_4bit", value=False), "load_in_8bit, or load_in_4bit"),
        (changed(BNB[0], "bnb_4bit_quant_storage", value="bfloat16"), "must be 'uint8'"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(value: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantizationConfig.parse(value)


def test_format_of_a_group_goes_before_the_folders() -> None:
    assert QuantizationConfig.parse(changed(INT8, "format", value="other")) == INT8


def test_missing_key_is_refused() -> None:
    value = INT4.render()
    del value["config_groups"]
    with pytest.raises(ConfigError, match="malformed: 'config_groups'"):
        QuantizationConfig.parse(value)


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}


def test_gptq_and_awq_have_one_group_and_leave_the_head() -> None:
    for value, packing in ((GPTQ, "gptq"), (AWQ, "awq")):
        config = QuantizationConfig.parse(value)
        group = config.group_of("model.layers.0.mlp.up_proj")
        assert group is not None
        assert (group.bits, group.group_size, group.packing) == (4, 32, packing)
        assert not config.is_quantized("lm_head")
        assert config.scheme == f"{packing}-int4"


def test_gptq_names_what_it_quantizes_inside_a_block() -> None:
    inside = [["self_attn.k_proj", "self_attn.v_proj"], ["mlp.up_proj"]]
    config = QuantizationConfig.parse({**GPTQ, "modules_in_block_to_quantize": inside})
    assert config.is_quantized("model.layers.3.self_attn.v_proj")
    assert not config.is_quantized("model.layers.3.self_attn.q_proj")


def test_awq_leaves_the_modules_it_names() -> None:
    config = QuantizationConfig.parse({**AWQ, "modules_to_not_convert": ["mlp.up_proj", "gate"]})
    assert not config.is_quantized("model.layers.0.mlp.up_proj")
    assert config.is_quantized("model.layers.0.mlp.gate_proj")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({**GPTQ, "bits": 3}, "3 bits; 4 or 8"),
        ({**GPTQ, "group_size": 0}, "group_size 0"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "GPTQ format 'marlin'"),
        ({**GPTQ, "dynamic": {"x": {}}}, "`dynamic`"),
        ({**GPTQ, "modules_in_block_to_quantize": [["a.*b*c*d*e*"]]}, "is not supported"),
        ({**AWQ, "bits": 8}, "8 bits; 4"),
        ({**AWQ, "version": "gemv"}, "AWQ version 'gemv'"),
        ({**AWQ, "zero_point": False}, "without zero points"),
        ({**AWQ, "modules_to_not_convert": [4]}, "a list of layer names"),
    ],
)
def test_what_is_not_supported_of_gptq_and_awq_is_refused(
    value: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantizationConfig.parse(value)
