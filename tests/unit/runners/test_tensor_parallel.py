"""How tensors are cut: what the ranks have makes the whole again, and fits their configuration."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmserve.config import Experts, ModelConfig
from llmserve.errors import CheckpointError, ConfigError
from llmserve.layouts import expected_tensors
from llmserve.runners.tensor_parallel import (
    Rank,
    adapter_of_rank,
    check_ranks,
    config_of_rank,
    cut_of,
)
from support.adapters import merged_tensors, random_adapter
from support.variants import GPT2, LLAMA, MIXTRAL, OLMO2, QWEN2_MOE, VARIANTS, random_tensors


@st.composite
def dealt_models(draw: st.DrawFn) -> tuple[ModelConfig, int]:
    """A variant of sizes that so many ranks divide, its vocabulary aside."""
    count = draw(st.integers(2, 5))
    num_kv_heads = draw(st.sampled_from([1, count, 2 * count]))
    per_head = draw(st.integers(1, 2)) * (count if num_kv_heads == 1 else 1)
    config = draw(st.sampled_from(list(VARIANTS.values())))
    changes = {
        "num_heads": num_kv_heads * per_head,
        "num_kv_heads": num_kv_heads,
        "intermediate_size": count * draw(st.integers(1, 3)),
        "vocab_size": draw(st.integers(6, 40)),
    }
    experts = config.experts
    if experts is not None:
        shared = experts.shared_intermediate_size
        experts = dataclasses.replace(
            experts,
            intermediate_size=count * draw(st.integers(1, 3)),
            shared_intermediate_size=None if shared is None else 2 * count,
        )
    return dataclasses.replace(config, experts=experts, **changes), count


def joined(name: str, parts: list[np.ndarray], config: ModelConfig) -> np.ndarray:
    """What the ranks have of the tensor `name`, put together as the model's formulas ask."""
    if name.endswith(("o_proj.bias", "down_proj.bias")):
        return np.sum(parts, axis=0)
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        return np.concatenate(parts, axis=1)
    by_key_heads = name.endswith(("k_proj.weight", "v_proj.weight", "k_proj.bias", "v_proj.bias"))
    if by_key_heads or (name.endswith("k_norm.weight") and config.qk_norm == "full"):
        repeats = max(1, len(parts) // config.num_kv_heads)
        for index, part in enumerate(parts):
            assert (part == parts[index - index % repeats]).all(), "ranks that share a key head"
        return np.concatenate(parts[::repeats])
    by_rows = ("q_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")
    if name.split(".")[-2] in by_rows:
        return np.concatenate(parts)
    if name.endswith("q_norm.weight") and config.qk_norm == "full":
        return np.concatenate(parts)
    for part in parts:
        assert (part == parts[0]).all(), "what is whole is the same on all"
    return parts[0]


@settings(max_examples=60, deadline=None)
@given(dealt_models())
def test_parts_joined_are_the_whole_and_have_their_models_shapes(
    model: tuple[ModelConfig, int],
) -> None:
    config, count = model
    check_ranks(config, count)
    ranks = [Rank(index, count) for index in range(count)]
    shapes = [expected_tensors(config_of_rank(config, rank)) for rank in ranks]
    for name, whole in random_tensors(config).items():
        parts = [cut_of(name, whole.shape, config, rank).of(whole) for rank in ranks]
        assert [part.shape for part in parts] == [each[name] for each in shapes], name
        put_together = joined(name, parts, config)
        np.testing.assert_array_equal(put_together[: len(whole)], whole, err_msg=name)
        assert not put_together[len(whole) :].any(), "the vocabulary is filled up with zeros"


@pytest.mark.parametrize("count", [2, 4])
def test_an_adapter_is_cut_as_the_weights_it_adapts_are(count: int) -> None:
    """Merging and cutting are the same in either order."""
    adapter, tensors = random_adapter(OLMO2), random_tensors(OLMO2)
    merged = merged_tensors(tensors, adapter)
    for rank in (Rank(index, count) for index in range(count)):
        cut = {
            name: cut_of(name, whole.shape, OLMO2, rank).of(whole)
            for name, whole in tensors.items()
        }
        part = adapter_of_rank(adapter, OLMO2, rank)
        part.check(config_of_rank(OLMO2, rank))
        for name, value in merged_tensors(cut, part).items():
            wanted = cut_of(name, merged[name].shape, OLMO2, rank).of(merged[name])
            np.testing.assert_allclose(value, wanted, atol=1e-6, err_msg=name)


def test_an_adapter_of_another_model_is_refused_by_the_whole_models_sizes() -> None:
    narrow = dataclasses.replace(LLAMA, hidden_size=12)
    with pytest.raises(CheckpointError, match=r"the model takes \[4, 24\]"):
        adapter_of_rank(random_adapter(narrow), LLAMA, Rank(0, 2))


@pytest.mark.parametrize(
    ("config", "count", "message"),
    [
        (LLAMA, 3, "num_heads of 4 cannot be dealt out to 3"),
        (dataclasses.replace(LLAMA, intermediate_size=41), 2, "intermediate_size of 41"),
        (dataclasses.replace(LLAMA, num_heads=12, num_kv_heads=3), 2, "3 key heads"),
        (
            dataclasses.replace(
                MIXTRAL,
                experts=Experts(num_experts=4, num_experts_per_token=2, intermediate_size=9),
            ),
            2,
            "experts' intermediate_size of 9",
        ),
        (
            dataclasses.replace(
                QWEN2_MOE,
                experts=dataclasses.replace(QWEN2_MOE.experts, shared_intermediate_size=5),
            ),
            2,
            "shared expert's intermediate_size of 5",
        ),
    ],
)
def test_sizes_that_do_not_divide_are_refused_by_name(
    config: ModelConfig, count: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_ranks(config, count)


def test_a_width_that_no_layer_has_need_not_divide() -> None:
    check_ranks(dataclasses.replace(MIXTRAL, intermediate_size=41), 2)
    check_ranks(GPT2, 4)
