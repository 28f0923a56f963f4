"""What the routes work with: the served model and its engine, and whether new requests are taken.

A swap puts another model in the old one's place while requests run. So a route that reads a prompt
for one model and has it answered works with a `pinned` service, which no swap changes.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

from llmserve.limits import Limits
from llmserve.text.tokenizer import Tokenizer

from .engine_handle import EngineHandle
from .error_replies import DrainingError, NotFoundError
from .messages import Outputs
from .metrics import ServerMetrics
from .model_card import ModelCard
from .prompts import PromptReader
from .served_model import Model
from .settings import ServerSettings
from .trace_export import SpanExport
from .traces import TraceStore
from .visitors import Visitors

__all__ = ["ServedModel", "Service"]

DRAIN_RETRY_AFTER_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """One model, its adapters, and the engine that runs them."""

    settings: ServerSettings
    """Those that it was started with."""
    opened: Model
    """Its folder."""
    engine: EngineHandle
    tokenizer: Tokenizer
    prompts: PromptReader
    card: ModelCard
    """Of the model itself."""
    adapter_cards: tuple[ModelCard, ...] = ()


@dataclass(slots=True, kw_only=True)
class Service:
    """Everything that a route needs."""

    settings: ServerSettings
    model: ServedModel
    """What new requests are answered by."""
    metrics: ServerMetrics
    traces: TraceStore = field(default_factory=TraceStore)
    """Where the latest requests' time went."""
    spans: SpanExport | None = None
    """Where requests are told of as OpenTelemetry spans; None: nowhere."""
    visitors: Visitors = field(default_factory=Visitors)
    """Requests inside the application."""
    retired: list[EngineHandle] = field(default_factory=list)
    """Engines of earlier models that still have requests."""
    swapped: asyncio.Event = field(default_factory=asyncio.Event)
    """Set for a moment when another model took the place."""
    is_loading: bool = False
    """Whether the old model is gone and the new one not there yet, in a swap that drains."""
    is_draining: bool = False
    """Whether the server is about to end: what runs goes on, nothing new begins."""

    @property
    def limits(self) -> Limits:
        """Bounds in force."""
        return self.settings.limits

    @property
    def engine(self) -> EngineHandle:
        """The model's."""
        return self.model.engine

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's."""
        return self.model.tokenizer

    @property
    def prompts(self) -> PromptReader:
        """The model's."""
        return self.model.prompts

    @property
    def card(self) -> ModelCard:
        """The model's."""
        return self.model.card

    @property
    def adapter_cards(self) -> tuple[ModelCard, ...]:
        """The model's."""
        return self.model.adapter_cards

    def put(self, model: ServedModel) -> None:
        """Have new requests answered by `model`, and note what its engine does."""
        model.engine.on_outputs = self._note_step
        self.model = model

    def pinned(self) -> Service:
        """This service as it is now, whatever model comes next."""
        return replace(self)

    def check_open(self) -> None:
        """Raise `DrainingError` when no new request may begin."""
        if self.is_loading:
            raise DrainingError("another model is being loaded", retry_after_s=DRAIN_RETRY_AFTER_S)
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

    def _note_step(self, event: Outputs) -> None:
        self.traces.note(event)
        if event.work is not None:
            self.metrics.step_tokens.observe(event.work.num_tokens)

    def note_swap(self) -> None:
        """Tell who waits for the engine's end that it is another engine now."""
        self.swapped.set()
        self.swapped.clear()

    def problem(self) -> str | None:
        """What keeps the engine from making progress, if anything does."""
        if self.is_loading:
            return "another model is being loaded"
        return self.engine.problem()

    async def wait_dead(self) -> None:
        """Return when the engine of the model served then is gone for good."""
        while not self.engine.died.is_set():
            waits = [
                asyncio.create_task(self.engine.died.wait()),
                asyncio.create_task(self.swapped.wait()),
            ]
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()

    @property
    def num_requests(self) -> int:
        """Requests that an engine has, earlier models' too."""
        return sum(len(engine.requests) for engine in (*self.retired, self.engine))

    async def wait_idle(self) -> None:
        """Return when no engine has a request any more."""
        while self.num_requests:
            for engine in (*self.retired, self.engine):
                await engine.requests.wait_idle()

    def abort_all(self) -> None:
        """End every request that an engine has."""
        for engine in (*self.retired, self.engine):
            engine.requests.abort_all()
