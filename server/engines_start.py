"""The first engines of a model: what their loader says is wrong ends the start."""

from __future__ import annotations

from llmserve.errors import EngineDeadError, LLMServeError
from llmserve.limits import Limits

from .engine_launch import EngineLaunch
from .engine_settings import EngineSettings
from .engine_source import EngineSource
from .loader_client import LoaderClient
from .messages import Fork
from .progress import Progress
from .supervisor import Supervisor

__all__ = ["EngineStartError", "start_engines"]


class EngineStartError(LLMServeError):
    """The first engine could not load what it was told to; the message is its own."""


async def start_engines(
    launch: EngineLaunch,
    settings: EngineSettings,
    *,
    limits: Limits,
    num_replicas: int = 1,
    num_prefill_engines: int = 0,
) -> Supervisor:
    """Take over a loader that was told to load `settings`, and wait until all engines serve.

    Engines that only read prompts come on top of the replicas.

    Raises:
        EngineStartError: one said why it cannot, or ended without a word.
    """
    loader = await LoaderClient.take_over(launch, handover_bytes=settings.handover_bytes)
    try:
        first = await loader.fork(Fork(0), Progress(stall_s=limits.engine_stall_s))
        ready = await first.ready
        supervisor = Supervisor(
            ready,
            source=EngineSource(settings, ready, loader, stall_s=limits.engine_stall_s),
            limits=limits,
            num_replicas=num_replicas,
            num_prefill_engines=num_prefill_engines,
        )
        await supervisor.begin(first)
    except EngineDeadError as error:
        await loader.close()
        raise EngineStartError(str(error)) from error
    except BaseException:
        await loader.close()
        raise
    return supervisor
