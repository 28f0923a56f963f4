"""The processes of the ranks beside rank 0: started, talked to, and never outlived.

Each has one end of a socket pair. It ends when that is closed, so also when this process is killed.
Its own death is noticed here at the next message or in the collective under way; where that would
wait for ever (NCCL), by a thread that does nothing but watch.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import EngineError
from .rank_messages import Command, Failed, Load, Loaded, StreamEndError, encode, receive_event

__all__ = ["PEER_TIMEOUT_S", "RankProcess", "Ranks", "when_closed"]

MODULE = "llmserve.runners.torch_rank"

LOAD_TIMEOUT_S = 600.0
"""Time that a rank gets to load its part, after which it counts as stuck."""

PEER_TIMEOUT_S = 60.0
"""Time that one rank waits for another in the midst of a step. They compute equally much, so what
is waited for is a machine that is busy with something else."""

END_TIMEOUT_S = 5.0
"""Time a process gets to end after its connection was closed, before it is killed."""

CAUSE_TIMEOUT_S = 1.0
"""Time that the news of how a rank ended gets after it was lost."""


@dataclass(frozen=True, slots=True)
class RankProcess:
    """One rank beside rank 0."""

    index: int
    connection: socket.socket
    process: subprocess.Popen[bytes]

    @classmethod
    def start(cls, index: int) -> RankProcess:
        """A process that imports, and waits for `Load`."""
        ours, theirs = socket.socketpair()
        with theirs:
            return cls(index, ours, _spawn(theirs))

    def end(self) -> None:
        """Close the connection and see the process end; kill it if it does not."""
        self.connection.close()
        try:
            self.process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def cause_of_death(self) -> str | None:
        """How it ended, in its own words where it had any; None: it lives."""
        status = self.process.poll()
        if status is None:
            return None
        with contextlib.suppress(EngineError):
            while True:  # up to the end of what it has said
                event = receive_event(self.connection)
                if isinstance(event, Failed):
                    return event.message
        return f"by signal {-status}" if status < 0 else f"with exit status {status}"


class Ranks:
    """All ranks of a group but rank 0, as rank 0 knows them."""

    def __init__(self, count: int, start: Callable[[int], RankProcess] = RankProcess.start) -> None:
        """Start ranks 1 to `count - 1`."""
        self._ranks: list[RankProcess] = []
        self._loss: str | None = None
        self._is_torn = False
        self._watch: threading.Thread | None = None
        try:
            for index in range(1, count):
                self._ranks.append(start(index))
        except BaseException:
            self.close()
            raise

    def load(self, commands: Sequence[Load]) -> None:
        """Let each load its part, in the order of the ranks; does not wait.

        Raises:
            EngineError: one of them is gone.
        """
        for one, command in zip(self._ranks, commands, strict=True):
            self._send(one, encode(command))

    def wait_loaded(self) -> list[Loaded]:
        """What each of them has loaded.

        Raises:
            EngineError: one of them could not load, or is gone.
        """
        return [self._wait_loaded(one) for one in self._ranks]

    def tell(self, command: Command) -> None:
        """Say one thing to all.

        Raises:
            EngineError: one of them is gone; nothing can be computed any more.
        """
        self.check()
        frame = encode(command)
        for one in self._ranks:
            self._send(one, frame)

    def lost(self, error: Exception) -> EngineError:
        """Give the group up because a rank did not do its part; what is to be raised."""
        deadline = time.monotonic() + CAUSE_TIMEOUT_S
        causes: dict[int, str] = {}
        while not causes and time.monotonic() < deadline:
            time.sleep(0.01)
            told = {one.index: one.cause_of_death() for one in self._ranks}
            causes = {index: cause for index, cause in told.items() if cause}
        each = [f"rank {index} ended: {cause}" for index, cause in causes.items()]
        self.give_up("; ".join(each) or str(error))
        return EngineError(f"the model's ranks are lost, load it anew: {self._loss}")

    def give_up(self, reason: str) -> None:
        """End them all: what went different ways cannot be told to go on together."""
        self._loss = self._loss or reason
        for one in self._ranks:  # all at once, and the thread that watches is woken
            with contextlib.suppress(OSError):
                one.connection.shutdown(socket.SHUT_RDWR)
        if self._watch is not None:
            self._watch.join()
        for one in self._ranks:
            one.end()
        self._ranks, self._watch = [], None

    def close(self) -> None:
        """End them all. Again: nothing."""
        self.give_up("the runner was closed")

    def check(self) -> None:
        """Raise `EngineError` if a rank that is watched is gone, or all were given up."""
        if self._loss is None and self._is_torn:
            raise self.lost(EngineError("a connection was closed"))
        if self._loss is not None:
            raise EngineError(f"the model's ranks are lost, load it anew: {self._loss}")

    def watch(self, act: Callable[[], None]) -> None:
        """Call `act` from another thread as soon as one of them is gone, or all are given up.

        What was computed then is worth nothing: `check` says so.
        """

        def lose() -> None:
            self._is_torn = True
            act()

        self._watch = when_closed([one.connection for one in self._ranks], lose)

    def _wait_loaded(self, one: RankProcess) -> Loaded:
        self.check()
        one.connection.settimeout(LOAD_TIMEOUT_S)
        try:
            event = receive_event(one.connection)
        except (StreamEndError, TimeoutError) as error:
            raise self.lost(error) from error
        one.connection.settimeout(PEER_TIMEOUT_S)
        if isinstance(event, Failed):
            self.give_up(event.message)
            raise EngineError(f"rank {one.index} of the model could not load: {event.message}")
        return event

    def _send(self, one: RankProcess, frame: bytes) -> None:
        try:
            one.connection.sendall(frame)
        except OSError as error:
            raise self.lost(error) from error


def when_closed(connections: Sequence[socket.socket], act: Callable[[], None]) -> threading.Thread:
    """Call `act` from a thread when the other end of one of `connections` is closed.

    Shutting down this end counts as well: that is how the thread is ended.
    """
    poll = select.poll()
    for connection in connections:
        poll.register(connection, 0)  # nothing but what is always told: that it is over

    def wait() -> None:
        poll.poll()
        act()

    thread = threading.Thread(target=wait, name="rank-watch", daemon=True)
    thread.start()
    return thread


def _spawn(theirs: socket.socket) -> subprocess.Popen[bytes]:
    """The process, in a group of its own: the terminal's Ctrl-C is for rank 0."""
    # The same modules as here, whatever the working folder holds.
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return subprocess.Popen(  # noqa: S603 - our own interpreter, our own module
        [sys.executable, "-P", "-m", MODULE, "--fd", str(theirs.fileno())],
        pass_fds=[theirs.fileno()],
        process_group=0,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": path},
    )
