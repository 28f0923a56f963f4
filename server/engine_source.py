"""Where one model's engines come from: its loader, which is replaced when it dies, and forks."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time

from llmserve.errors import EngineDeadError

from .engine_client import EngineClient
from .engine_launch import EngineLaunch
from .engine_settings import EngineSettings
from .folder_stamp import stamp_of
from .loader_client import LoaderClient
from .messages import Fork, Ready
from .progress import Progress
from .restarts import Restarts

__all__ = ["EngineSource", "cause_of_death"]

REVIVAL_S = 5.0
"""Least time between two loaders, while no engine needs one at once."""

START_TIMEOUT_S = 300.0
"""Time that a later engine gets to load, where a model does not survive a fork, and to serve."""

_log = logging.getLogger("llmserve.server")


class EngineSource:
    """Starts engines that serve the model, and no other."""

    def __init__(
        self, settings: EngineSettings, ready: Ready, loader: LoaderClient, *, stall_s: float
    ) -> None:
        """`ready` is the first engine's, whose sizes all others get."""
        self._settings = settings
        self._ready = ready
        self._loader = loader
        self._stall_s = stall_s
        self._stamp = stamp_of(settings)
        self._loading = asyncio.Lock()
        self._revived_at = 0.0
        self._has_grammars = False
        self._numbers = itertools.count(1)
        self.slowest_step_s = ready.config.full_step_s or 0.0
        """Of the engine that died last: what the next one is expected to need."""

    async def start(self, place: int = 0) -> EngineClient:
        """An engine that serves, with the sizes of the first; `place` is its replica's index.

        Raises:
            EngineDeadError: it or the loader ended, or the model is not the one it was.
        """
        async with self._loading:
            await self._revive()
            command = Fork(next(self._numbers), self._ready.config, place)
            progress = Progress(stall_s=self._stall_s, slowest_step_s=self.slowest_step_s)
            engine = await self._loader.fork(command, progress)
        try:
            ready = await asyncio.wait_for(asyncio.shield(engine.ready), START_TIMEOUT_S)
            if ready.info != self._ready.info:
                folder = self._settings.model
                raise EngineDeadError(f"the model folder {folder} is not what it was at the start")
        except TimeoutError:
            engine.kill()
            raise EngineDeadError(f"an engine was not ready in {START_TIMEOUT_S:g} s") from None
        except BaseException:
            engine.close()
            raise
        return engine

    async def replace(self, restarts: Restarts, place: int = 0) -> EngineClient:
        """Start an engine, again if it dies at once; `place` as for `start`.

        Raises:
            EngineDeadError: too many have died without a token between.
        """
        while True:
            await asyncio.sleep(restarts.delay_s)
            try:
                return await self.start(place)
            except EngineDeadError as error:
                _log.warning("an engine could not be started: %s", error)
                restarts.death(time.monotonic(), str(error))

    def load_grammars(self) -> None:
        """Have later engines inherit what compiles grammars; does not wait."""
        if not self._has_grammars:
            self._has_grammars = True
            self._loader.load_grammars()

    async def revive_if_due(self) -> None:
        """Start another loader if there is none, though no engine needs it yet."""
        is_due = asyncio.get_running_loop().time() - self._revived_at > REVIVAL_S
        if self._loader.is_gone and is_due:
            async with self._loading:
                with contextlib.suppress(EngineDeadError):  # who needs an engine will say so
                    await self._revive()

    async def status_of(self, engine: EngineClient) -> int | None:
        """How an engine ended; None: nobody knows."""
        return await self._loader.status_of(engine)

    async def end(self, engine: EngineClient) -> None:
        """End an engine when its step is done."""
        await self._loader.end(engine)

    async def close(self) -> None:
        """End the loader."""
        await self._loader.close()

    async def _revive(self) -> None:
        """Start another loader if there is none.

        Raises:
            EngineDeadError: it would load other files than the first, which were verified.
        """
        if not self._loader.is_gone:
            return
        self._revived_at = asyncio.get_running_loop().time()
        await self._loader.close()
        if stamp_of(self._settings) != self._stamp:
            raise EngineDeadError(f"files of {self._settings.model} were changed since the start")
        _log.warning("the loader ended; another loads the model")
        launch = EngineLaunch()
        launch.load(self._settings)
        self._loader = await LoaderClient.take_over(
            launch, handover_bytes=self._settings.handover_bytes
        )
        if self._has_grammars:
            self._loader.load_grammars()


def cause_of_death(engine: EngineClient, status: int | None) -> str:
    """What an engine ended of, for the log."""
    if engine.cause is not None:
        return engine.cause
    if engine.was_killed:
        return "it made no steps"
    if status is None:
        return "for an unknown reason"
    return f"by signal {-status}" if status < 0 else f"with exit status {status}"
