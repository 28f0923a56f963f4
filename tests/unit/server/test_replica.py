"""Replicas and the router over them, with engines that only note what they are sent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from llmserve.engine.request import FinishReason, Request, RequestOutput
from llmserve.limits import Limits
from llmserve.sampling import SamplingParams
from llmserve.server.engine_client import EngineClient
from llmserve.server.live_requests import LiveRequests
from llmserve.server.mailbox import Mailbox
from llmserve.server.messages import Abort, AddRequest, Command, Outputs
from llmserve.server.poison import CrashCounts
from llmserve.server.progress import Progress
from llmserve.server.replica import Replica
from llmserve.server.router import Router
from support.engines import make_config, make_engine


class NotingEngine(EngineClient):
    """Keeps what it is sent."""

    def __init__(self, number: int) -> None:
        super().__init__(number, Progress(stall_s=1.0))
        self.sent: list[Command] = []

    def send(self, command: Command) -> None:
        self.sent.append(command)

    @property
    def added(self) -> list[str]:
        return [one.request.request_id for one in self.sent if isinstance(one, AddRequest)]


class Places:
    """Some replicas, the table of live requests and the router between them."""

    def __init__(self, count: int) -> None:
        self.crashes = CrashCounts()
        self.requests = LiveRequests(self._send, limits=Limits(), max_num_seqs=8)
        self.replicas = [Replica(index, self.requests, self.crashes) for index in range(count)]
        self.router = Router(self.replicas, make_config(max_num_seqs=8, block_size=4))
        self.mailbox = Mailbox()

    def _send(self, command: Command) -> None:
        request_id = (
            command.request.request_id if isinstance(command, AddRequest) else command.request_id
        )
        live = self.requests.get(request_id)
        assert live is not None
        if isinstance(command, AddRequest):
            live.replica = self.router.choose(command.request).place
        self.replicas[live.replica].send(command, live)

    def submit(self, name: str, prompt: list[int], *, n: int = 1) -> int:
        request = Request(
            request_id=name,
            prompt_token_ids=prompt,
            sampling_params=SamplingParams(n=n),
            seed=0,
            num_cached_tokens=None,
        )
        self.requests.submit([request], self.mailbox)
        live = self.requests.get(name)
        assert live is not None
        return live.replica


def run(test: Callable[[], None]) -> Callable[[], None]:
    """Run a test inside an event loop, which engines belong to."""

    def inside() -> None:
        async def main() -> None:
            test()

        asyncio.run(main())

    inside.__name__ = test.__name__
    return inside


def outputs(*made: RequestOutput) -> Outputs:
    return Outputs(list(made), make_engine().stats(), 0.01)


def token(name: str, token_id: int, choice: int = 0, *, ends: bool = False) -> RequestOutput:
    reason = FinishReason.LENGTH if ends else None
    return RequestOutput(name, choice, [token_id], finish_reason=reason, num_cached_tokens=4)


@run
def test_the_next_engine_takes_up_what_was_delivered() -> None:
    places, (first, second) = Places(1), (NotingEngine(0), NotingEngine(1))
    (replica,) = places.replicas
    replica.fill(first)
    places.submit("a", [1, 2], n=2)
    places.submit("b", [3])
    replica.receive(outputs(token("a", 5), token("a", 6, 1, ends=True)))
    replica.receive(outputs(token("a", 7)))
    replica.vacate()
    places.submit("c", [4])
    assert not first.sent[2:], "an engine that is gone is sent nothing"
    replica.fill(second)
    assert second.added == ["a", "b", "c"]
    request = second.sent[0].request  # type: ignore[union-attr]
    assert request.output_token_ids == [[5, 7], [6]]
    assert request.ended_choices == [1]
    assert request.num_cached_tokens == 4


@run
def test_what_ends_while_there_is_no_engine_is_not_handed_over() -> None:
    places, engine = Places(1), NotingEngine(0)
    places.submit("a", [1])
    places.submit("b", [2])
    places.requests.abort("a")
    places.replicas[0].fill(engine)
    assert engine.added == ["b"]
    places.requests.abort("b")
    assert engine.sent[-1] == Abort("b")


@run
def test_a_suspect_runs_alone_until_it_has_a_token() -> None:
    places, engine = Places(1), NotingEngine(0)
    (replica,) = places.replicas
    for name in ("a", "b", "c"):
        places.submit(name, [1])
    for _ in range(2):
        places.crashes.blame(["b"], alone=None)
    replica.fill(engine)
    places.submit("d", [1])
    assert engine.added == ["b"]
    assert replica.alone == "b"
    replica.receive(outputs(token("b", 5)))
    assert engine.added == ["b", "a", "c", "d"]
    assert replica.alone is None


@run
def test_the_end_of_a_suspect_ends_the_wait_of_the_others() -> None:
    places, engine = Places(1), NotingEngine(0)
    (replica,) = places.replicas
    places.submit("a", [1])
    places.submit("b", [1])
    for _ in range(2):
        places.crashes.blame(["a"], alone=None)
    replica.fill(engine)
    places.requests.abort("a")
    replica.release()
    assert engine.added == ["a", "b"]


@run
def test_equal_beginnings_go_to_one_replica_unless_it_is_busy() -> None:
    places = Places(2)
    for replica in places.replicas:
        replica.fill(NotingEngine(replica.index))
    shared = [9] * 12
    first = places.submit("a", [*shared, 1])
    other = places.submit("x", [3] * 12)
    assert other == 1 - first, "nothing in common: the idle one"
    assert places.submit("b", [*shared, 2]) == first
    # Two requests more than the other has, a quarter of eight sequences, are no reason yet.
    assert [places.submit(name, [*shared, 3]) for name in ("c", "d")] == [first, first]
    assert places.submit("e", [*shared, 4]) == other
    assert places.submit("f", [*shared, 5]) == other, "it has the beginning now, and fewer requests"


@run
def test_a_replica_without_an_engine_gets_nothing_new_and_a_new_engine_has_seen_nothing() -> None:
    places = Places(2)
    for replica in places.replicas:
        replica.fill(NotingEngine(replica.index))
    first = places.submit("a", [9] * 12)
    places.replicas[first].vacate()
    places.router.forget(first)
    assert places.submit("b", [9] * 12) == 1 - first
