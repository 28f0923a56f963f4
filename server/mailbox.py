"""Where the outputs of a request wait for who reads them: a reader that stalls costs ids alone."""

from __future__ import annotations

import asyncio

from llmserve.engine.request import RequestOutput

__all__ = ["Mailbox"]

MAX_SEPARATE_OUTPUTS = 256
"""Outputs kept apart for a reader that is behind; beyond it those of one choice are joined."""


class Mailbox:
    """Outputs on their way to one reader, in order of arrival."""

    def __init__(self) -> None:
        self._outputs: list[RequestOutput] = []
        self._reader: asyncio.Future[None] | None = None

    def put(self, output: RequestOutput) -> None:
        """Add an output and wake the reader. Never waits."""
        if len(self._outputs) >= MAX_SEPARATE_OUTPUTS and self._join(output):
            return
        self._outputs.append(output)
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def take(self) -> list[RequestOutput]:
        """All outputs that have arrived, at least one. For one reader at a time."""
        while not self._outputs:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        taken, self._outputs = self._outputs, []
        return taken

    def _join(self, output: RequestOutput) -> bool:
        """Append to the last output of the same choice: a stalled reader costs ids, not objects."""
        for earlier in reversed(self._outputs):
            if (earlier.request_id, earlier.choice_index) == (
                output.request_id,
                output.choice_index,
            ):
                earlier.token_ids += output.token_ids
                earlier.logprobs += output.logprobs
                earlier.prompt_logprobs += output.prompt_logprobs
                earlier.num_cached_tokens = output.num_cached_tokens
                earlier.scheduled_time = output.scheduled_time
                earlier.finish_reason = output.finish_reason
                earlier.stop_token_id = output.stop_token_id
                earlier.error = output.error
                earlier.vector = output.vector
                earlier.scores = output.scores
                earlier.error_param = output.error_param
                return True
        return False
