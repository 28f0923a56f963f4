"""What a recipe of fine-tuning takes, and that nothing is accepted without an effect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmserve.errors import ConfigError
from llmserve.training.finetune_recipe import FinetuneRecipe, load_finetune_recipe
from llmserve.training.recipe_fields import field_docs


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"task": "poetry"}, "task must be one of"),
        ({"method": "full", "rank": 4}, "rank is for the method lora"),
        ({"task": "classify", "beta": 0.1}, "beta is for the task dpo, not classify"),
        ({"labels": "a,b"}, "labels is for the task classify"),
        ({"task": "span", "temperature": 1.0}, "temperature is for the task embed or distill"),
        ({"task": "distill"}, "distill needs a teacher"),
        ({"task": "text", "chat_template": "x"}, "chat_template is for the task"),
        ({"batch_size": 6, "accumulation": 4}, "must divide batch_size"),
        ({"held_out": 0.9}, "held_out must be from 0.0 to 0.5"),
        ({"method": "lora", "targets": "q_proj,w_proj"}, r"targets: unknown \['w_proj'\]"),
        ({"columns": "text"}, "columns takes NAME=VALUE"),
        ({"epochs": "3"}, "epochs must be float"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FinetuneRecipe(**values)


def test_defaults_depend_on_the_method() -> None:
    assert FinetuneRecipe().highest_rate < FinetuneRecipe(method="lora").highest_rate
    recipe = FinetuneRecipe(method="lora", rank=4, targets="q_proj, v_proj")
    assert (recipe.lora_rank, recipe.lora_alpha) == (4, 8.0)
    assert recipe.target_names() == ("q_proj", "v_proj")
    assert FinetuneRecipe(columns="text=SMS,label=L").column_names() == {
        "text": "SMS",
        "label": "L",
    }


def test_options_win_over_the_file_and_unknown_keys_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('method = "lora"\nrank = 4\n')
    assert load_finetune_recipe(path, {"rank": 2}) == FinetuneRecipe(method="lora", rank=2)
    path.write_text("ranks = 4\n")
    with pytest.raises(ConfigError, match=r"unknown settings \['ranks'\]"):
        load_finetune_recipe(path, {})


def test_every_field_is_documented() -> None:
    assert field_docs(FinetuneRecipe).keys() == FinetuneRecipe.__dataclass_fields__.keys()
    assert FinetuneRecipe(seed=1).sha256 != FinetuneRecipe().sha256
