"""From opened model folders and the engines that run them to what routes work with."""

from __future__ import annotations

from collections.abc import Sequence

from llmserve.errors import ConfigError

from .engine_handle import EngineHandle
from .metrics import ServerMetrics
from .model_card import ModelCard, names_of
from .model_metrics import ModelMetrics
from .prompts import PromptReader
from .served_model import Model
from .server_state import ServerState
from .service import ServedModel, Service
from .settings import ModelSettings, ServerSettings
from .trace_export import open_export
from .traces import TraceStore

__all__ = ["build_state", "check_names", "serve_model"]


def check_names(settings: Sequence[ModelSettings], models: Sequence[Model]) -> None:
    """Raise `ConfigError` where two models or adapters would go by one name."""
    taken: set[str] = set()
    for asked, model in zip(settings, models, strict=True):
        names = [*names_of(model.checkpoint, asked), *(one.name for one in model.adapters)]
        if doubled := taken.intersection(names):
            raise ConfigError(
                f"two models go by the name {min(doubled)!r}: give one another, as "
                f"NAME={asked.engine.model}"
            )
        taken.update(names)


def build_state(
    settings: ServerSettings, models: Sequence[Model], engines: Sequence[EngineHandle]
) -> ServerState:
    """Everything that the routes work with, over an engine for each of the models."""
    traces = TraceStore()
    services = tuple(
        _build_service(settings, started_with, model, engine, traces)
        for started_with, model, engine in zip(settings.models, models, engines, strict=True)
    )
    return ServerState(
        settings=settings,
        services=services,
        metrics=ServerMetrics(
            [service.metrics for service in services], prefix=settings.metrics_prefix
        ),
        traces=traces,
        spans=None if settings.otlp_endpoint is None else open_export(settings.otlp_endpoint),
    )


def _build_service(
    settings: ServerSettings,
    started_with: ModelSettings,
    model: Model,
    engine: EngineHandle,
    traces: TraceStore,
) -> Service:
    served = serve_model(settings, started_with, model, engine)
    service = Service(
        settings=settings,
        started_with=started_with,
        model=served,
        metrics=ModelMetrics(
            lambda: service.engine,
            prefix=settings.metrics_prefix,
            model_name=served.card.names[0],
        ),
        traces=traces,
    )
    service.put(served)
    return service


def serve_model(
    settings: ServerSettings, started_with: ModelSettings, model: Model, engine: EngineHandle
) -> ServedModel:
    """A model that an engine has loaded, as the routes see it."""
    prompts = PromptReader(
        model.tokenizer,
        model.template,
        max_seq_len=engine.config.max_seq_len,
        limits=settings.limits,
    )
    card = ModelCard.of(
        model.checkpoint,
        started_with,
        engine,
        has_chat_template=prompts.has_template,
        records=model.records,
    )
    return ServedModel(
        settings=started_with,
        opened=model,
        engine=engine,
        tokenizer=model.tokenizer,
        prompts=prompts,
        card=card,
        adapter_cards=tuple(map(card.with_adapter, model.adapters)),
    )
