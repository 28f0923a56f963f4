"""What the routes work with: one engine, its model's facts, and whether new requests are taken."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field

from llmserve.checkpoint import Checkpoint
from llmserve.engine.config import EngineConfig
from llmserve.limits import Limits
from llmserve.runners.protocol import RunnerInfo
from llmserve.text.tokenizer import Tokenizer

from .engine_handle import EngineHandle
from .error_replies import DrainingError, NotFoundError
from .metrics import ServerMetrics
from .prompts import PromptReader
from .settings import ServerSettings

__all__ = ["ModelCard", "Service"]

DRAIN_RETRY_AFTER_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """The served model as `/v1/models` describes it."""

    names: tuple[str, ...]
    """Names that requests may use; replies carry the first."""
    root: str
    """The folder, as given on the command line."""
    fingerprint: str
    """Digest of the folder's contents."""
    quantization: str | None
    """The stored number format, where the weights are quantized."""
    has_chat_template: bool
    info: RunnerInfo
    config: EngineConfig
    created: int = field(default_factory=lambda: int(time.time()))
    """When it was loaded, in seconds since 1970."""

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        settings: ServerSettings,
        engine: EngineHandle,
        *,
        has_chat_template: bool,
    ) -> ModelCard:
        """The card of a folder that an engine has loaded."""
        stored = checkpoint.quantization
        return cls(
            names=settings.served_model_names or (checkpoint.path.resolve().name,),
            root=settings.engine.model,
            fingerprint=checkpoint.fingerprint,
            quantization=None if stored is None else stored.scheme,
            has_chat_template=has_chat_template,
            info=engine.info,
            config=engine.config,
        )

    @property
    def system_fingerprint(self) -> str:
        """Changes with the weights and with the way they are executed."""
        form = "|".join((self.info.runner, self.info.executed_form, self.info.cache_dtype))
        return f"fp_{self.fingerprint[:8]}_{hashlib.sha256(form.encode()).hexdigest()[:8]}"

    def as_dict(self, name: str) -> dict[str, object]:
        """The entry of `/v1/models` under one of its names."""
        return {
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": "llmserve",
            "root": self.root,
            "parent": None,
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
            "system_fingerprint": self.system_fingerprint,
        }


@dataclass(slots=True, kw_only=True)
class Service:
    """Everything that a route needs."""

    settings: ServerSettings
    engine: EngineHandle
    tokenizer: Tokenizer
    prompts: PromptReader
    card: ModelCard
    metrics: ServerMetrics
    is_draining: bool = False
    """Whether the server is about to end: what runs goes on, nothing new begins."""

    @property
    def limits(self) -> Limits:
        """Bounds in force."""
        return self.settings.limits

    def check_open(self) -> None:
        """Raise `DrainingError` when no new request may begin."""
        if self.is_draining:
            raise DrainingError("the server is shutting down", retry_after_s=DRAIN_RETRY_AFTER_S)

    def check_model(self, name: str | None) -> None:
        """Raise `NotFoundError` for a model that is not served here; None is the one that is."""
        if name is not None and name not in self.card.names:
            raise NotFoundError(
                f"the model {name[:64]!r} is not served here; GET /v1/models lists what is",
                param="model",
            )

    def problem(self) -> str | None:
        """What keeps the engine from making progress, if anything does."""
        return self.engine.problem(time.monotonic())
