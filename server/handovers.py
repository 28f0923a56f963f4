"""An engine's part in handing KV blocks over: writing them when a prompt is computed, reading them
before a request is queued. The memory between is shared by all engines of one loader; who may use
which part of it is decided in the API process (`prefill_pool.py`)."""

from __future__ import annotations

import time
from collections.abc import Iterable

from llmserve.engine.prefix_transfer import ByteArray, PrefixTransfer
from llmserve.engine.request import FinishReason, Request, RequestOutput

from .messages import BlocksMoved, Handover

__all__ = ["Handovers"]


class Handovers:
    """What one engine has to write, and what it did."""

    def __init__(self, transfer: PrefixTransfer, area: ByteArray) -> None:
        self._transfer = transfer
        self._area = area
        self._due: dict[str, tuple[Request, Handover]] = {}
        self._moved: list[BlocksMoved] = []

    def begin(self, request: Request, handover: Handover) -> None:
        """Write the blocks of the prompt when the request has ended."""
        self._due[request.request_id] = (request, handover)

    def take_in(self, request: Request, handover: Handover) -> None:
        """Read blocks into the prefix cache.

        Raises:
            EngineError: they are another prompt's.
        """
        started = time.monotonic()
        num_blocks = self._transfer.write(request, handover.num_blocks, self._part(handover))
        self._note(request.request_id, num_blocks, started)

    def settle(self, outputs: Iterable[RequestOutput]) -> list[BlocksMoved]:
        """Write the blocks of prompts that are done; all hand-overs since the last call."""
        for output in outputs if self._due else ():
            if output.finish_reason is None or output.request_id not in self._due:
                continue
            request, handover = self._due.pop(output.request_id)
            if output.finish_reason is FinishReason.LENGTH:
                started = time.monotonic()
                num_blocks = self._transfer.read(request, self._part(handover))
                self._note(request.request_id, num_blocks, started)
        moved, self._moved = self._moved, []
        return moved

    def _part(self, handover: Handover) -> ByteArray:
        return self._area[handover.start : handover.start + handover.size]

    def _note(self, request_id: str, num_blocks: int, started: float) -> None:
        seconds = time.monotonic() - started
        self._moved.append(BlocksMoved(request_id, num_blocks, started, seconds))
