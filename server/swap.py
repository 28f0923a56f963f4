"""Puts another model in the place of a served one, with no request lost and no reply mixed.

The new model's engines start beside the old ones and prove themselves on a prompt, and where gates
were set on a text (`swap_gate.py`). Only then do new requests go to them; those under way end on
the old weights, which are given up with the last of them. Whatever goes wrong before leaves the old
model serving.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from llmserve.errors import EngineDeadError, LLMServeError

from .available_memory import available_bytes
from .engine_handle import EngineHandle
from .engine_launch import EngineLaunch
from .engines_start import start_engines
from .model_memory import check_fits_beside
from .probes import ask, least_request
from .served_model import Model, open_model
from .server_state import ServerState
from .service import ServedModel, Service
from .settings import ModelSettings, ServerSettings
from .swap_gate import Reading, SwapGate, SwapRefusedError, Verdict

__all__ = ["SwapReport", "Swapper"]

SMOKE_TIMEOUT_S = 60.0
"""Time that a new engine gets for its first tokens."""

_log = logging.getLogger("llmserve.server")

ServeModel = Callable[[ServerSettings, ModelSettings, Model, EngineHandle], ServedModel]


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapReport:
    """What took whose place."""

    model: str
    """The name, which stays."""
    root: str
    """The folder that is served now."""
    fingerprint: str
    previous_fingerprint: str
    verdict: Verdict | None
    """What the gates measured; None: none were set."""


class Swapper:
    """Swaps one server's models, one swap at a time."""

    def __init__(self, state: ServerState, serve_model: ServeModel) -> None:
        """`serve_model` makes what routes work with from an opened model and its engine."""
        self._state = state
        self._serve_model = serve_model
        self._gate = SwapGate(state.settings.swap)
        self._turn = asyncio.Lock()
        self._num_swaps = 0
        self._retiring: set[asyncio.Task[None]] = set()

    async def swap(self, folder: str | None, *, name: str | None = None) -> SwapReport:
        """Serve the model in `folder`; None: the folder that is served, as it is now.

        `name` says in whose place; None: in that of the only model.

        Raises:
            SwapRefusedError: the folder is not allowed or cannot be used, the memory does not hold
                both models, the new one does not answer or is worse than the gates allow, or
                another swap is under way.
            RequestError: no model has that name, or none was given and there are several.
        """
        service, _ = self._state.find(name)
        if self._turn.locked():
            raise SwapRefusedError("another swap is under way: try again when it has ended")
        async with self._turn:
            try:
                return await self._swap(service, self._allowed(service, folder))
            except SwapRefusedError as error:
                _log.warning("no swap: %s", error)
                raise
            except (LLMServeError, TimeoutError) as error:
                _log.warning("no swap: %s", error)
                raise SwapRefusedError(f"the model was not swapped: {error}") from error

    async def close(self) -> None:
        """End what is left of earlier models."""
        for task in self._retiring:
            task.cancel()
        await asyncio.gather(*self._retiring, return_exceptions=True)
        for service in self._state.services:
            for engine in service.retired:
                await engine.close()

    def _allowed(self, service: Service, folder: str | None) -> str:
        """The folder to load, which must lie in the root that the operator set."""
        if folder is None:
            return service.card.root
        root = (
            self._state.settings.swap.root
            or Path(service.started_with.engine.model).resolve().parent
        )
        try:
            path = (root / folder).resolve()
        except (OSError, ValueError) as error:
            raise SwapRefusedError(f"the folder cannot be used: {error}") from error
        if not path.is_relative_to(root.resolve()):
            raise SwapRefusedError(
                "the folder is outside the one that models may be loaded from (see --swap-root)"
            )
        return str(path)

    async def _swap(self, service: Service, folder: str) -> SwapReport:
        old = service.model
        settings = self._settings_for(service, folder)
        model = await asyncio.to_thread(open_model, settings, service.limits)
        if model.checkpoint.config == old.opened.checkpoint.config:
            settings = _with_step_size(settings, old.engine)
        if service.settings.swap.drains:
            verdict = await self._swap_drained(service, settings, model)
        else:
            check_fits_beside(model.checkpoint, settings, available_bytes())
            before = await self._gate.read(old, _shorter(model, old))
            new, verdict = await self._start(settings, model, old, before)
            self._put(service, new)
        _log.info("the model in %s is served now", folder)
        card = service.card
        return SwapReport(
            model=card.names[0],
            root=folder,
            fingerprint=card.fingerprint,
            previous_fingerprint=old.card.fingerprint,
            verdict=verdict,
        )

    async def _swap_drained(
        self, service: Service, settings: ModelSettings, model: Model
    ) -> Verdict | None:
        """Let the old model's requests end and close it before the new one is loaded; new requests
        get 503 meanwhile. Should the new one fail, the old one is loaded again."""
        old = service.model
        before = await self._gate.read(old, _shorter(model, old))
        service.close()
        try:
            await old.engine.requests.wait_idle()
            await old.engine.close()
            try:
                new, verdict = await self._start(settings, model, old, before)
                service.put(new)
            except Exception:
                service.put(await self._start_again(old))
                raise
        except BaseException:
            if service.model is old:
                old.engine.lose("the old model could not be loaded again")
            raise
        finally:
            service.is_loading = False
            service.note_swap()
        return verdict

    async def _start_again(self, old: ServedModel) -> ServedModel:
        again, _ = await self._start(old.settings, old.opened, old, None)
        if again.engine.info != old.engine.info:
            await again.engine.close()
            raise EngineDeadError("the old model's folder holds another model now")
        return again

    async def _start(
        self, settings: ModelSettings, model: Model, old: ServedModel,
        before: Reading | None,
    ) -> tuple[ServedModel, Verdict | None]:  # fmt: skip
        """A model with engines that answer, and what the gates, if there are any, say of it."""
        with EngineLaunch() as launch:
            launch.load(settings.engine)
            engine = await start_engines(
                launch,
                settings.engine,
                limits=self._state.limits,
                num_replicas=settings.num_replicas,
                num_prefill_engines=settings.num_prefill_engines,
            )
            try:
                new = self._serve_model(self._state.settings, settings, model, engine)
                await asyncio.wait_for(ask(engine, [least_request(engine.info)]), SMOKE_TIMEOUT_S)
                verdict = None
                if before is not None:
                    after = await self._gate.read(new, _shorter(model, old))
                    assert after is not None, "a gate for one of two models"
                    verdict = self._gate.compare(before, after)
            except BaseException:
                await engine.close()
                raise
            launch.release()
        return new, verdict

    def _settings_for(self, service: Service, folder: str) -> ModelSettings:
        """Those of the start, for another folder under the names that clients know."""
        settings = service.started_with
        self._num_swaps += 1
        record = settings.engine.record
        engine = msgspec.structs.replace(
            settings.engine,
            model=folder,
            record=None if record is None else f"{record}.swap{self._num_swaps}",
        )
        return replace(settings, engine=engine, names=service.card.names)

    def _put(self, service: Service, new: ServedModel) -> None:
        old = service.engine
        service.put(new)
        service.engine.follow(old)
        service.retired.append(old)
        era = self._state.visitors.begin_era()
        service.note_swap()
        task = asyncio.create_task(self._retire(service, old, era))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def _retire(self, service: Service, engine: EngineHandle, era: int) -> None:
        """Close an engine when everybody is gone who might ask it."""
        await self._state.visitors.wait_left(era)
        await engine.requests.wait_idle()
        await engine.close()
        service.retired.remove(engine)


def _with_step_size(settings: ModelSettings, old: EngineHandle) -> ModelSettings:
    """The step size found for the same shape: trials now would time the old model's work too."""
    if settings.engine.max_batched_tokens is not None:
        return settings
    engine = msgspec.structs.replace(
        settings.engine,
        max_batched_tokens=old.config.max_batched_tokens,
        max_prefill_tokens=old.config.max_prefill_tokens,
        far_token_weight=old.config.far_token_weight,
    )
    return replace(settings, engine=engine)


def _shorter(model: Model, old: ServedModel) -> int:
    """The context that both models have."""
    return min(model.checkpoint.config.max_seq_len, old.engine.config.max_seq_len)
