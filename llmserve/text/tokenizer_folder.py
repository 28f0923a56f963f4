"""The files of a model folder that say what its tokenizer is, read and brought together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..strict_json import parse_json, read_json
from .tokenizer_file import read_bounded

__all__ = ["CHAT_TEMPLATE", "TokenizerFolder", "read_tokenizer_folder"]

_SETTINGS = ("special_tokens_map.json", "tokenizer_config.json")  # the later one wins
CHAT_TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerFolder:
    """What a folder's files say about its tokenizer."""

    tokenizer_json: bytes
    settings: Mapping[str, Any]
    """tokenizer_config.json over special_tokens_map.json, each where there is one."""
    model_settings: Mapping[str, Any]
    """config.json, where there is one."""
    chat_template: str | None
    """From chat_template.jinja, else from the settings; of several the one named `default`."""
    companions: Mapping[str, bytes]
    """The files beside tokenizer.json as they are, to be copied with it."""


def read_tokenizer_folder(folder: Path) -> TokenizerFolder:
    """Read the tokenizer's files of a model folder; only tokenizer.json must be there.

    Raises:
        CheckpointError: naming the file and the cause.
    """
    companions = {
        name: read_bounded(folder / name)
        for name in (*_SETTINGS, CHAT_TEMPLATE)
        if (folder / name).exists()
    }
    settings: dict[str, Any] = {}
    for name in _SETTINGS:
        if name in companions:
            settings |= parse_json(companions[name], folder / name)
    has_config = (folder / "config.json").exists()
    return TokenizerFolder(
        tokenizer_json=read_bounded(folder / "tokenizer.json"),
        settings=settings,
        model_settings=read_json(folder / "config.json") if has_config else {},
        chat_template=_find_template(folder, companions, settings),
        companions=companions,
    )


def _find_template(
    folder: Path, companions: Mapping[str, bytes], settings: Mapping[str, Any]
) -> str | None:
    if CHAT_TEMPLATE in companions:
        try:
            return companions[CHAT_TEMPLATE].decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{folder / CHAT_TEMPLATE}: not UTF-8: {error.reason}") from error
    template = settings.get("chat_template")
    if isinstance(template, list):
        entries = [entry for entry in template if isinstance(entry, dict)]
        named = {str(entry.get("name")): entry.get("template") for entry in entries}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{folder / 'tokenizer_config.json'}: chat_template is no string")
    return template
