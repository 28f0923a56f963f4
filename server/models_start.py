"""From settings to a state that routes work with: open the model folders, then start the engines.

Whoever serves does the same here, on a socket of its own (`lifecycle.py`) or inside a cluster
(`cluster_replica.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from .assembly import build_state, check_names
from .engine_handle import EngineHandle
from .engine_launch import EngineLaunch
from .engines_start import start_engines
from .model_memory import check_start
from .served_model import Model, open_model
from .server_state import ServerState
from .settings import ServerSettings
from .swap_gate import read_probe

__all__ = ["open_models", "start_state"]


def open_models(settings: ServerSettings, available_memory: int | None) -> list[Model]:
    """All models, checked; no engine is needed for that.

    Args:
        settings: What to serve and how.
        available_memory: Bytes that the models may take together; None: unknown.

    Raises:
        CheckpointError: a model folder cannot be used.
        ConfigError: a setting cannot be used, or the models do not fit.
    """
    models = [open_model(model, settings.limits) for model in settings.models]
    check_names(settings.models, models)
    check_start(list(zip(settings.models, models, strict=True)), available_memory)
    if settings.swap.probe is not None:
        read_probe(settings.swap.probe)
    return models


async def start_state(
    settings: ServerSettings, models: Sequence[Model], launches: Sequence[EngineLaunch]
) -> ServerState:
    """The state over engines that serve; the first of `launches` is loading its model already.

    One model after the other: each finds its step size while nothing else computes.

    Raises:
        EngineStartError: an engine could not load its model; none is left.
    """
    engines: list[EngineHandle] = []
    async with contextlib.AsyncExitStack() as stack:
        for model, launch in zip(settings.models, launches, strict=True):
            if engines:
                launch.load(model.engine)
            engine = await start_engines(
                launch,
                model.engine,
                limits=settings.limits,
                num_replicas=model.num_replicas,
                num_prefill_engines=model.num_prefill_engines,
            )
            stack.push_async_callback(engine.close)
            engines.append(engine)
        state = build_state(settings, models, engines)
        stack.pop_all()
    return state
