"""`config.json` of others and our own ⇄ `ModelConfig`.

A family is what transformers calls a `model_type`: Llama's relatives (`families_llama.py`), Gemma,
models with experts, GPT-2, and our own `llmserve` for every other mix. A setting of others that
would change the result and is not supported is refused by name; one that is unknown is named in a
warning; in our own files it is an error. The spellings of versions 4 and 5 of transformers are
read, and both are written.

A family is right for a model if its file reads back as the same model: no list of conditions can
then forget one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from .config import Experts, Head, ModelConfig, RopeScaling
from .config_keys import render_special_ids
from .config_values import Values, first, parse_special_ids
from .errors import ConfigError
from .families_gemma import parse_gemma2, parse_gemma3, render_gemma2, render_gemma3
from .families_gpt2 import parse_gpt2, render_gpt2
from .families_llama import (
    parse_llama,
    parse_mistral,
    parse_olmo2,
    parse_phi3,
    parse_qwen2,
    parse_qwen3,
    render_llama,
    render_mistral,
    render_olmo2,
    render_phi3,
    render_qwen2,
    render_qwen3,
)
from .families_moe import (
    parse_mixtral,
    parse_qwen2_moe,
    parse_qwen3_moe,
    render_mixtral,
    render_qwen2_moe,
    render_qwen3_moe,
)
from .layouts import Family, expected_tensors

__all__ = [
    "Family",
    "expected_tensors",
    "family_of",
    "parse_config",
    "render_config",
    "render_generation_config",
    "with_generation_config",
]

Parse = Callable[[Values], ModelConfig]
Render = Callable[[ModelConfig], dict[str, Any]]

_OWN_FIELDS = {field.name: field for field in dataclasses.fields(ModelConfig)}
_OWN_PARTS = {"rope_scaling": RopeScaling, "experts": Experts, "head": Head}


def parse_config(values: Values) -> ModelConfig:
    """The model that a `config.json` describes.

    Raises:
        ConfigError: a family, setting or combination that is not supported, or a value out of
            range; the message names it.
    """
    family = values.get("model_type")
    if not isinstance(family, str) or family not in _FAMILIES:
        names = ", ".join(map(repr, _FAMILIES))
        raise ConfigError(f"model_type {family!r} is not supported; llmserve opens {names}")
    parse, _ = _FAMILIES[family]
    return parse(values)


def family_of(config: ModelConfig) -> Family:
    """The family whose files can hold the model unchanged, `llmserve` if no other program's can."""
    return next(family for family in _FAMILIES if _can_hold(family, config))


def render_config(config: ModelConfig, family: Family | None = None) -> dict[str, Any]:
    """`config.json` for a model, by default of the family that `family_of` finds.

    Raises `ConfigError` if the files of `family` cannot hold the model.
    """
    family = family or family_of(config)
    if not _can_hold(family, config):
        raise ConfigError(f"files of model_type {family!r} cannot hold this model")
    _, render = _FAMILIES[family]
    return render(config)


def with_generation_config(config: ModelConfig, values: Values) -> ModelConfig:
    """`config` with the special ids of a `generation_config.json`: its end ids first, then ours."""
    ids = parse_special_ids(values, config.vocab_size)
    return dataclasses.replace(
        config,
        eos_token_ids=tuple(dict.fromkeys(ids["eos_token_ids"] + config.eos_token_ids)),
        bos_token_id=first(config.bos_token_id, ids["bos_token_id"]),
        pad_token_id=first(config.pad_token_id, ids["pad_token_id"]),
    )


def render_generation_config(config: ModelConfig) -> dict[str, Any]:
    """`generation_config.json`: the special ids that the model has."""
    ids = render_special_ids(config)
    return {name: value for name, value in ids.items() if value is not None}


def _can_hold(family: Family, config: ModelConfig) -> bool:
    parse, render = _FAMILIES[family]
    try:
        return parse(render(config)) == config
    except ConfigError:
        return False


def _parse_own(values: Values) -> ModelConfig:
    fields = {name: value for name, value in values.items() if name in _OWN_FIELDS}
    unknown = sorted(values.keys() - _OWN_FIELDS.keys() - {"model_type", "quantization_config"})
    if unknown:
        raise ConfigError(f"unknown settings {unknown} for model_type 'llmserve'")
    try:
        for name, part in _OWN_PARTS.items():
            if fields.get(name) is not None:
                fields[name] = part(**_with_tuples(fields[name], ("dense_layers", "labels")))
        fields = _with_tuples(fields, ("eos_token_ids", "full_attention_layers"))
        _check_ids(fields)
        return ModelConfig(**fields)
    except TypeError as error:
        raise ConfigError(f"settings for model_type 'llmserve': {error}") from error


def _with_tuples(fields: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: tuple(value) if name in names else value for name, value in {**fields}.items()}


def _check_ids(fields: dict[str, Any]) -> None:
    for name in ("bos_token_id", "pad_token_id", "eos_token_ids"):
        value = fields.get(name)
        for token_id in value if isinstance(value, tuple) else [value]:
            if token_id is not None and type(token_id) is not int:
                raise ConfigError(f"{name} holds {token_id!r}, which is no token id")


def _render_own(config: ModelConfig) -> dict[str, Any]:
    return {"model_type": "llmserve", **dataclasses.asdict(config)}


# In this order a model's own family is looked for.
_FAMILIES: dict[Family, tuple[Parse, Render]] = {
    "llama": (parse_llama, render_llama),
    "mistral": (parse_mistral, render_mistral),
    "qwen2": (parse_qwen2, render_qwen2),
    "qwen3": (parse_qwen3, render_qwen3),
    "olmo2": (parse_olmo2, render_olmo2),
    "phi3": (parse_phi3, render_phi3),
    "gemma2": (parse_gemma2, render_gemma2),
    "gemma3_text": (parse_gemma3, render_gemma3),
    "mixtral": (parse_mixtral, render_mixtral),
    "qwen2_moe": (parse_qwen2_moe, render_qwen2_moe),
    "qwen3_moe": (parse_qwen3_moe, render_qwen3_moe),
    "gpt2": (parse_gpt2, render_gpt2),
    "llmserve": (_parse_own, _render_own),
}
