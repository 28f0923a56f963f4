"""What the routes work with: one of the server's models and its engine.

A swap puts another model in the old one's place while requests run. So a route that reads a prompt
for one model and has it answered works with a `pinned` service, which no swap changes.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

from llmserve.limits import Limits
from llmserve.text.tokenizer import Tokenizer

from .engine_handle import EngineHandle
from .error_replies import DrainingError
from .messages import Outputs
from .model_card import ModelCard
from .model_metrics import ModelMetrics
from .prompts import PromptReader
from .served_model import Model
from .settings import ModelSettings, ServerSettings
from .traces import TraceStore

__all__ = ["RETRY_AFTER_S", "ServedModel", "Service"]

RETRY_AFTER_S = 5.0
"""What a client is told to wait before it tries a server again that takes no requests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """One model, its adapters, and the engine that runs them."""

    settings: ModelSettings
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
    """One of the server's models, and the place that another may take."""

    settings: ServerSettings
    """The whole server's."""
    started_with: ModelSettings
    """What the operator asked for, whatever model has taken the place since."""
    model: ServedModel
    """What new requests are answered by."""
    metrics: ModelMetrics
    traces: TraceStore
    """The whole server's."""
    retired: list[EngineHandle] = field(default_factory=list)
    """Engines of earlier models that still have requests."""
    swapped: asyncio.Event = field(default_factory=asyncio.Event)
    """Set for a moment when another model took the place."""
    is_loading: bool = False
    """Whether the old model is gone and the new one not there yet, in a swap that drains."""

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
    def cards(self) -> tuple[ModelCard, ...]:
        """The model's, and after it its adapters'."""
        return (self.model.card, *self.model.adapter_cards)

    @property
    def name(self) -> str:
        """The model's first, which stays when another takes its place."""
        return self.model.card.names[0]

    def put(self, model: ServedModel) -> None:
        """Have new requests answered by `model`, and note what its engine does."""
        model.engine.on_outputs = self._note_step
        self.model = model

    def pinned(self) -> Service:
        """This service as it is now, whatever model comes next."""
        return replace(self)

    def check_open(self) -> None:
        """Raise `DrainingError` while no model is there that could answer."""
        if self.is_loading:
            raise _loading_error()

    def close(self) -> None:
        """Take no requests until another model is there, nor those that were read already: they
        are told so when they come to the engine."""
        self.is_loading = True
        self.engine.requests.refuse(_loading_error())

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
    def engines(self) -> tuple[EngineHandle, ...]:
        """All that may have requests, earlier models' too."""
        return (*self.retired, self.engine)


def _loading_error() -> DrainingError:
    return DrainingError("another model is being loaded", retry_after_s=RETRY_AFTER_S)
