"""What `/v1/models` says of a served model, and of each adapter beside it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from llmserve.checkpoint import Checkpoint
from llmserve.engine.config import EngineConfig
from llmserve.runners.protocol import RunnerInfo

from .engine_handle import EngineHandle
from .settings import ModelSettings

__all__ = ["AdapterFacts", "ModelCard", "names_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFacts:
    """What the API process needs of a LoRA adapter."""

    name: str
    root: str
    """The folder, as given on the command line."""
    fingerprint: str
    """Digest of its contents."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """The served model as `/v1/models` describes it."""

    names: tuple[str, ...]
    """Names that requests may use; replies carry the first."""
    root: str
    """The folder, as given on the command line."""
    base: ModelCard | None = None
    """For an adapter: the model that it changes."""
    fingerprint: str
    """Digest of the folder's contents."""
    quantization: str | None
    """The stored number format, where the weights are quantized."""
    has_chat_template: bool
    records: Mapping[str, object] = field(default_factory=dict)
    """The folder's `lineage`; the curves of its `training`; and its `certificate`: how far served
    forms are from the original."""
    info: RunnerInfo
    config: EngineConfig
    created: int = field(default_factory=lambda: int(time.time()))
    """When it was loaded, in seconds since 1970."""

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        settings: ModelSettings,
        engine: EngineHandle,
        *,
        has_chat_template: bool,
        records: Mapping[str, object],
    ) -> ModelCard:
        """The card of a folder that an engine has loaded."""
        stored = checkpoint.quantization
        return cls(
            names=names_of(checkpoint, settings),
            root=settings.engine.model,
            fingerprint=checkpoint.fingerprint,
            quantization=None if stored is None else stored.scheme,
            has_chat_template=has_chat_template,
            records=records,
            info=engine.info,
            config=engine.config,
        )

    def with_adapter(self, adapter: AdapterFacts) -> ModelCard:
        """The card of this model as an adapter changes it."""
        return replace(
            self,
            names=(adapter.name,),
            root=adapter.root,
            base=self,
            records={},
            fingerprint=adapter.fingerprint,
        )

    @property
    def adapter(self) -> str | None:
        """The adapter's name, where it is one's card."""
        return None if self.base is None else self.names[0]

    @property
    def system_fingerprint(self) -> str:
        """Changes with the weights, the adapter's too, and with the way they are executed."""
        base = "" if self.base is None else self.base.fingerprint
        form = "|".join((self.info.runner, self.info.executed_form, self.info.cache_dtype, base))
        return f"fp_{self.fingerprint[:8]}_{hashlib.sha256(form.encode()).hexdigest()[:8]}"

    def as_dict(self, name: str) -> dict[str, object]:
        """The entry of `/v1/models` under one of its names."""
        return {
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": "llmserve",
            "root": self.root,
            "parent": None if self.base is None else self.base.names[0],
            "max_model_len": self.config.max_seq_len,
            "permission": [],
            "runner": self.info.runner,
            "executed_form": self.info.executed_form,
            "quantization": self.quantization,
            "cache_dtype": self.info.cache_dtype,
            "num_parameters": self.info.num_parameters,
            "weight_bytes": self.info.weight_bytes,
            "vocab_size": self.info.vocab_size,
            "has_chat_template": self.has_chat_template,
            "fingerprint": self.fingerprint,
            "head": self.info.head,
            "labels": list(self.info.labels),
            "system_fingerprint": self.system_fingerprint,
        }

    def with_records(self, name: str) -> dict[str, object]:
        """The same with the folder's records, for `/v1/models/{name}`."""
        return {**self.as_dict(name), **self.records}


def names_of(checkpoint: Checkpoint, settings: ModelSettings) -> tuple[str, ...]:
    """Names of the model itself: those the operator gave it, else its folder's."""
    return settings.names or (checkpoint.path.resolve().name,)
