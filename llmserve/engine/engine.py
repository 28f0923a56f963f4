"""The step function: collect, advance, schedule, submit.

Where the runner allows it and nothing depends on the result, the next step is submitted before the
last one is collected: the runner then never waits for the engine.

The engine owns requests, sequences and KV blocks. It has no clock and no randomness of its own:
time is an argument, and every draw is keyed by its request. So it can be driven by a server, by
`LLM`, by tests with a scripted runner and by a simulator, and does the same each time; a recorded
run can be replayed (`step_log.py`).
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field

from ..errors import RequestError
from ..runners.protocol import Runner
from .admission import check_request, resolve_max_len
from .advance import Advance
from .batch import build_batch
from .block_keys import BlockKeys, root_key
from .block_map import BlockMap, draw_map
from .config import EngineConfig
from .drafting import Drafter
from .grammar import Constraint, Matcher, constrain
from .policies import make_policy
from .prefix_transfer import PrefixTransfer
from .request import FinishReason, Request, RequestOutput
from .scheduler import Scheduler
from .sequence import Sequence
from .speculator import make_speculator
from .step import Step, StepWork
from .watcher import Watcher

__all__ = ["Engine", "EngineStats"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """The engine's state between two steps, and its totals so far."""

    num_running: int
    num_waiting: int
    num_waiting_tokens: int
    """Known tokens of the waiting sequences."""
    num_free_blocks: int
    """Blocks that can be allocated now, in all pools."""
    num_blocks: int
    num_steps: int
    num_prefill_tokens: int
    """Tokens computed in chunks of more than one, again after a preemption too."""
    num_decode_tokens: int
    """Tokens computed one at a time, guesses included."""
    num_preemptions: int
    cache_usage: float = 0.0
    """Share of blocks held by running sequences, in the fullest pool. 0..1."""
    num_prefix_queries: int = 0
    """Prompt tokens looked up in the prefix cache, once for each request that may take hits."""
    num_prefix_hits: int = 0
    """Those that were found."""
    num_prefix_block_queries: int = 0
    """The same in blocks, a prompt's last one included though it may be partial."""
    num_prefix_block_hits: int = 0
    num_drafts: int = 0
    """Times that tokens were guessed ahead for a sequence."""
    num_draft_tokens: int = 0
    """Tokens guessed."""
    num_accepted_tokens: int = 0
    """Guesses that were right."""
    accepted_per_position: list[int] = field(default_factory=list)
    """Those at the first, second, ... place."""


class Engine:
    """Continuous batching of requests over one runner. One thread uses it.

    Every sequence ends exactly once, with one `RequestOutput` that carries its finish reason,
    except those that `finish` ended: their caller knows already.
    """

    def __init__(
        self,
        runner: Runner,
        config: EngineConfig,
        *,
        drafter: Drafter | None = None,
        watcher: Watcher | None = None,
    ) -> None:
        """Allocate the runner's KV cache. The engine does not close the runner.

        Args:
            runner: Executes the steps.
            config: Sizes and rules.
            drafter: Guesses ahead, as `config.speculation` says (`make_drafter`).
            watcher: Is told everything that goes in and is decided.

        Raises:
            ConfigError: a pool holds no sequence of full length, or a drafter is missing or not
                asked for.
        """
        self.config = config
        self._runner = runner
        self._watcher = watcher or Watcher()
        speculator = make_speculator(config, drafter)
        self._scheduler = Scheduler(config, runner.info, make_policy(config), speculator)
        self._advance = Advance(self._scheduler, self._end)
        self._live: dict[str, list[Sequence]] = {}
        self._deadlines: list[tuple[float, str]] = []
        self._in_flight: deque[Step] = deque()
        """Submitted and not collected: one, or two where the second was chosen ahead."""
        self.last_work: StepWork | None = None
        """What the last call of `step` had computed; None: nothing."""
        self._ended: list[RequestOutput] = []
        self._num_sequences = 0
        self._num_steps = 0
        self._num_prefill_tokens = 0
        self._num_decode_tokens = 0
        runner.allocate_cache(config.num_blocks, config.block_size)
        self._watcher.started(runner.info, config, overlaps=runner.overlaps)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._live or self._ended or self._in_flight)

    def add_request(self, request: Request, matcher: Matcher | None = None) -> None:
        """Queue a request, new or resumed with the output ids already in it.

        Args:
            request: From now on the engine's own.
            matcher: The compiled `request.grammar`, at the beginning of a text.

        Raises:
            RequestError: it could never be served to its end, or its id is in use.
        """
        check_request(request, self._runner.info, self.config)
        assert (request.grammar is None) == (matcher is None), "a grammar comes with its matcher"
        if request.request_id in self._live:
            raise RequestError(f"request id {request.request_id!r} is in use", param="request_id")
        self._watcher.added(request)
        made = request.output_token_ids or [[] for _ in range(request.sampling_params.n)]
        sequences = [
            self._make_sequence(request, index, token_ids, matcher)
            for index, token_ids in enumerate(made)
            if index not in request.ended_choices
        ]
        self._live[request.request_id] = sequences
        for sequence in sequences:
            self._scheduler.add(sequence)
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (request.deadline, request.request_id))

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> None:
        """End every choice of a request; its last outputs come with the next step.

        An id that is not live is left alone: it may have ended a moment ago.
        """
        self._watcher.aborted(request_id, reason)
        self._abort(request_id, reason)

    def finish(self, request_id: str, choice_index: int) -> None:
        """End one choice as `stop` because its text met a stop string; it gives no more outputs."""
        self._watcher.finished(request_id, choice_index)
        for sequence in list(self._live.get(request_id, ())):
            if sequence.choice_index == choice_index:
                self._end(sequence, FinishReason.STOP)

    def fail_running(self, error: str) -> None:
        """End every sequence of the steps under way as `error`; call it when `step` raised.

        What they were to put into the cache is not trusted. Sequences that were not part of it
        go on, and a step that raises again will end the next ones: the caller decides how often it
        tries.
        """
        self._watcher.failed(error)
        sequences = [one for step in self._in_flight for one in step.sequences]
        self._in_flight.clear()
        self._scheduler.kv.distrust_step()
        for sequence in sequences:
            if sequence.finish_reason is None:
                self._end(sequence, FinishReason.ERROR)
                self._ended.append(_last_output(sequence, error=error))

    def step(self, now: float) -> list[RequestOutput]:
        """One step at time `now` (seconds, not decreasing); what it brought to an end or on.

        With a runner that overlaps, the outputs are those of the step before; with one that
        computes in `submit`, those of this step. An exception that the runner raises passes
        through; `fail_running` then makes the engine usable again.
        """
        self._watcher.stepping(now)
        is_ahead = self._submit_ahead()
        outputs = self._collect()
        self._expire(now)
        if is_ahead:
            self._scheduler.seal_ahead(self._in_flight[-1])
        else:
            self._submit(now)
        if not self._runner.overlaps:
            outputs += self._collect()
        outputs += self._ended
        self._ended = []
        return outputs

    def stats(self) -> EngineStats:
        """Counts for metrics and logs. O(pools)."""
        scheduler = self._scheduler
        pools = [group.pool for group in scheduler.kv.groups]
        drafts = scheduler.speculator.policy if scheduler.speculator is not None else None
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.policy),
            num_waiting_tokens=scheduler.num_waiting_tokens,
            num_free_blocks=sum(pool.num_free for pool in pools),
            num_blocks=sum(pool.num_blocks for pool in pools),
            num_steps=self._num_steps,
            num_prefill_tokens=self._num_prefill_tokens,
            num_decode_tokens=self._num_decode_tokens,
            num_preemptions=scheduler.num_preemptions,
            cache_usage=max(1 - pool.num_free / pool.num_blocks for pool in pools),
            num_prefix_queries=scheduler.prefix.num_tokens,
            num_prefix_hits=scheduler.prefix.num_hit_tokens,
            num_prefix_block_queries=scheduler.prefix.num_blocks,
            num_prefix_block_hits=scheduler.prefix.num_hit_blocks,
            num_drafts=drafts.num_drafts if drafts else 0,
            num_draft_tokens=drafts.num_draft_tokens if drafts else 0,
            num_accepted_tokens=drafts.num_accepted_tokens if drafts else 0,
            accepted_per_position=list(drafts.accepted_per_position) if drafts else [],
        )

    def block_maps(self) -> list[BlockMap]:
        """Who holds which KV blocks, pool by pool. O(blocks): for people, not for every step."""
        scheduler = self._scheduler
        return [
            draw_map(
                group.pool,
                ((one.request_id, group.held(one.row)) for one in scheduler.running.sequences),
                group.window,
            )
            for group in scheduler.kv.groups
        ]

    def prefix_transfer(self) -> PrefixTransfer:
        """What hands this engine's prefix cache over and fills it; for between two steps.

        Raises `ConfigError` where there is none, or the runner keeps it to itself.
        """
        return PrefixTransfer(self._runner, self._scheduler.kv, self.config)

    def check(self) -> None:
        """Raise AssertionError if an invariant is broken: blocks, queues, or a sequence lost."""
        scheduler = self._scheduler
        scheduler.check()
        live = {id(sequence) for sequences in self._live.values() for sequence in sequences}
        queued = {id(sequence) for sequence in (*scheduler.policy, *scheduler.running.sequences)}
        assert live == queued, "a live sequence is in no queue, or an ended one in one"
        if scheduler.speculator is not None:
            running = {sequence.uid for sequence in scheduler.running.sequences}
            scheduler.speculator.drafter.check(running)
            scheduler.speculator.policy.check(running)

    def _make_sequence(
        self, request: Request, index: int, made: list[int], matcher: Matcher | None
    ) -> Sequence:
        info, params = self._runner.info, request.sampling_params
        stop_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            stop_ids |= frozenset(info.eos_token_ids)
        token_ids = [*request.prompt_token_ids, *made]
        # Without a prefix cache the choices of one request still share their prompt's blocks.
        is_private = not self.config.has_prefix_cache
        root = root_key(info.fingerprint, request, is_private=is_private)
        self._num_sequences += 1
        return Sequence(
            request=request,
            choice_index=index,
            uid=self._num_sequences,
            token_ids=token_ids,
            max_len=resolve_max_len(request, self.config.max_seq_len),
            stop_token_ids=stop_ids,
            block_keys=BlockKeys(root, request, token_ids, self.config.block_size),
            shares_blocks=info.shares_blocks and (self.config.has_prefix_cache or params.n > 1),
            num_cached_tokens=request.num_cached_tokens,
            owes_prompt_logprobs=params.prompt_logprobs is not None and index == 0 and not made,
            constraint=None if matcher is None else self._constraint(request, matcher),
        )

    def _constraint(self, request: Request, matcher: Matcher) -> Constraint:
        return Constraint(
            matcher.copy(),
            num_prompt_tokens=len(request.prompt_token_ids),
            vocab_size=self._runner.info.vocab_size,
        )

    def _submit_ahead(self) -> bool:
        """Submit what follows the step under way before that is collected, where this is possible.

        Its tokens are the runner's until then. A sequence that the result ends has taken part in
        vain: what it draws is passed over, and what it writes lies in blocks that nobody gets
        before.
        """
        if not self._runner.info.feeds_tokens or not self._in_flight:
            return False
        step = self._scheduler.schedule_ahead(self._in_flight[0])
        if step is not None:
            self._watcher.scheduled(step)
            self._start(step)
        return step is not None

    def _submit(self, now: float) -> None:
        step = self._scheduler.schedule(now)
        self._watcher.scheduled(step)
        self.last_work = None
        if not step.is_empty:
            self._start(step)

    def _start(self, step: Step) -> None:
        self.last_work = StepWork.of(step)
        self._num_decode_tokens += len(step.decodes)
        for chunk in step.chunks:
            if chunk.num_tokens == 1 or chunk.draft_ids:
                self._num_decode_tokens += chunk.num_tokens
            else:
                self._num_prefill_tokens += chunk.num_tokens
        self._num_steps += 1
        self._in_flight.append(step)
        scheduler = self._scheduler
        constrain(step)
        batch = build_batch(step, scheduler.running, scheduler.kv, self.config.block_size)
        self._runner.submit(batch)

    def _collect(self) -> list[RequestOutput]:
        if not self._in_flight:
            return []
        result = self._runner.collect()
        step = self._in_flight.popleft()
        self._watcher.collected(result)
        if step.num_rounds > 1:  # it may have stopped before the last one
            self._num_decode_tokens += len(result.token_ids) - len(step.decodes)
        return self._advance.apply(step, result)

    def _expire(self, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            deadline, request_id = heapq.heappop(self._deadlines)
            sequences = self._live.get(request_id)
            # An ended request leaves its entry behind, and its id may be in use again.
            if sequences and sequences[0].request.deadline == deadline:
                self._abort(request_id, FinishReason.TIMEOUT)

    def _abort(self, request_id: str, reason: FinishReason) -> None:
        for sequence in list(self._live.get(request_id, ())):
            self._end(sequence, reason)
            self._ended.append(_last_output(sequence))

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        """The one door out: the sequence leaves its queue, its request and its blocks."""
        assert sequence.finish_reason is None, "a sequence ended twice"
        sequence.finish_reason = reason
        self._scheduler.remove(sequence)
        siblings = self._live[sequence.request_id]
        siblings.remove(sequence)
        if not siblings:
            del self._live[sequence.request_id]


def _last_output(sequence: Sequence, *, error: str | None = None) -> RequestOutput:
    return RequestOutput(
        sequence.request_id,
        sequence.choice_index,
        finish_reason=sequence.finish_reason,
        num_cached_tokens=sequence.num_cached_tokens or 0,
        scheduled_time=sequence.scheduled_time,
        error=error,
    )
