"""A place for one engine at a time: what the engine in it was given, and what it is given next.

When an engine has died and another takes the place, everything that was in flight is handed over
with the tokens that were delivered, in the order of its arrival; or a suspect first, alone.
"""

from __future__ import annotations

from .engine_client import EngineClient
from .live_requests import LiveRequest, LiveRequests
from .messages import Abort, AddRequest, Command, Finish, Outputs
from .poison import CrashCounts

__all__ = ["Replica"]


class Replica:
    """One of the places that requests are routed to."""

    def __init__(self, index: int, requests: LiveRequests, crashes: CrashCounts) -> None:
        self.index = index
        self.engine: EngineClient | None = None
        """None while one is being started."""
        self.alone: str | None = None
        """The suspect that runs alone, if one does: nothing else is handed over meanwhile."""
        self.latest: Outputs | None = None
        """What its engine said last, for the statistics."""
        self._requests = requests
        self._crashes = crashes

    @property
    def live(self) -> list[LiveRequest]:
        """Live requests that were routed here, by arrival."""
        return [live for live in self._requests if live.replica == self.index]

    @property
    def has_work(self) -> bool:
        """Whether its engine has a request to compute."""
        number = None if self.engine is None else self.engine.number
        return any(live.engine == number for live in self._requests if live.engine is not None)

    def fill(self, engine: EngineClient) -> None:
        """Put an engine here, and give it all that waits."""
        self.engine = engine
        self.hand_over()

    def vacate(self) -> None:
        """Note that the engine is gone: what it had waits for the next."""
        self.engine = self.alone = None
        for live in self.live:
            live.engine = None

    def hand_over(self) -> None:
        """Give the engine what no engine has: all of it, or one suspect alone."""
        if self.engine is None:
            return
        waiting = [live for live in self.live if live.engine is None and not live.is_prefilling]
        suspects = (live for live in waiting if self._crashes.is_suspect(live.request.request_id))
        suspect = next(suspects, None)
        self.alone = None if suspect is None else suspect.request.request_id
        for live in waiting if suspect is None else [suspect]:
            live.engine = self.engine.number
            self.engine.send(AddRequest(live.resumed()))

    def send(self, command: Command, live: LiveRequest) -> None:
        """Pass on a command about `live`, or keep it from an engine that does not know of it."""
        if self.engine is None or (live.engine is None and self.alone is not None):
            return
        match command:
            case AddRequest():
                live.engine = self.engine.number
                self.engine.send(command)
            case Abort() | Finish():
                self.engine.send(command)

    def receive(self, outputs: Outputs) -> None:
        """Pass on what the engine computed; whatever came on or ended is no suspect any more."""
        self.latest = outputs
        if self._crashes:
            for output in outputs.outputs:
                self._crashes.clear(output.request_id)
        self._requests.deliver(outputs.outputs)
        self.release()

    def release(self) -> None:
        """End the isolation of a suspect that came on, or is not there any more."""
        if self.alone is None:
            return
        if not self._crashes.is_suspect(self.alone) or self._requests.get(self.alone) is None:
            self.hand_over()
