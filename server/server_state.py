"""A running server as its routes see it: the models by name, and whether requests are taken."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from llmserve.errors import RequestError
from llmserve.limits import Limits

from .error_replies import DrainingError, NotFoundError
from .metrics import ServerMetrics
from .model_card import ModelCard
from .service import RETRY_AFTER_S, Service
from .settings import ServerSettings
from .trace_export import SpanExport
from .traces import TraceStore
from .visitors import Visitors

__all__ = ["ServerState"]

MAX_SHOWN_CHARS = 64
"""Of a client's text, in a message."""


@dataclass(slots=True, kw_only=True)
class ServerState:
    """Everything that a route needs."""

    settings: ServerSettings
    services: tuple[Service, ...]
    """The models, at least one, in the order in which they were given."""
    metrics: ServerMetrics
    traces: TraceStore
    """Where the latest requests' time went."""
    spans: SpanExport | None = None
    """Where requests are told of as OpenTelemetry spans; None: nowhere."""
    visitors: Visitors = field(default_factory=Visitors)
    """Requests inside the application."""
    is_draining: bool = False
    """Whether the server is about to end: what runs goes on, nothing new begins."""

    @property
    def limits(self) -> Limits:
        """Bounds in force."""
        return self.settings.limits

    @property
    def cards(self) -> list[ModelCard]:
        """Of all models and adapters."""
        return [card for service in self.services for card in service.cards]

    def check_open(self) -> None:
        """Raise `DrainingError` when no new request may begin."""
        if self.is_draining:
            raise DrainingError("the server is shutting down", retry_after_s=RETRY_AFTER_S)

    def find(self, name: str | None) -> tuple[Service, ModelCard]:
        """The model or adapter that a request names; without a name the model, if it is the only
        one.

        Raises:
            NotFoundError: it is not served here.
            RequestError: none was named, and there are several.
        """
        if name is None:
            service = self._only()
            return service, service.card
        for service in self.services:
            for card in service.cards:
                if name in card.names:
                    return service, card
        raise NotFoundError(
            f"the model {name[:MAX_SHOWN_CHARS]!r} is not served here; GET /v1/models lists what "
            "is",
            param="model",
        )

    def _only(self) -> Service:
        if len(self.services) > 1:
            names = ", ".join(service.name for service in self.services)
            raise RequestError(
                f"this server has several models: name one of them ({names})", param="model"
            )
        return self.services[0]

    def problems(self) -> dict[str, str]:
        """By model, what keeps its engine from making progress; those that do are left out."""
        found = {service.name: service.problem() for service in self.services}
        return {name: problem for name, problem in found.items() if problem is not None}

    async def wait_dead(self) -> None:
        """Return when no model has an engine that could ever serve again."""
        while not all(service.engine.died.is_set() for service in self.services):
            await asyncio.gather(*(service.wait_dead() for service in self.services))

    @property
    def cause_of_death(self) -> str | None:
        """Why all engines are gone; None while one is not."""
        causes = [service.engine.cause_of_death for service in self.services]
        if None in causes:
            return None
        if len(causes) == 1:
            return causes[0]
        named = zip(self.services, causes, strict=True)
        return "; ".join(f"{service.name}: {cause}" for service, cause in named)

    @property
    def num_requests(self) -> int:
        """Requests that an engine has, earlier models' too."""
        engines = (engine for service in self.services for engine in service.engines)
        return sum(len(engine.requests) for engine in engines)

    async def wait_idle(self) -> None:
        """Return when no engine has a request any more."""
        while self.num_requests:
            for service in self.services:
                for engine in service.engines:
                    await engine.requests.wait_idle()

    def abort_all(self) -> None:
        """End every request that an engine has."""
        for service in self.services:
            for engine in service.engines:
                engine.requests.abort_all()
