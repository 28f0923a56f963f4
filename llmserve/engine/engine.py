"""The step function: collect, advance, schedule, submit.

The engine owns requests, sequences and KV blocks. It has no clock and no randomness of its own:
time is an argument, and every draw is keyed by its request. So it can be driven by a server, by
`LLM`, by tests with a scripted runner and by a simulator, and does the same each time.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import EngineError, RequestError
from ..runners.protocol import Runner, SampledToken
from .admission import check_request, resolve_max_len
from .batch import build_batch
from .config import EngineConfig
from .request import FinishReason, Request, RequestOutput
from .scheduler import ScheduledSequence, Scheduler
from .sequence import Sequence

__all__ = ["Engine", "EngineStats"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """The engine's state between two steps, and its totals so far."""

    num_running: int
    num_waiting: int
    num_waiting_tokens: int
    num_free_blocks: int
    num_blocks: int
    num_steps: int
    num_prefill_tokens: int
    """Tokens computed in chunks of more than one, again after a preemption too."""
    num_decode_tokens: int
    """Tokens computed one at a time."""
    num_preemptions: int


class Engine:
    """Continuous batching of requests over one runner. One thread uses it.

    Every sequence ends exactly once, with one `RequestOutput` that carries its finish reason,
    except those that `finish` ended: their caller knows already.
    """

    def __init__(self, runner: Runner, config: EngineConfig) -> None:
        """Allocate the runner's KV cache. The engine does not close the runner."""
        self.config = config
        self._runner = runner
        self._scheduler = Scheduler(config)
        self._live: dict[str, list[Sequence]] = {}
        self._in_flight: list[ScheduledSequence] = []
        self._ended: list[RequestOutput] = []
        self._num_added = 0
        self._num_steps = 0
        self._num_prefill_tokens = 0
        self._num_decode_tokens = 0
        runner.allocate_cache(config.num_blocks, config.block_size)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._live or self._ended or self._in_flight)

    def add_request(self, request: Request) -> None:
        """Queue a request, new or resumed with the output ids already in it.

        Raises:
            RequestError: it could never be served to its end, or its id is in use.
        """
        info = self._runner.info
        check_request(request, vocab_size=info.vocab_size, max_seq_len=self.config.max_seq_len)
        if request.request_id in self._live:
            raise RequestError(f"request id {request.request_id!r} is in use", param="request_id")
        params = request.sampling_params
        stop_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            stop_ids |= frozenset(info.eos_token_ids)
        made = request.output_token_ids or [[] for _ in range(params.n)]
        self._num_added += 1
        sequences = [
            Sequence(
                request=request,
                choice_index=index,
                order=self._num_added,
                token_ids=[*request.prompt_token_ids, *token_ids],
                max_len=resolve_max_len(request, self.config.max_seq_len),
                stop_token_ids=stop_ids,
            )
            for index, token_ids in enumerate(made)
        ]
        self._live[request.request_id] = sequences
        for sequence in sequences:
            self._scheduler.add(sequence)

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> None:
        """End every choice of a request; its last outputs come with the next step.

        An id that is not live is left alone: it may have ended a moment ago.
        """
        for sequence in list(self._live.get(request_id, ())):
            self._end(sequence, reason)
            self._ended.append(_last_output(sequence))

    def finish(self, request_id: str, choice_index: int) -> None:
        """End one choice as `stop` because its text met a stop string; it gives no more outputs."""
        for sequence in list(self._live.get(request_id, ())):
            if sequence.choice_index == choice_index:
                self._end(sequence, FinishReason.STOP)

    def fail_running(self, error: str) -> None:
        """End every sequence of the step under way as `error`; call it when `step` raised.

        Where no step was under way, every running sequence ends.
        """
        failed = [item.sequence for item in self._in_flight] or list(self._scheduler.running)
        self._in_flight = []
        for sequence in failed:
            if sequence.finish_reason is None:
                self._end(sequence, FinishReason.ERROR)
                self._ended.append(_last_output(sequence, error=error))

    def step(self, now: float) -> list[RequestOutput]:
        """Advance by one step; `now` is the time on the caller's monotonic clock, in seconds.

        A runner that computes inside `submit` is collected in the same call, so that its tokens
        do not wait for the next one (docs/decisions/0002-synchronous-runners.md). What the runner
        raises passes through; `fail_running` then makes the engine usable again.
        """
        outputs = self._collect()
        self._expire(now)
        self._submit(now)
        if not self._runner.overlaps:
            outputs += self._collect()
        outputs += self._ended
        self._ended = []
        return outputs

    def stats(self) -> EngineStats:
        """Counts for metrics and logs."""
        scheduler = self._scheduler
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_waiting_tokens=sum(len(sequence.token_ids) for sequence in scheduler.waiting),
            num_free_blocks=scheduler.pool.num_free,
            num_blocks=scheduler.pool.num_blocks,
            num_steps=self._num_steps,
            num_prefill_tokens=self._num_prefill_tokens,
            num_decode_tokens=self._num_decode_tokens,
            num_preemptions=scheduler.num_preemptions,
        )

    def check(self) -> None:
        """Raise AssertionError if an invariant is broken: blocks, queues, or a sequence lost."""
        scheduler = self._scheduler
        scheduler.check()
        live = {id(sequence) for sequences in self._live.values() for sequence in sequences}
        queued = {id(sequence) for sequence in (*scheduler.waiting, *scheduler.running)}
        assert live == queued, "a live sequence is in no queue, or an ended one in one"

    def _submit(self, now: float) -> None:
        scheduled = self._scheduler.schedule(now)
        if not scheduled:
            return
        for item in scheduled:
            if item.num_tokens == 1:
                self._num_decode_tokens += 1
            else:
                self._num_prefill_tokens += item.num_tokens
        self._num_steps += 1
        self._in_flight = scheduled
        self._runner.submit(build_batch(scheduled, self.config.block_size))

    def _collect(self) -> list[RequestOutput]:
        if not self._in_flight:
            return []
        tokens = iter(self._runner.collect().tokens)
        scheduled, self._in_flight = self._in_flight, []
        outputs = []
        for item in scheduled:
            sampled = next(tokens) if item.needs_logits else None
            sequence = item.sequence
            if sequence.finish_reason is not None:
                continue  # ended while the step was computed
            if sampled is None:
                sequence.num_computed_tokens += item.num_tokens
            else:
                outputs.append(self._advance(sequence, item.num_tokens, sampled))
        if next(tokens, None) is not None:
            raise EngineError("the runner returned more tokens than were asked for")
        return outputs

    def _advance(
        self, sequence: Sequence, num_computed: int, sampled: SampledToken
    ) -> RequestOutput:
        """Append a drawn token; end the sequence if that ends it."""
        if not sampled.is_finite:
            self._end(sequence, FinishReason.ERROR)
            return _last_output(sequence, error="the model's logits are not finite numbers")
        sequence.num_computed_tokens += num_computed
        sequence.token_ids.append(sampled.token_id)
        reason = sequence.end_after(sampled.token_id)
        if reason is not None:
            self._end(sequence, reason)
        return RequestOutput(
            request_id=sequence.request.request_id,
            choice_index=sequence.choice_index,
            token_ids=[sampled.token_id],
            logprobs=[] if sampled.logprobs is None else [sampled.logprobs],
            finish_reason=reason,
            stop_token_id=sampled.token_id if reason is FinishReason.STOP else None,
            scheduled_time=sequence.scheduled_time,
        )

    def _expire(self, now: float) -> None:
        expired = [
            sequences[0].request.request_id
            for sequences in self._live.values()
            if (deadline := sequences[0].request.deadline) is not None and deadline <= now
        ]
        for request_id in expired:
            self.abort(request_id, FinishReason.TIMEOUT)

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        """The one door out: the sequence leaves its queue, its request and its blocks."""
        assert sequence.finish_reason is None, "a sequence ended twice"
        sequence.finish_reason = reason
        self._scheduler.remove(sequence)
        siblings = self._live[sequence.request.request_id]
        siblings.remove(sequence)
        if not siblings:
            del self._live[sequence.request.request_id]


def _last_output(sequence: Sequence, *, error: str | None = None) -> RequestOutput:
    return RequestOutput(
        request_id=sequence.request.request_id,
        choice_index=sequence.choice_index,
        token_ids=[],
        finish_reason=sequence.finish_reason,
        scheduled_time=sequence.scheduled_time,
        error=error,
    )
