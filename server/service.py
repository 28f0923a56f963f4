"""What the routes work with: one engine, its models' facts, and whether new requests are taken."""

from __future__ import annotations

import time
from dataclasses import dataclass

from llmserve.limits import Limits
from llmserve.text.tokenizer import Tokenizer

from .engine_handle import EngineHandle
from .error_replies import DrainingError, NotFoundError
from .metrics import ServerMetrics
from .model_card import ModelCard
from .prompts import PromptReader
from .settings import ServerSettings
from .trace_export import SpanExport
from .traces import TraceStore

__all__ = ["Service"]

DRAIN_RETRY_AFTER_S = 5.0


@dataclass(slots=True, kw_only=True)
class Service:
    """Everything that a route needs."""

    settings: ServerSettings
    engine: EngineHandle
    tokenizer: Tokenizer
    prompts: PromptReader
    card: ModelCard
    """Of the model itself."""
    adapter_cards: tuple[ModelCard, ...] = ()
    metrics: ServerMetrics
    traces: TraceStore
    """Where the latest requests' time went."""
    spans: SpanExport | None = None
    """Where requests are told of as OpenTelemetry spans; None: nowhere."""
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

    def card_named(self, name: str | None) -> ModelCard:
        """The model or adapter that a request names; None: the model itself.

        Raises `NotFoundError` for what is not served here.
        """
        if name is None:
            return self.card
        for card in (self.card, *self.adapter_cards):
            if name in card.names:
                return card
        raise NotFoundError(
            f"the model {name[:64]!r} is not served here; GET /v1/models lists what is",
            param="model",
        )

    def problem(self) -> str | None:
        """What keeps the engine from making progress, if anything does."""
        return self.engine.problem(time.monotonic())
