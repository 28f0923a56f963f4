"""Requests of the server's own: whether an engine answers, and how well its model knows a text."""

from __future__ import annotations

from collections.abc import Sequence

from llmserve.engine.request import FinishReason, Request, RequestOutput, Scoring
from llmserve.errors import EngineError
from llmserve.runners.protocol import RunnerInfo
from llmserve.sampling import SamplingParams

from .engine_handle import EngineHandle
from .mailbox import Mailbox

__all__ = ["PROBE", "ask", "least_request"]

PROBE = "probe"
"""Id of the request that shows whether an engine serves at all; those of clients are longer."""


def least_request(info: RunnerInfo) -> Request:
    """The least that can be asked of a model: a token, or the scores of one."""
    return Request(
        request_id=PROBE,
        prompt_token_ids=[0],
        sampling_params=SamplingParams(max_tokens=1, temperature=0.0),
        seed=0,
        scoring=None if info.head is None else Scoring.LAST,
    )


async def ask(engine: EngineHandle, requests: Sequence[Request]) -> dict[str, RequestOutput]:
    """The last output of each request, all of one choice; their prompts' log-probabilities too.

    Raises:
        OverloadedError: the engine has too much to do.
        EngineError: it failed on one.
    """
    mailbox = Mailbox()
    engine.requests.submit(requests, mailbox)
    ends: dict[str, RequestOutput] = {}
    try:
        while len(ends) < len(requests):
            for output in await mailbox.take():
                if output.finish_reason is FinishReason.ERROR:
                    raise EngineError(output.error or "the engine failed on a probe")
                if output.finish_reason is not None:
                    ends[output.request_id] = output
    finally:
        for request in requests:
            engine.requests.abort(request.request_id)
    return ends
