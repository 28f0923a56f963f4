"""What the API process says to the loader and to its engines, and they to it, and how it is framed.

Frames over a Unix socket: four bytes of length, then one tagged message in msgpack. The types are
the engine's own; nothing is pickled, and a frame that does not fit its type is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

import msgspec

from llmserve.engine.block_map import BlockMap
from llmserve.engine.config import EngineConfig
from llmserve.engine.engine import EngineStats
from llmserve.engine.request import Request, RequestOutput
from llmserve.engine.step import StepWork
from llmserve.errors import EngineError
from llmserve.runners.protocol import RunnerInfo

from .engine_settings import EngineSettings

__all__ = [
    "Abort",
    "AddRequest",
    "BlockMaps",
    "BlocksMoved",
    "Command",
    "Computing",
    "Ended",
    "EngineCommand",
    "Event",
    "Failed",
    "Finish",
    "Fork",
    "Forked",
    "FrameDecoder",
    "Handover",
    "Inspect",
    "Load",
    "LoadGrammars",
    "LoaderCommand",
    "LoaderEvent",
    "Outputs",
    "Prefill",
    "Ready",
    "command_decoder",
    "encode_frame",
    "event_decoder",
    "loader_command_decoder",
    "loader_event_decoder",
]

MAX_FRAME_BYTES = 256 << 20
LENGTH_BYTES = 4


class Load(msgspec.Struct, tag="load"):
    """To the loader, first: load this."""

    settings: EngineSettings


class Fork(msgspec.Struct, tag="fork"):
    """To the loader: start an engine. Its end of a socket pair comes with the frame.

    The first one comes when the API process has its own start behind it: what that costs would be
    in the times of the steps otherwise.
    """

    number: int
    """Engines of this server that were started before it."""
    config: EngineConfig | None = None
    """The sizes that the first engine found; None: this is the first, find them."""
    place: int = 0
    """Which of the replicas it is, from 0: devices are dealt out by it."""


class LoadGrammars(msgspec.Struct, tag="load-grammars"):
    """To the loader: requests with grammars come, so let later engines inherit what compiles them.

    The one that serves now loads it itself; a server without such requests never does.
    """


class Forked(msgspec.Struct, tag="forked"):
    """From the loader: an engine has begun. Its first message comes over its own socket."""

    pid: int


class Ended(msgspec.Struct, tag="ended"):
    """From the loader: an engine process is no more."""

    pid: int
    status: int
    """Its exit code, or the signal that ended it, negative."""


class Handover(msgspec.Struct, frozen=True):
    """Where the KV blocks of a prompt's beginning lie in the memory shared by engines."""

    start: int
    """First byte."""
    size: int
    """Bytes that are set aside for it."""
    num_blocks: int = 0
    """Full blocks of the prompt that are there."""


class AddRequest(msgspec.Struct, tag="add"):
    """Queue a request."""

    request: Request
    handover: Handover | None = None
    """Blocks of its prompt, to be taken into the prefix cache first."""


class Prefill(msgspec.Struct, tag="prefill"):
    """Compute a prompt and draw nothing, then copy its KV blocks to where `handover` says."""

    request: Request
    """It has no tokens to draw."""
    handover: Handover


class Abort(msgspec.Struct, tag="abort"):
    """End every choice of a request; its last outputs follow."""

    request_id: str


class Finish(msgspec.Struct, tag="finish"):
    """End one choice whose text met a stop string; no output follows."""

    request_id: str
    choice_index: int


class Inspect(msgspec.Struct, tag="inspect"):
    """Ask who holds which KV blocks; `BlockMaps` answers between two steps."""


class Ready(msgspec.Struct, tag="ready"):
    """The first event of an engine that serves."""

    info: RunnerInfo
    config: EngineConfig
    draft_info: RunnerInfo | None = None
    """Of the model that guesses, where there is one."""


class Computing(msgspec.Struct, tag="computing"):
    """Before a step: those of its requests that have had no output from this engine yet, and those
    whose grammars are being compiled.

    Said only when they are not the same as before, so decoding costs no message.
    """

    request_ids: list[str]


class BlocksMoved(msgspec.Struct, frozen=True):
    """That an engine has written a prompt's KV blocks to shared memory, or read them from there."""

    request_id: str
    num_blocks: int
    """Written: the prompt's full blocks that they stand for; read: those that were not there yet,
    all pools together."""
    started: float
    """When it began, by `time.monotonic`."""
    seconds: float
    """What it took."""


class Outputs(msgspec.Struct, tag="outputs"):
    """What one step did."""

    outputs: list[RequestOutput]
    stats: EngineStats
    step_s: float
    """How long the step took."""
    started: float = 0.0
    """When it began, by `time.monotonic`."""
    work: StepWork | None = None
    """What it computed; None: nothing."""
    moved: list[BlocksMoved] = []
    """Hand-overs since the step before."""


class BlockMaps(msgspec.Struct, tag="block_maps"):
    """The answer to `Inspect`: one for each pool."""

    maps: list[BlockMap]


class Failed(msgspec.Struct, tag="failed"):
    """The last event of a loader or an engine that cannot start or go on."""

    message: str


LoaderCommand = Load | Fork | LoadGrammars
LoaderEvent = Forked | Ended | Failed
Command = AddRequest | Abort | Finish
EngineCommand = Command | Prefill | Inspect
Event = Ready | Computing | Outputs | BlockMaps | Failed

_encoder = msgspec.msgpack.Encoder()
T = TypeVar("T")


def encode_frame(message: EngineCommand | Event | LoaderCommand | LoaderEvent) -> bytes:
    """One message with its length in front."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise EngineError(f"a message of {len(body)} bytes is above {MAX_FRAME_BYTES}")
    return len(body).to_bytes(LENGTH_BYTES, "big") + body


class FrameDecoder(Generic[T]):
    """Bytes as they arrive, cut into messages of one type."""

    def __init__(self, decoder: msgspec.msgpack.Decoder[T]) -> None:
        self._decoder = decoder
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[T]:
        """Messages completed by `data`; the rest is kept for the next call.

        Raises:
            EngineError: a frame that is too long or is no message of the type.
        """
        self._buffer += data
        start = 0
        try:
            while (end := self._end_of_frame(start)) is not None:
                body = memoryview(self._buffer)[start + LENGTH_BYTES : end]
                start = end
                yield self._decode(body)
        finally:
            del self._buffer[:start]

    def _end_of_frame(self, start: int) -> int | None:
        head = self._buffer[start : start + LENGTH_BYTES]
        if len(head) < LENGTH_BYTES:
            return None
        length = int.from_bytes(head, "big")
        if length > MAX_FRAME_BYTES:
            raise EngineError(f"a frame of {length} bytes is above {MAX_FRAME_BYTES}")
        end = start + LENGTH_BYTES + length
        return end if end <= len(self._buffer) else None

    def _decode(self, body: memoryview) -> T:
        try:
            return self._decoder.decode(body)
        except msgspec.MsgspecError as error:
            raise EngineError(f"a message could not be read: {error}") from error
        finally:
            body.release()  # else the buffer could not shrink


def command_decoder() -> FrameDecoder[EngineCommand]:
    """For the engine process."""
    return FrameDecoder(msgspec.msgpack.Decoder(EngineCommand))


def event_decoder() -> FrameDecoder[Event]:
    """For the API process."""
    return FrameDecoder(msgspec.msgpack.Decoder(Event))


def loader_command_decoder() -> FrameDecoder[LoaderCommand]:
    """For the loader."""
    return FrameDecoder(msgspec.msgpack.Decoder(LoaderCommand))


def loader_event_decoder() -> FrameDecoder[LoaderEvent]:
    """For the API process."""
    return FrameDecoder(msgspec.msgpack.Decoder(LoaderEvent))
