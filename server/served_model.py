"""Model folders as the API process sees them: checked, and read as far as it needs them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmserve.adapters import load_adapter
from llmserve.checkpoint import Checkpoint
from llmserve.durable import verify_manifest
from llmserve.errors import ConfigError, TemplateError
from llmserve.limits import Limits
from llmserve.lineage import LINEAGE_FILE
from llmserve.manifest import read_certificate
from llmserve.model_files import check_model_folder
from llmserve.strict_json import read_json
from llmserve.text.chat_template import ChatTemplate
from llmserve.text.tokenizer import Tokenizer

from .model_card import AdapterFacts, names_of
from .settings import ModelSettings
from .training_curves import read_curves

__all__ = ["Model", "load_template", "open_model"]

_log = logging.getLogger("llmserve.server")


@dataclass(frozen=True, slots=True)
class Model:
    """What the API process needs of a model folder."""

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    template: ChatTemplate | None
    adapters: tuple[AdapterFacts, ...] = ()
    records: Mapping[str, object] = field(default_factory=dict)
    """What the folder says of its making and its proof: `lineage`, `training`, `certificate`."""


def open_model(settings: ModelSettings, limits: Limits) -> Model:
    """Check the folders of the model, its adapters and its draft model; read what is needed here.

    Raises:
        CheckpointError: a folder cannot be used.
        ConfigError: the chat template cannot be used, or an adapter has a name of the model's.
    """
    checkpoint, tokenizer = _open_verified(Path(settings.engine.model))
    if settings.engine.draft_model is not None:
        Checkpoint.open(settings.engine.draft_model)
    adapters = tuple(
        _open_adapter(checkpoint, name, root) for name, root in settings.engine.adapters.items()
    )
    taken = {adapter.name for adapter in adapters} & set(names_of(checkpoint, settings))
    if taken:
        raise ConfigError(f"{min(taken)!r} is the model's name: give the adapter another")
    return Model(
        checkpoint,
        tokenizer,
        load_template(tokenizer, settings, limits),
        adapters,
        _read_records(checkpoint.path),
    )


def _read_records(folder: Path) -> dict[str, object]:
    """The folder's records by name; None for one that is not there, or is of other files."""
    lineage = folder / LINEAGE_FILE
    return {
        "lineage": read_json(lineage) if lineage.is_file() else None,
        "training": read_curves(folder),
        "certificate": _without_points(read_certificate(folder)),
    }


def _without_points(certificate: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A certificate less what is there for plots."""
    if certificate is None:
        return None
    forms = [
        {name: value for name, value in form.items() if name != "scatter"}
        for form in certificate.get("forms", [])
    ]
    return {**certificate, "forms": forms}


def _open_verified(path: Path) -> tuple[Checkpoint, Tokenizer]:
    """The model and its tokenizer, while another thread compares all files with the manifest."""
    check_model_folder(path)
    with ThreadPoolExecutor(1) as pool:
        verifying = pool.submit(verify_manifest, path)
        try:
            return Checkpoint.open(path, verify=False), Tokenizer.load(path)
        finally:
            verifying.result()  # what it finds explains whatever else went wrong


def _open_adapter(checkpoint: Checkpoint, name: str, root: str) -> AdapterFacts:
    adapter = load_adapter(name, Path(root))
    adapter.check(checkpoint.config)
    return AdapterFacts(name=name, root=root, fingerprint=adapter.fingerprint)


def load_template(
    tokenizer: Tokenizer, settings: ModelSettings, limits: Limits
) -> ChatTemplate | None:
    """The operator's template, else the folder's; None, with a warning, if the latter is bad."""
    path = settings.chat_template
    if path is None and tokenizer.chat_template is None:
        return None
    try:
        source = None if path is None else path.read_text(encoding="utf-8")
        return ChatTemplate.for_tokenizer(tokenizer, limits, source=source)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"chat template {path} cannot be read: {error}") from error
    except TemplateError as error:
        if path is not None:
            raise ConfigError(f"{path}: {error}") from error
        _log.warning("chat is off: %s", error)
        return None
