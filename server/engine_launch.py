"""Starts the loader before there is anything else: it loads the model while this process imports.

Starting a server is mostly importing and reading, and half of that is the loader's, on another
core. So the command line starts its process first and imports the HTTP side after;
`loader_client.py` takes the process over from here. Nothing but the standard library is imported
at the top.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .engine_settings import EngineSettings

__all__ = ["API_KEY_VARIABLE", "EngineLaunch"]

API_KEY_VARIABLE = "LLMSERVE_API_KEY"
"""Environment variable that holds one user key; loader and engines do not get it."""

MODULE = "llmserve.server.engine_loader"


class EngineLaunch:
    """A loader that has forked no engine yet, and our end of the socket pair to it.

    As a context manager it ends the process, if that still runs.
    """

    def __init__(self) -> None:
        """Start the process; it imports, and waits for `load`."""
        self._is_released = False
        self.connection, theirs = socket.socketpair()
        with theirs:
            self.process = _spawn(theirs)

    def load(self, settings: EngineSettings) -> None:
        """Let it load its models; does not wait."""
        from .messages import Load, encode_frame

        # A process that is gone has said why: what it sent is still there to be read.
        with contextlib.suppress(ConnectionError):
            self.connection.sendall(encode_frame(Load(settings)))

    def release(self) -> None:
        """Leave the process to who has taken it over: `close` does nothing any more."""
        self._is_released = True

    def close(self) -> None:
        """End the process and the connection."""
        if self._is_released:
            return
        self.connection.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def __enter__(self) -> EngineLaunch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _spawn(theirs: socket.socket) -> subprocess.Popen[bytes]:
    """The loader, in a group of its own: the terminal's Ctrl-C is for the parent."""
    # The same modules as here, whatever the working folder holds; no keys.
    environment = {name: value for name, value in os.environ.items() if name != API_KEY_VARIABLE}
    environment["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry)
    return subprocess.Popen(  # noqa: S603 - our own interpreter, our own module
        [sys.executable, "-P", "-m", MODULE, "--fd", str(theirs.fileno())],
        pass_fds=[theirs.fileno()],
        process_group=0,
        stdin=subprocess.DEVNULL,
        env=environment,
    )
