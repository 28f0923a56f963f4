"""Adapter folders: what PEFT writes is read, what would change the result is refused by name."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmserve.adapters import Adapter, LoraPair, Place, load_adapter, save_adapter
from llmserve.errors import CheckpointError, ConfigError
from llmserve.quant.dtypes import StoredArray, from_float32
from llmserve.tensor_file import map_tensors, write_tensors
from support.adapters import ATTENTION, random_adapter
from support.variants import GPT2, LLAMA

# As PEFT 0.21 writes it for LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]).
PEFT_CONFIG: dict[str, Any] = {
    "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None,
    "auto_mapping": None, "base_model_name_or_path": "models/base", "bias": "none",
    "corda_config": None, "ensure_weight_tying": False, "eva_config": None,
    "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True,
    "init_lora_weights": True, "kasa_config": None, "layer_replication": None,
    "layers_pattern": None, "layers_to_transform": None, "loftq_config": {}, "lora_alpha": 8,
    "lora_bias": False, "lora_dropout": 0.05, "lora_ga_config": None, "megatron_config": None,
    "megatron_core": "megatron.core", "modules_to_save": None, "monteclora_config": None,
    "peft_type": "LORA", "peft_version": "0.21.2", "qalora_group_size": 16, "r": 4,
    "rank_pattern": {}, "revision": None, "target_modules": ["q_proj", "v_proj"],
    "target_parameters": None, "task_type": "CAUSAL_LM", "trainable_token_indices": None,
    "use_bdlora": None, "use_dora": False, "use_qalora": False, "use_rslora": False,
    "velora_config": None,
}  # fmt: skip
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
Write = Callable[..., Path]


def peft_tensors(rank: int = 4) -> dict[str, StoredArray]:
    """Query and value of both layers of `LLAMA`, all of one rank."""
    generator = np.random.default_rng(0)
    tensors = {}
    for layer in range(2):
        for projection, out in (("q_proj", 24), ("v_proj", 12)):
            module = f"base_model.model.model.layers.{layer}.self_attn.{projection}"
            for half, shape in (("A", (rank, 24)), ("B", (out, rank))):
                values = generator.normal(size=shape).astype(np.float32)
                tensors[f"{module}.lora_{half}.weight"] = StoredArray("float32", values)
    return tensors


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a folder as PEFT would, with changes; None leaves out a tensor."""

    def run(
        tensors: dict[str, StoredArray | None] | None = None, without: str = "", **config: Any
    ) -> Path:
        values = {**PEFT_CONFIG, **config}
        values.pop(without, None)
        (tmp_path / "adapter_config.json").write_text(json.dumps(values))
        arrays = {**peft_tensors(), **(tensors or {})}
        kept = {name: array for name, array in arrays.items() if array is not None}
        write_tensors(tmp_path / "adapter_model.safetensors", kept)
        return tmp_path

    return run


def test_folder_of_peft_is_read(write: Write) -> None:
    adapter = load_adapter("mine", write())
    assert adapter.name == "mine"
    assert list(adapter.pairs) == [
        Place(layer, projection) for layer in (0, 1) for projection in ("q_proj", "v_proj")
    ]
    tensors = peft_tensors()
    for place, pair in adapter.pairs.items():
        np.testing.assert_array_equal(pair.a, tensors[place.tensor("A")].data)
        np.testing.assert_array_equal(pair.b, tensors[place.tensor("B")].data)
        assert (pair.rank, pair.scale) == (4, 2.0)
    assert adapter.rank == 4
    adapter.check(LLAMA)


def test_reading_does_not_hold_on_to_the_file(write: Write) -> None:
    folder = write()
    adapter = load_adapter("mine", folder)
    before = adapter.pairs[Place(0, "q_proj")].a.copy()
    with open(folder / "adapter_model.safetensors", "r+b") as file:
        file.seek(-64, 2)
        file.write(b"\0" * 64)
    np.testing.assert_array_equal(adapter.pairs[Place(0, "q_proj")].a, before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_all_float_types_become_float32(write: Write, dtype: str) -> None:
    values = np.arange(96, dtype=np.float32).reshape(4, 24)  # exact in 8 bits
    adapter = load_adapter("a", write({f"{Q0}.lora_A.weight": from_float32(values, dtype)}))
    a = adapter.pairs[Place(0, "q_proj")].a
    assert a.dtype == np.float32
    np.testing.assert_array_equal(a, values)


def test_rank_stabilized_scale_is_alpha_over_the_root_of_the_rank(write: Write) -> None:
    adapter = load_adapter("a", write(use_rslora=True))
    assert adapter.pairs[Place(0, "q_proj")].scale == pytest.approx(8 / math.sqrt(4))


def test_patterns_give_modules_ranks_and_alphas_of_their_own(write: Write) -> None:
    """As `re.match(rf"(.*\\.)?({key})$", module)` does for plain names; the first one counts."""
    tensors: dict[str, StoredArray | None] = dict(peft_tensors())
    narrow = peft_tensors(rank=3)
    changed = "model.layers.1.self_attn.v_proj"
    tensors |= {name: array for name, array in narrow.items() if changed in name}
    folder = write(
        tensors,
        rank_pattern={"layers.1.self_attn.v_proj": 3, "elf_attn.q_proj": 7},
        alpha_pattern={"^model.layers.0.self_attn.q_proj": 6, "q_proj": 2, "^q_proj": 1},
    )
    pairs = load_adapter("a", folder).pairs
    assert {place: (pair.rank, pair.alpha) for place, pair in pairs.items()} == {
        Place(0, "q_proj"): (4, 6.0),
        Place(0, "v_proj"): (4, 8.0),
        Place(1, "q_proj"): (4, 2.0),
        Place(1, "v_proj"): (3, 8.0),
    }


@pytest.mark.parametrize(
    "targets", [r".*\.(q|v)_proj", None, ["self_attn.q_proj", "model.layers.0.self_attn.v_proj",
    "layers.1.self_attn.v_proj"]],
)  # fmt: skip
def test_target_modules_may_be_a_pattern_or_longer_names(write: Write, targets: Any) -> None:
    assert len(load_adapter("a", write(target_modules=targets)).pairs) == 4


def test_settings_of_the_training_and_unknown_empty_ones_are_ignored(write: Write) -> None:
    folder = write(lora_dropout=0.5, eva_config={"rho": 2.0}, layers_to_transform=[0, 1], later={})
    assert load_adapter("a", folder).fingerprint == load_adapter("a", write()).fingerprint


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"peft_type": "IA3"}, "peft_type = 'IA3'"),
        ({"without": "peft_type"}, "peft_type = None"),
        ({"task_type": "SEQ_CLS"}, "task_type = 'SEQ_CLS'"),
        ({"use_dora": True}, "use_dora = True"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"target_parameters": ["a.b"]}, "target_parameters"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"init_lora_weights": 1}, "init_lora_weights = 1"),
        ({"use_qalora": True}, "use_qalora"),
        ({"use_something_new": True}, "use_something_new"),
        ({"use_rslora": "yes"}, "use_rslora"),
        ({"r": 0}, "r must be"),
        ({"r": True}, "r must be"),
        ({"without": "r"}, "r must be"),
        ({"lora_alpha": "8"}, "lora_alpha must be"),
        ({"lora_alpha": 1e300}, "lora_alpha must be"),
        ({"rank_pattern": {".*q_proj": 4}}, r"rank_pattern: '\.\*q_proj' is no plain"),
        ({"rank_pattern": {"q_proj": 4.5}}, "rank_pattern q_proj must be"),
        ({"alpha_pattern": {"(a+)+": 4}}, "alpha_pattern"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern q_proj must be"),
        ({"alpha_pattern": [1]}, "alpha_pattern must be an object"),
        ({"target_modules": ["c_attn"]}, "target_modules: 'c_attn': adapters hold"),
        ({"target_modules": ["q_proj", "lm_head"]}, "'lm_head'"),
        ({"target_modules": ["embed_tokens"]}, "'embed_tokens'"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "'o_proj' has no tensors"),
        ({"target_modules": ["q_proj"]}, r"layers\.0\.self_attn\.v_proj, which has tensors"),
        ({"target_modules": ["proj"]}, "'proj'"),
        ({"target_modules": [1]}, "target_modules must be"),
        ({"target_modules": {"q_proj": 1}}, "target_modules must be"),
    ],
)
def test_settings_that_would_change_the_result_are_refused_by_name(
    write: Write, config: dict[str, Any], named: str
) -> None:
    with pytest.raises(CheckpointError, match=rf"adapter_config\.json: {named}|{named}") as caught:
        load_adapter("a", write(**config))
    assert "adapter_config.json" in str(caught.value)


def array(*shape: int, fill: float = 1.0, dtype: str = "float32") -> StoredArray:
    return from_float32(np.full(shape, fill, np.float32), dtype)


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({f"{Q0}.lora_B.weight": None}, rf"{Q0}\.lora_B\.weight is missing"),
        ({f"{Q0}.lora_A.weight": array(3, 24)}, r"float32 \[3, 24\].* implies .*\[4, \*\]"),
        ({f"{Q0}.lora_B.weight": array(24, 5)}, rf"{Q0}\.lora_B\.weight is float32 \[24, 5\]"),
        ({f"{Q0}.lora_A.weight": array(96)}, r"is float32 \[96\]"),
        ({f"{Q0}.lora_A.weight": array(4, 24, fill=math.nan)}, "not finite"),
        ({f"{Q0}.lora_B.weight": array(24, 4, fill=math.inf, dtype="float16")}, "not finite"),
        (
            {f"{Q0}.lora_A.weight": StoredArray("int8", np.ones((4, 24), np.int8))},
            r"is int8 \[4, 24\]",
        ),
        ({f"{Q0}.lora_magnitude_vector": array(24)}, "lora_magnitude_vector: adapters hold"),
        ({f"{Q0}.lora_B.bias": array(24)}, "lora_B.bias"),
        ({"base_model.model.lm_head.weight": array(67, 24)}, "lm_head"),
        ({"base_model.model.lm_head.lora_A.weight": array(4, 24)}, "lm_head"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": array(4, 67)}, "embed_tokens"),
        ({"base_model.model.transformer.h.0.attn.c_attn.lora_A.weight": array(4, 24)}, "c_attn"),
        ({Q0.replace("self_attn", "mlp") + ".lora_A.weight": array(4, 24)}, r"mlp\.q_proj"),
        ({Q0.replace(".0.", ".00.") + ".lora_A.weight": array(4, 24)}, r"layers\.00"),
        ({Q0.replace(".0.", ".٣.") + ".lora_A.weight": array(4, 24)}, "adapters hold"),
        ({Q0.replace("q_proj", "w_proj") + ".lora_A.weight": array(4, 24)}, "w_proj"),
        ({Q0 + ".lora_A.default.weight": array(4, 24)}, "default"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    write: Write, tensors: dict[str, StoredArray | None], named: str
) -> None:
    with pytest.raises(CheckpointError, match=named) as caught:
        load_adapter("a", write(tensors))
    assert "adapter_model.safetensors: tensor " in str(caught.value)


def test_adapter_of_no_tensors_is_refused(write: Write) -> None:
    with pytest.raises(CheckpointError, match="holds no tensors"):
        load_adapter("a", write(dict.fromkeys(peft_tensors(), None)))
    with pytest.raises(ConfigError, match="'a' adapts nothing"):
        Adapter(name="a", pairs={})


def test_folder_without_its_files_is_refused(write: Write, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no adapter_config\.json"):
        load_adapter("a", tmp_path / "nowhere")
    folder = write()
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"has no adapter_model\.safetensors; pickled"):
        load_adapter("a", folder)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_size": 32}, rf"{Q0}\.lora_A\.weight is \[4, 24\]; the model takes \[4, 32\]"),
        ({"num_heads": 8}, rf"{Q0}\.lora_B\.weight is \[24, 4\]; the model takes \[48, 4\]"),
        ({"num_layers": 1}, r"the model has no model\.layers\.1\.self_attn\.q_proj"),
    ],
)
def test_adapter_of_another_model_is_refused(
    write: Write, changes: dict[str, Any], named: str
) -> None:
    adapter = load_adapter("a", write())
    with pytest.raises(CheckpointError, match=named) as caught:
        adapter.check(dataclasses.replace(LLAMA, **changes))
    assert "adapter_model.safetensors: tensor " in str(caught.value)


def test_adapter_for_a_projection_that_the_model_lacks_is_refused() -> None:
    adapter = random_adapter(LLAMA, "gated", projections=["gate_proj"])
    with pytest.raises(CheckpointError, match=r"adapter 'gated'.*no model\.layers\.0\.mlp\.gate"):
        adapter.check(GPT2)


def same(first: Adapter, second: Adapter) -> bool:
    assert first.pairs.keys() == second.pairs.keys()
    for place, pair in first.pairs.items():
        np.testing.assert_array_equal(second.pairs[place].a, pair.a)
        np.testing.assert_array_equal(second.pairs[place].b, pair.b)
        assert second.pairs[place].alpha == pair.alpha
    return first.fingerprint == second.fingerprint


@pytest.mark.parametrize(
    "adapter",
    [
        random_adapter(LLAMA),
        random_adapter(LLAMA, projections=["q_proj"], layers=[1], alpha=0.3),
        random_adapter(LLAMA, projections=ATTENTION, layers=[1, 0], rank=1),
    ],
    ids=["all", "one-layer", "attention"],
)
def test_saved_adapter_is_read_back(tmp_path: Path, adapter: Adapter) -> None:
    save_adapter(tmp_path / "a", adapter)
    assert same(adapter, load_adapter("b", tmp_path / "a"))
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "manifest.json"}


def test_saved_adapter_may_differ_from_layer_to_layer(tmp_path: Path) -> None:
    pairs = dict(random_adapter(LLAMA, projections=["q_proj", "v_proj"], rank=5).pairs)
    first = pairs[Place(0, "q_proj")]
    pairs[Place(0, "q_proj")] = LoraPair(a=first.a[:2], b=first.b[:, :2], alpha=math.sqrt(2))
    del pairs[Place(1, "v_proj")]
    adapter = Adapter(name="a", pairs=pairs)
    save_adapter(tmp_path / "a", adapter)
    assert same(adapter, load_adapter("a", tmp_path / "a"))


def test_saved_settings_are_those_that_peft_knows(tmp_path: Path) -> None:
    save_adapter(tmp_path / "a", random_adapter(LLAMA, projections=["q_proj", "v_proj"]))
    values = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert values.keys() <= PEFT_CONFIG.keys()
    assert values["target_modules"] == ["q_proj", "v_proj"]
    assert (values["r"], values["lora_alpha"], values["layers_to_transform"]) == (4, 8, [0, 1])
    assert values["rank_pattern"] == {
        "layers.0.self_attn.v_proj": 5,
        "layers.1.self_attn.v_proj": 5,
    }
    tensors = map_tensors(tmp_path / "a/adapter_model.safetensors")
    assert tensors[f"{Q0}.lora_A.weight"].shape == (4, 24)
    assert tensors[f"{Q0}.lora_B.weight"].shape == (24, 4)


def test_damage_to_a_saved_adapter_is_noticed(tmp_path: Path) -> None:
    save_adapter(tmp_path / "a", random_adapter(LLAMA))
    path = tmp_path / "a/adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="sha256"):
        load_adapter("a", tmp_path / "a")


def test_saving_over_a_folder_needs_to_be_asked_for(tmp_path: Path) -> None:
    save_adapter(tmp_path / "a", random_adapter(LLAMA, seed=1))
    second = random_adapter(LLAMA, seed=2)
    with pytest.raises(ConfigError, match="not empty"):
        save_adapter(tmp_path / "a", second)
    save_adapter(tmp_path / "a", second, overwrite=True)
    assert same(second, load_adapter("a", tmp_path / "a"))


def test_fingerprint_is_of_the_content_and_not_of_the_name() -> None:
    adapter = random_adapter(LLAMA, "one")
    assert adapter.fingerprint == random_adapter(LLAMA, "two").fingerprint
    others = [
        random_adapter(LLAMA, seed=1),
        random_adapter(LLAMA, alpha=4.0),
        random_adapter(LLAMA, layers=[0]),
        random_adapter(LLAMA, projections=ATTENTION),
    ]
    assert len({adapter.fingerprint, *(other.fingerprint for other in others)}) == 5
