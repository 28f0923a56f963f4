from __future__ import annotations

import asyncio

import pytest

from llmserve.engine.request import FinishReason, Request, RequestOutput
from llmserve.errors import EngineDeadError, OverloadedError
from llmserve.limits import Limits
from llmserve.runners.protocol import TokenLogprobs
from llmserve.sampling import SamplingParams
from llmserve.server.live_requests import DrainRate, LiveRequests
from llmserve.server.mailbox import Mailbox
from llmserve.server.messages import Abort, AddRequest, Command, Finish


def request(name: str, *, n: int = 1, prompt_tokens: int = 3) -> Request:
    return Request(
        request_id=name,
        prompt_token_ids=[1] * prompt_tokens,
        sampling_params=SamplingParams(n=n),
        seed=0,
    )


def output(
    name: str,
    token_id: int,
    *,
    choice: int = 0,
    end: FinishReason | None = None,
    cached: int = 0,
) -> RequestOutput:
    return RequestOutput(
        request_id=name,
        choice_index=choice,
        token_ids=[token_id],
        finish_reason=end,
        num_cached_tokens=cached,
    )


class Table:
    """A table whose commands are kept in a list."""

    def __init__(self, **limits: int) -> None:
        self.sent: list[Command] = []
        self.live = LiveRequests(self.sent.append, limits=Limits(**limits), max_num_seqs=2)
        self.mailbox = Mailbox()

    def submit(self, *requests: Request) -> None:
        self.live.submit(requests, self.mailbox)

    def taken(self) -> list[RequestOutput]:
        return asyncio.run(asyncio.wait_for(self.mailbox.take(), 1))


def test_outputs_reach_the_mailbox_and_are_remembered() -> None:
    table = Table()
    table.submit(request("a", n=2))
    assert [type(command) for command in table.sent] == [AddRequest]
    table.live.deliver([output("a", 8, choice=1, cached=2), output("a", 7, cached=1)])
    table.live.deliver([output("a", 9, end=FinishReason.LENGTH)])
    live = table.live.get("a")
    assert live is not None
    assert live.output_token_ids == [[7, 9], [8]]
    assert live.num_cached_tokens == 1
    assert [out.token_ids for out in table.taken()] == [[8], [7], [9]]
    table.live.deliver([output("a", 5, choice=1, end=FinishReason.STOP)])
    assert table.live.is_idle
    assert table.live.num_sequences == 0
    assert table.live.num_waiting_tokens == 0


def test_tokens_that_come_together_are_read_one_by_one() -> None:
    table = Table()
    table.submit(request("a"))
    told = [TokenLogprobs(-float(token_id), ()) for token_id in (7, 8, 9)]
    table.live.deliver(
        [
            RequestOutput(
                "a",
                0,
                [7, 8, 9],
                told,
                FinishReason.STOP,
                9,
                4,
                0.5,
                prompt_logprobs=told[:1],
            )
        ]
    )
    first, second, last = table.taken()
    assert [one.token_ids for one in (first, second, last)] == [[7], [8], [9]]
    assert [one.logprobs for one in (first, second, last)] == [told[:1], told[1:2], told[2:]]
    assert (first.prompt_logprobs, second.prompt_logprobs, last.prompt_logprobs) == (
        told[:1],
        [],
        [],
    )
    assert first.finish_reason is second.finish_reason is second.stop_token_id is None
    assert (last.finish_reason, last.stop_token_id) == (FinishReason.STOP, 9)
    assert {(one.num_cached_tokens, one.scheduled_time) for one in (first, last)} == {(4, 0.5)}
    assert table.live.is_idle


def test_outputs_after_the_end_are_dropped() -> None:
    table = Table()
    table.submit(request("a", n=2))
    table.live.finish("a", 0)
    assert table.sent[-1] == Finish("a", 0)
    table.live.deliver([output("a", 7), output("b", 7), output("a", 8, choice=1)])
    assert [out.token_ids for out in table.taken()] == [[8]]
    table.live.finish("a", 0)
    assert table.live.num_sequences == 1


def test_abort_ends_every_open_choice_at_once() -> None:
    table = Table()
    table.submit(request("a", n=3))
    table.live.finish("a", 1)
    table.live.abort("a")
    assert table.sent[-1] == Abort("a")
    ends = [(out.choice_index, out.finish_reason) for out in table.taken()]
    assert ends == [(0, FinishReason.ABORT), (2, FinishReason.ABORT)]
    table.live.abort("a")
    assert table.sent.count(Abort("a")) == 1
    assert table.live.is_idle


def test_a_hold_keeps_the_table_from_counting_as_idle() -> None:
    async def main() -> None:
        table = Table()
        table.live.hold()
        table.submit(request("a"))
        idle = asyncio.create_task(table.live.wait_idle())
        table.live.abort("a")
        await asyncio.sleep(0)
        assert not idle.done(), "more of the same is to come"
        table.submit(request("b"))
        table.live.release()
        await asyncio.sleep(0)
        assert not idle.done()
        table.live.abort("b")
        await asyncio.wait_for(idle, 1)

    asyncio.run(main())


def test_fail_all_ends_everything_and_refuses_what_comes() -> None:
    table = Table()
    table.submit(request("a"), request("b"))
    table.live.fail_all("gone")
    assert {(out.request_id, out.error) for out in table.taken()} == {("a", "gone"), ("b", "gone")}
    with pytest.raises(EngineDeadError, match="gone"):
        table.submit(request("c"))


def test_room_is_for_the_batch_and_the_waiting_ones() -> None:
    table = Table(max_waiting_requests=3)
    for name in "abcde":  # two may run, three may wait
        table.submit(request(name))
    with pytest.raises(OverloadedError) as caught:
        table.submit(request("f"))
    assert caught.value.retry_after_s == 1.0
    table.live.abort("a")
    table.submit(request("f"))


def test_all_requests_of_a_call_are_taken_or_none() -> None:
    table = Table(max_waiting_requests=1)
    table.submit(request("a"))
    with pytest.raises(OverloadedError):
        table.submit(request("b"), request("c", n=2))
    assert len(table.live) == 1


def test_waiting_prompt_tokens_are_bounded() -> None:
    table = Table(max_waiting_tokens=10)
    table.submit(request("a", prompt_tokens=8))
    with pytest.raises(OverloadedError):
        table.submit(request("b", prompt_tokens=8))
    table.live.deliver([output("a", 1)])  # a no longer waits
    table.submit(request("b", prompt_tokens=8))


def test_an_idle_server_takes_one_request_of_any_size() -> None:
    table = Table(max_waiting_tokens=1, max_waiting_requests=1)
    table.submit(request("a", n=16, prompt_tokens=100))
    assert table.live.num_sequences == 16


@pytest.mark.parametrize(
    ("ended", "needed", "seconds"), [(0, 5, 1.0), (10, 5, 5.0), (2, 500, 60.0)]
)
def test_retry_after_follows_the_measured_rate(ended: int, needed: int, seconds: float) -> None:
    rate = DrainRate()
    for moment in range(ended):
        rate.count(float(moment))
    assert rate.seconds_for(needed, float(ended)) == seconds
