"""What rank 0 tells the other ranks of a model, and what they tell it: typed msgpack in frames.

What all compute is told here; the numbers that they exchange meanwhile go through collectives
(`torch_collectives.py`). A frame is its body's length, eight bytes, and the body. The end of the
stream is the end of the group.
"""

from __future__ import annotations

import socket
from typing import TypeVar

import msgspec
import numpy as np

from ..errors import EngineError
from .protocol import Batch, GroupTables, IntArray

__all__ = [
    "Allocate",
    "Command",
    "Failed",
    "Integers",
    "Load",
    "Loaded",
    "Logits",
    "Meet",
    "RankEvent",
    "Step",
    "StreamEndError",
    "Tables",
    "batch_of",
    "encode",
    "receive_command",
    "receive_event",
    "step_of",
]

_LENGTH_BYTES = 8
_MAX_BYTES = 1 << 30
"""No step is near it: what claims to be longer is no message."""


class StreamEndError(EngineError):
    """The other end was closed: its process has ended, or is about to."""


class Load(msgspec.Struct, tag="load", frozen=True, kw_only=True):
    """The first command: what to load."""

    folder: str
    """The model folder."""
    rank: int
    count: int
    """Ranks of the group."""
    dtype: str | None
    """Type of the arithmetic; None: as the folder says."""
    cache_dtype: str
    """Type of keys and values."""
    device: str
    threads: int
    """Threads of a step."""
    adapters: dict[str, str]
    """Folders of LoRA adapters by name, in the order of their ids."""


class Meet(msgspec.Struct, tag="meet", frozen=True):
    """Meet the other ranks, which have all loaded their parts."""

    meeting: str
    """Path of the file through which they find each other."""
    timeout_s: float
    """Longest time that one waits for another, now and in the midst of a step."""


class Allocate(msgspec.Struct, tag="allocate", frozen=True):
    """Make the KV cache: as `Runner.allocate_cache`."""

    num_blocks: tuple[int, ...]
    block_size: int


class Integers(msgspec.Struct, frozen=True):
    """An array of int64."""

    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, values: IntArray) -> Integers:
        """A copy of `values`."""
        return cls(values.shape, values.astype("<i8", copy=False).tobytes())

    def array(self) -> IntArray:
        """A copy that may be written to."""
        return np.frombuffer(self.data, "<i8").reshape(self.shape).astype(np.int64)


class Tables(msgspec.Struct, frozen=True):
    """A `GroupTables`."""

    slot_mapping: Integers
    block_tables: Integers
    block_copies: Integers


class Step(msgspec.Struct, tag="step", frozen=True, kw_only=True):
    """Compute a step's hidden states: what a `Batch` holds but for what is made of them."""

    token_ids: Integers
    positions: Integers
    cu_seqlens: Integers
    context_lens: Integers
    groups: list[Tables]
    adapter_ids: Integers | None


class Logits(msgspec.Struct, tag="logits", frozen=True):
    """Take part in computing the logits of so many rows, which rank 0 gives to all."""

    num_rows: int


class Loaded(msgspec.Struct, tag="loaded", frozen=True):
    """The first event: the weights are there."""

    fingerprint: str
    """Of what was loaded, adapters included."""
    weight_bytes: int
    """Bytes of the rank's part."""


class Failed(msgspec.Struct, tag="failed", frozen=True):
    """The last event of a rank that cannot go on."""

    message: str


Command = Load | Meet | Allocate | Step | Logits
RankEvent = Loaded | Failed

_encoder = msgspec.msgpack.Encoder()
_commands: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
_events: msgspec.msgpack.Decoder[RankEvent] = msgspec.msgpack.Decoder(RankEvent)
T = TypeVar("T")


def step_of(batch: Batch) -> Step:
    """What other ranks must know of a batch."""
    ids = batch.adapter_ids
    return Step(
        token_ids=Integers.of(batch.token_ids),
        positions=Integers.of(batch.positions),
        cu_seqlens=Integers.of(batch.cu_seqlens),
        context_lens=Integers.of(batch.context_lens),
        groups=[
            Tables(*map(Integers.of, (one.slot_mapping, one.block_tables, one.block_copies)))
            for one in batch.groups
        ],
        adapter_ids=None if ids is None else Integers.of(ids),
    )


def batch_of(step: Step) -> Batch:
    """The batch of which nothing is asked but its keys, values and hidden states."""
    return Batch(
        token_ids=step.token_ids.array(),
        positions=step.positions.array(),
        cu_seqlens=step.cu_seqlens.array(),
        context_lens=step.context_lens.array(),
        groups=[
            GroupTables(
                slot_mapping=one.slot_mapping.array(),
                block_tables=one.block_tables.array(),
                block_copies=one.block_copies.array(),
            )
            for one in step.groups
        ],
        logits_indices=np.empty(0, np.int64),
        sampling=[],
        adapter_ids=None if step.adapter_ids is None else step.adapter_ids.array(),
    )


def encode(message: Command | RankEvent) -> bytes:
    """The frame of one message."""
    body = _encoder.encode(message)
    return len(body).to_bytes(_LENGTH_BYTES, "big") + body


def receive_command(connection: socket.socket) -> Command:
    """Wait for the next command of rank 0.

    Raises:
        StreamEndError: there is none any more.
        EngineError: what came is no command.
    """
    return _receive(connection, _commands)


def receive_event(connection: socket.socket) -> RankEvent:
    """Wait for the next event of another rank, as long as the socket's timeout allows.

    Raises:
        StreamEndError: there is none any more.
        EngineError: what came is no event.
        TimeoutError: none came in time.
    """
    return _receive(connection, _events)


def _receive(connection: socket.socket, decoder: msgspec.msgpack.Decoder[T]) -> T:
    length = int.from_bytes(_read(connection, _LENGTH_BYTES), "big")
    if length > _MAX_BYTES:
        raise EngineError(f"a frame of {length} bytes is above {_MAX_BYTES}")
    body = _read(connection, length)
    try:
        return decoder.decode(body)
    except msgspec.MsgspecError as error:
        raise EngineError(f"a message could not be read: {error}") from error


def _read(connection: socket.socket, count: int) -> bytearray:
    data = bytearray(count)
    view = memoryview(data)
    while view:
        try:
            num_read = connection.recv_into(view)
        except ConnectionError as error:
            raise StreamEndError(str(error)) from error
        if not num_read:
            raise StreamEndError("the connection was closed")
        view = view[num_read:]
    return data
