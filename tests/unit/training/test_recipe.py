"""Recipes: read from TOML, overridden, and strict about both."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from llmserve.errors import ConfigError
from llmserve.training.recipe import TrainingRecipe, load_recipe, recipe_names
from llmserve.training.recipe_fields import field_docs


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_options_win_over_the_file(tmp_path: Path) -> None:
    source = write(tmp_path / "r.toml", "steps = 10\nbatch_size = 8\nlearning_rate = 0.01\n")
    recipe = load_recipe(source, {"batch_size": 2})
    assert (recipe.steps, recipe.batch_size, recipe.learning_rate) == (10, 2, 0.01)


def test_steps_as_an_option_replace_the_minutes_of_the_file(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path / "r.toml", "minutes = 3"), {"steps": 5})
    assert recipe.steps == 5
    assert recipe.minutes is None


def test_steps_as_an_option_need_no_limit_of_passes(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path / "r.toml", "minutes = 3\nmax_passes = 2"), {"steps": 5})
    assert (recipe.steps, recipe.max_passes) == (5, None)


def test_unknown_key_is_refused_by_name(tmp_path: Path) -> None:
    source = write(tmp_path / "r.toml", "steps = 10\nlearning_rat = 0.1\n")
    with pytest.raises(ConfigError, match="learning_rat"):
        load_recipe(source, {})


@pytest.mark.parametrize("name", ["missing", "also/missing.toml"])
def test_missing_recipe_names_those_there_are(name: str) -> None:
    with pytest.raises(ConfigError, match="python-manual"):
        load_recipe(name, {})


def test_malformed_toml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="TOML"):
        load_recipe(write(tmp_path / "r.toml", "steps = = 1"), {})


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"steps": 1, "minutes": 1.0},
        {"steps": 1, "max_passes": 2.0},
        {"steps": 0},
        {"steps": True},
        {"steps": 1.5},
        {"steps": 1, "batch_size": 6, "accumulation": 4},
        {"steps": 1, "hidden_size": 100, "num_heads": 3},
        {"steps": 1, "num_heads": 0},
        {"steps": 1, "num_kv_heads": 3},
        {"steps": 1, "num_layers": 0},
        {"steps": 1, "hidden_size": 36, "num_heads": 4, "num_kv_heads": 4},
        {"steps": 1, "dropout": 1.0},
        {"steps": 1, "dropout": float("nan")},
        {"steps": 1, "learning_rate": 1e-4, "final_learning_rate": 1e-3},
        {"steps": 1, "precision": "float8"},
        {"steps": 1, "optimizer": "sgd"},
        {"steps": 1, "ema_decay": 1.0},
        {"steps": 1, "early_stop": 0},
        {"steps": 1, "num_experts": 1},
        {"steps": 1, "num_experts": 4, "activation": "gelu"},
        {"steps": 1, "expert_size": 8},
        {"steps": 1, "num_experts": 4, "compile": True},
        {"steps": 1, "activation_checkpointing": True, "compile": True},
        {"steps": 1, "parallel": "fsdp", "optimizer": "muon"},
        {"steps": 1, "bias": 1},
        {"steps": 1, "tokenizer": 3},
    ],
)
def test_bad_values_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        TrainingRecipe(**values)


def test_every_field_is_documented() -> None:
    assert field_docs(TrainingRecipe).keys() == {field.name for field in fields(TrainingRecipe)}
    assert all(text.endswith(".") for text in field_docs(TrainingRecipe).values())


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_of_the_program_are_valid(name: str) -> None:
    recipe = load_recipe(name, {})
    assert recipe.sha256 != load_recipe(name, {"seed": recipe.seed + 1}).sha256
