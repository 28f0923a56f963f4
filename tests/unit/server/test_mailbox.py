from __future__ import annotations

import asyncio

from llmserve.engine.request import FinishReason, RequestOutput
from llmserve.runners.protocol import TokenLogprobs
from llmserve.server.mailbox import MAX_SEPARATE_OUTPUTS, Mailbox


def output(
    name: str, token_id: int, *, choice: int = 0, end: FinishReason | None = None
) -> RequestOutput:
    return RequestOutput(
        request_id=name, choice_index=choice, token_ids=[token_id], finish_reason=end
    )


def test_a_reader_that_is_behind_costs_ids_not_objects() -> None:
    mailbox = Mailbox()
    for index in range(10 * MAX_SEPARATE_OUTPUTS):
        mailbox.put(output("a", index, choice=index % 2))
    mailbox.put(output("a", -1, choice=1, end=FinishReason.LENGTH))
    taken = asyncio.run(mailbox.take())
    assert len(taken) <= MAX_SEPARATE_OUTPUTS + 2
    ids = {0: [], 1: []}
    for out in taken:
        ids[out.choice_index] += out.token_ids
    assert ids[0] == list(range(0, 10 * MAX_SEPARATE_OUTPUTS, 2))
    assert ids[1] == [*range(1, 10 * MAX_SEPARATE_OUTPUTS, 2), -1]
    assert taken[-1].finish_reason is FinishReason.LENGTH


def test_nothing_that_an_output_tells_is_lost_by_joining() -> None:
    mailbox = Mailbox()
    for index in range(MAX_SEPARATE_OUTPUTS):
        mailbox.put(output("other", index))
    mailbox.put(output("a", 1))
    logprobs = [TokenLogprobs(-1.0, ((1, -1.0),))]
    told = RequestOutput(
        "a", 0, [2], logprobs, FinishReason.STOP, 2, 16, 1.5, "error", logprobs, [0.5], [[0.5]], "n"
    )
    assert all(getattr(told, name) for name in RequestOutput.__slots__ if name != "choice_index")
    mailbox.put(told)
    joined = asyncio.run(mailbox.take())[-1]
    for name in RequestOutput.__slots__:
        expected = [1, 2] if name == "token_ids" else getattr(told, name)
        assert getattr(joined, name) == expected, name


def test_the_reader_is_woken_once_something_is_there() -> None:
    async def read() -> list[RequestOutput]:
        mailbox = Mailbox()
        reading = asyncio.create_task(mailbox.take())
        await asyncio.sleep(0)
        assert not reading.done()
        mailbox.put(output("a", 1))
        mailbox.put(output("a", 2))
        return await reading

    assert [out.token_ids for out in asyncio.run(read())] == [[1], [2]]
