"""Where prompts go and who may use the shared bytes, with engines that only note what they get."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from llmserve.engine.request import FinishReason, Request, RequestOutput
from llmserve.limits import Limits
from llmserve.sampling import SamplingParams
from llmserve.server.engine_client import EngineClient
from llmserve.server.live_requests import LiveRequest, LiveRequests
from llmserve.server.mailbox import Mailbox
from llmserve.server.messages import (
    Abort,
    BlocksMoved,
    EngineCommand,
    Handover,
    Outputs,
    Prefill,
    Ready,
)
from llmserve.server.prefill_pool import PrefillPool
from llmserve.server.progress import Progress
from llmserve.server.restarts import Restarts
from llmserve.server.shared_ranges import SharedRanges
from support.engines import make_config, make_engine, make_info

BLOCK = 4
PROMPT = list(range(1, 31))
NUM_BLOCKS = len(PROMPT) // BLOCK
SIZE = 32 + NUM_BLOCKS * BLOCK * 8


class NotingEngine(EngineClient):
    """Keeps what it is sent."""

    def __init__(self, number: int, ranges: SharedRanges) -> None:
        super().__init__(number, Progress(stall_s=1.0))
        self.ranges = ranges
        self.sent: list[EngineCommand] = []

    def send(self, command: EngineCommand) -> None:
        self.sent.append(command)


class Stage:
    """One engine that reads, one that writes, and memory for two prompts between them."""

    def __init__(self, *, num_bytes: int = 2 * SIZE) -> None:
        ranges = SharedRanges(num_bytes)
        self.writer: NotingEngine | None = NotingEngine(0, ranges)
        self.reader = NotingEngine(1, ranges)
        self.passed: list[tuple[str, Handover | None]] = []
        self.requests = LiveRequests(lambda _: None, limits=Limits(), max_num_seqs=8)
        ready = Ready(make_info(), make_config(block_size=BLOCK))
        self.pool = PrefillPool(
            1,
            None,
            ready,
            self.requests,
            self._pass_on,
            lambda _: None,  # type: ignore[arg-type]
        )
        self.place = self.pool.places[0]
        self.place.engine = self.reader

    def _pass_on(self, live: LiveRequest, handover: Handover | None) -> EngineClient | None:
        self.passed.append((live.request.request_id, handover))
        return self.writer

    def begin(
        self, name: str, *, prompt: list[int] = PROMPT, num_known: int = 0, **params: int
    ) -> bool:
        request = Request(
            request_id=name,
            prompt_token_ids=prompt,
            sampling_params=SamplingParams(**params),  # type: ignore[arg-type]
            seed=0,
        )
        self.requests.submit([request], Mailbox())
        live = self.requests.get(name)
        assert live is not None
        return self.pool.begin(live, self.writer, num_known)

    def end(self, name: str, reason: FinishReason, num_blocks: int) -> None:
        """The reader says that it is done with a prompt."""
        moved = [BlocksMoved(name, num_blocks, 0.0, 0.5)] if num_blocks else []
        output = RequestOutput(name, 0, finish_reason=reason)
        outputs = Outputs([output], make_engine().stats(), 0.01, moved=moved)
        self.pool._receive(self.place, Restarts(), outputs)

    def read(self, name: str) -> None:
        """The writer says that it has taken the blocks in."""
        moved = [BlocksMoved(name, NUM_BLOCKS, 0.0, 0.25)]
        self.pool.note_read(Outputs([], make_engine().stats(), 0.01, moved=moved))


def run(test: Callable[[], None]) -> Callable[[], None]:
    """Run a test inside an event loop, which engines belong to."""

    def inside() -> None:
        async def main() -> None:
            test()

        asyncio.run(main())

    inside.__name__ = test.__name__
    return inside


@run
def test_a_prompt_is_read_without_its_end_and_its_bytes_are_kept_until_the_writer_has_them() -> (
    None
):
    stage = Stage()
    assert stage.begin("a", n=3)
    (command,) = stage.reader.sent
    assert isinstance(command, Prefill)
    assert command.request.prompt_token_ids == PROMPT[: NUM_BLOCKS * BLOCK]
    assert command.request.sampling_params == SamplingParams(max_tokens=0)
    assert stage.begin("b")
    assert not stage.begin("no room")
    stage.end("a", FinishReason.LENGTH, NUM_BLOCKS)
    assert stage.passed == [("a", Handover(0, SIZE, NUM_BLOCKS))]
    assert not stage.begin("no room yet")
    stage.read("a")
    assert stage.begin("c")
    totals = stage.pool.totals
    assert (totals.num_requests, totals.num_blocks, totals.seconds) == (1, NUM_BLOCKS, 0.75)


@run
def test_what_is_short_or_known_or_reads_its_prompt_goes_straight_to_the_writer() -> None:
    stage = Stage()
    assert not stage.begin("short", prompt=PROMPT[:15])
    assert not stage.begin("known", num_known=NUM_BLOCKS - 3)
    assert not stage.begin("scored", prompt_logprobs=1)
    stage.place.engine = None
    assert not stage.begin("nobody reads")
    stage.place.engine = NotingEngine(2, SharedRanges(2 * SIZE))
    assert not stage.begin("of another loader")
    stage.place.engine, stage.writer = stage.reader, None
    assert not stage.begin("nobody writes")
    assert stage.reader.sent == []


@run
def test_an_aborted_prompts_bytes_are_free_when_the_reader_says_so() -> None:
    stage = Stage(num_bytes=SIZE)
    assert stage.begin("a")
    stage.pool.abort("a")
    assert stage.reader.sent[1:] == [Abort("a")]
    stage.requests.fail("a", "gone")
    assert not stage.begin("too early")
    stage.end("a", FinishReason.ABORT, 0)
    assert stage.passed == []
    assert stage.begin("b")


@run
def test_without_blocks_the_writer_computes_and_a_dead_one_reads_no_more() -> None:
    stage = Stage(num_bytes=SIZE)
    assert stage.begin("a")
    stage.end("a", FinishReason.ERROR, 0)
    assert stage.passed == [("a", None)]
    assert stage.begin("b")
    stage.end("b", FinishReason.LENGTH, NUM_BLOCKS)
    assert not stage.begin("too early")
    assert stage.writer is not None
    stage.pool.forget(stage.writer)
    assert stage.begin("c")
