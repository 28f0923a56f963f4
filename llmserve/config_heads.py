"""What a model's last hidden states are turned into, in a `config.json` ⇄ `Head`.

Transformers says it by the class in `architectures`, and the names of the outputs in `id2label`.
"""

from __future__ import annotations

from typing import Any, Literal

from .config import Head, ModelConfig
from .config_checks import MAX_WIDTH, check_count
from .config_values import Values, first
from .errors import ConfigError

__all__ = ["ALL_HEADS", "Kind", "parse_head", "render_head"]

Kind = Literal["sequence", "token", "span", "embedding"]
"""`Head.kind`."""
ALL_HEADS: tuple[Kind, ...] = ("sequence", "token", "span", "embedding")
"""Every kind; families whose classes in transformers are fewer say so."""

_ENDINGS: dict[Kind, str] = {
    "sequence": "ForSequenceClassification",
    "token": "ForTokenClassification",
    "span": "ForQuestionAnswering",
    "embedding": "Model",
}


def parse_head(values: Values) -> Head | None:
    """The head that the class in `architectures` has; None for logits over the vocabulary.

    A class that is not known is taken for one with logits: the tensors show what it is.
    """
    kind = _kind(first(values.get("architectures"), []))
    if kind is None:
        return None
    if kind == "embedding":
        return Head(kind=kind)
    if kind == "span":
        return Head(kind=kind, labels=("start", "end"))
    return Head(kind=kind, labels=_labels(values))


def render_head(
    config: ModelConfig,
    prefix: str,
    generation: str,
    kinds: tuple[Kind, ...] = ALL_HEADS,
) -> dict[str, Any]:
    """What `parse_head` reads.

    Args:
        config: The model.
        prefix: Beginning of the classes with a head.
        generation: The class with logits over the vocabulary.
        kinds: Those that have a class.
    """
    head = config.head
    if head is None:
        return {"architectures": [generation]}
    if head.kind not in kinds:
        raise ConfigError(f"transformers has no class {prefix}{_ENDINGS[head.kind]}")
    values: dict[str, Any] = {"architectures": [prefix + _ENDINGS[head.kind]]}
    if head.kind in ("sequence", "token"):
        values["id2label"] = {str(index): label for index, label in enumerate(head.labels)}
        values["label2id"] = {label: index for index, label in enumerate(head.labels)}
    return values


def _kind(architectures: object) -> Kind | None:
    if not isinstance(architectures, list) or any(
        not isinstance(name, str) for name in architectures
    ):
        raise ConfigError(f"architectures must be a list of names, got {architectures!r}")
    for name in architectures:
        for kind, ending in _ENDINGS.items():
            if name.endswith(ending) and not name.endswith("LMHeadModel"):
                return kind
    return None


def _labels(values: Values) -> tuple[str, ...]:
    names = values.get("id2label")
    if names is None:
        count = first(values.get("num_labels"), 2)
        check_count("num_labels", count, MAX_WIDTH)
        return tuple(f"LABEL_{index}" for index in range(count))
    keys = [str(index) for index in range(len(names))] if isinstance(names, dict) else []
    if not keys or keys != sorted(names, key=lambda key: (len(key), key)):
        raise ConfigError(f"id2label must be an object with the keys 0, 1, ..., got {names!r}")
    if first(values.get("num_labels"), len(keys)) != len(keys):
        raise ConfigError(f"num_labels is {values['num_labels']!r}, but id2label has {len(keys)}")
    return tuple(names[key] for key in keys)
