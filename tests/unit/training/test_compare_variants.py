"""Which variants a comparison has, and that they cost the same."""

from __future__ import annotations

import pytest

from llmserve.errors import ConfigError
from llmserve.training.compare_variants import AXES, make_variants, with_equal_compute
from llmserve.training.monitor_flops import training_flops_per_token
from llmserve.training.recipe import TrainingRecipe
from support.training_runs import tiny_recipe


def flops_of(recipe: TrainingRecipe) -> int:
    return training_flops_per_token(recipe.model_config(vocab_size=300))


def test_each_variant_changes_one_thing_of_the_base() -> None:
    variants = make_variants(tiny_recipe(num_heads=4, hidden_size=32), list(AXES))
    names = [variant.name for variant in variants]
    assert names[0] == "base"
    assert len(set(names)) == len(names)
    assert {"positions-learned", "positions-sinusoidal", "positions-none"} < set(names)
    assert {"heads-mha", "heads-gqa", "experts-moe4", "norm-layernorm"} < set(names)
    assert "positions-rope" not in names  # the base's own
    assert "heads-mqa" not in names


def test_heads_are_all_half_and_one() -> None:
    variants = make_variants(tiny_recipe(num_heads=4, num_kv_heads=4, hidden_size=32), ["heads"])
    assert [variant.recipe.num_kv_heads for variant in variants] == [4, 2, 1]


def test_gated_and_plain_feed_forwards_have_as_many_weights() -> None:
    base, plain = make_variants(tiny_recipe(), ["activation"])
    assert 2 * plain.recipe.intermediate_size == 3 * base.recipe.intermediate_size


def test_all_variants_take_the_operations_of_the_base() -> None:
    variants = with_equal_compute(make_variants(tiny_recipe(steps=10_000), list(AXES)), flops_of)
    costs = [flops_of(v.recipe) * (v.recipe.steps or 0) for v in variants]
    assert costs == pytest.approx([costs[0]] * len(costs), rel=1e-3)
    steps = {variant.name: variant.recipe.steps for variant in variants}
    assert steps["base"] == steps["positions-none"] == 10_000
    assert steps["heads-mha"] < 10_000  # type: ignore[operator]


@pytest.mark.parametrize(
    ("axes", "changes", "message"),
    [
        (["colour"], {}, "colour"),
        (["experts"], {"activation": "gelu"}, "swiglu"),
        (["activation"], {"num_experts": 4}, "num_experts"),
    ],
)
def test_what_cannot_be_varied_is_refused(
    axes: list[str], changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_variants(tiny_recipe(**changes), axes)
