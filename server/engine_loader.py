"""The loader: a process that loads the models once and forks engines from its memory.

Started by `engine_launch.py` as `python -m llmserve.server.engine_loader --fd N`, where N is its
end of a socket pair. Forking shares the packed weights, huge pages and all, costs two milliseconds
and no memory, and leaves nothing to import or to load: so a killed engine is replaced in the time
of a few steps, and replicas have one copy of the weights among them (docs/decisions/0011). The
loader computes nothing itself. Where a model does not survive a fork, as on torch, each engine
loads it anew.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import os
import select
import signal
import socket
import sys
from collections import deque
from dataclasses import replace

from llmserve.errors import ConfigError, EngineError, LLMServeError
from llmserve.runners.registry import import_torch_runner

from .engine_process import ParentGoneError, serve_engine
from .engine_settings import EngineSettings
from .engine_setup import LoadedModels, grammar_compiler, loaded_models, loads_before_fork
from .log_format import start_log
from .messages import (
    Ended,
    Failed,
    Fork,
    Forked,
    Load,
    LoaderCommand,
    LoaderEvent,
    LoadGrammars,
    encode_frame,
    loader_command_decoder,
)

__all__ = ["main"]

RECEIVE_BYTES = 1 << 16
MAX_DESCRIPTORS = 16  # in one message

_log = logging.getLogger("llmserve.engine")


class _Channel:
    """The loader's end of the socket pair: commands and descriptors in, events out."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._decoder = loader_command_decoder()
        self._commands: deque[LoaderCommand] = deque()
        self._descriptors: deque[int] = deque()

    def next(self) -> LoaderCommand:
        """The next command; waits for it.

        Raises:
            ParentGoneError: there is none any more.
        """
        while not self._commands:
            self._receive()
        return self._commands.popleft()

    @property
    def has_command(self) -> bool:
        """Whether `next` would not wait."""
        return bool(self._commands)

    def take_descriptor(self) -> int:
        """The one that came with a `Fork`."""
        if not self._descriptors:
            raise EngineError("a Fork came without a socket")
        return self._descriptors.popleft()

    def close(self) -> None:
        """Close everything: in an engine, where an end held open would hide another's death."""
        self.connection.close()
        while self._descriptors:
            os.close(self._descriptors.popleft())

    def send(self, event: LoaderEvent) -> None:
        """Hand one event over."""
        try:
            self.connection.sendall(encode_frame(event))
        except ConnectionError as error:
            raise ParentGoneError(str(error)) from error

    def _receive(self) -> None:
        try:
            data, descriptors, _, _ = socket.recv_fds(
                self.connection, RECEIVE_BYTES, MAX_DESCRIPTORS
            )
        except ConnectionError as error:
            raise ParentGoneError(str(error)) from error
        self._descriptors += descriptors
        if not data:
            raise ParentGoneError("the API process closed the connection")
        self._commands += self._decoder.feed(data)


class _Loader:
    """Forks engines when told to, and tells how they ended."""

    def __init__(
        self, channel: _Channel, settings: EngineSettings, models: LoadedModels | None
    ) -> None:
        self._channel = channel
        self._settings = settings
        self._models = models
        self._wakeup, self._bell = socket.socketpair()
        for end in (self._wakeup, self._bell):
            end.setblocking(False)

    def run(self) -> None:
        """Until the API process leaves (`ParentGoneError`)."""
        signal.signal(signal.SIGCHLD, lambda *_: None)  # without a handler nothing rings the bell
        signal.set_wakeup_fd(self._bell.fileno(), warn_on_full_buffer=False)
        gc.collect()
        gc.freeze()  # a collection in an engine would write to, and so copy, what is shared
        try:
            while True:
                self._reap()
                if self._channel.has_command or self._is_called():
                    self._apply(self._channel.next())
        finally:
            signal.set_wakeup_fd(-1)  # an engine that ends from here on would ring a closed bell

    def _is_called(self) -> bool:
        ready, _, _ = select.select([self._channel.connection, self._wakeup], [], [])
        if self._wakeup in ready:
            self._wakeup.recv(RECEIVE_BYTES)
        return self._channel.connection in ready

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    return
                self._channel.send(Ended(pid, os.waitstatus_to_exitcode(status)))

    def _apply(self, command: LoaderCommand) -> None:
        match command:
            case Fork():
                self._fork(command)
            case LoadGrammars():
                self._load_grammars()
            case _:
                raise EngineError(f"a Fork is due, not a {type(command).__name__}")

    def _load_grammars(self) -> None:
        """Have engines to come inherit what compiles grammars, as they do the model."""
        models = self._models
        if models is None or models.grammars is not None:
            return  # each engine loads all anew
        try:
            compiler = grammar_compiler(self._settings, models.runner.info, models.stamp)
        except LLMServeError as error:  # engines tell the requests, which is where it matters
            _log.warning("engines will load the compiler of grammars themselves: %s", error)
            return
        self._models = replace(models, grammars=compiler)
        gc.collect()
        gc.freeze()

    def _fork(self, command: Fork) -> None:
        descriptor = self._channel.take_descriptor()
        pid = os.fork()
        if pid == 0:
            self._become_engine(command, descriptor)
        os.close(descriptor)
        self._channel.send(Forked(pid))

    def _become_engine(self, command: Fork, descriptor: int) -> None:
        """In the child: never returns, or the frames above would go on in two processes."""
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for end in (self._channel, self._wakeup, self._bell):
                end.close()
            with socket.socket(fileno=descriptor) as connection:
                code = serve_engine(connection, self._settings, self._models, command)
        finally:
            logging.shutdown()
            os._exit(code)


def main(argv: list[str] | None = None) -> int:
    """Entry of the process; returns its exit code."""
    parser = argparse.ArgumentParser(description="The engines' loader; started by llmserve serve.")
    parser.add_argument("--fd", type=int, required=True, help="inherited socket to the parent")
    connection = socket.socket(fileno=parser.parse_args(argv).fd)
    # The parent decides: it drains on these signals, and the end of its stream ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with connection, contextlib.suppress(ParentGoneError):
        return _load_and_fork(_Channel(connection))
    return 0


def _load_and_fork(channel: _Channel) -> int:
    try:
        load = channel.next()
        if not isinstance(load, Load):
            raise EngineError(f"a Load is due, not a {type(load).__name__}")
        settings = load.settings
        start_log(settings.log_format)
        with contextlib.ExitStack() as stack:
            models = None
            if loads_before_fork(settings):
                models = stack.enter_context(loaded_models(settings))
            elif settings.handover_bytes:
                raise ConfigError(
                    "--prefill-engines needs engines that share memory with their loader: the "
                    "native runner on a CPU, for a draft model too"
                )
            elif settings.runner != "onnx":
                import_torch_runner()
            _Loader(channel, settings, models).run()
    except ParentGoneError:
        raise
    except LLMServeError as error:
        channel.send(Failed(str(error)))
    except Exception as error:
        _log.exception("the loader failed")
        channel.send(Failed(f"{type(error).__name__}: {error}"))
    return 1


if __name__ == "__main__":
    sys.exit(main())
