"""What a computed step means: tokens appended, blocks sealed, outputs made, ends found.

The decodes of a step advance together, column by column; chunks one after another. Drafts are
accepted as long as each equals the token that the model's own sampler drew before it, so the
tokens are those of decoding one at a time (docs/speculation.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from ..errors import EngineError
from ..runners.protocol import DoubleArray, StepResult, TokenLogprobs
from .request import FinishReason, Pooling, RequestOutput
from .scheduler import Scheduler
from .sequence import Sequence
from .step import Chunk, Step

__all__ = ["Advance"]

NOT_FINITE = (
    "no token can be drawn: the model's logits are not finite numbers, or the request's masks "
    "leave none"
)


class Advance:
    """Applies results to the sequences of a scheduler."""

    def __init__(self, scheduler: Scheduler, end: Callable[[Sequence, FinishReason], None]) -> None:
        """`end` is the engine's one door out for a sequence."""
        self._scheduler = scheduler
        self._end = end

    def apply(self, step: Step, result: StepResult) -> list[RequestOutput]:
        """Outputs of a step, decodes first. A sequence that ended meanwhile is passed over."""
        num_decodes = len(step.decodes)
        if step.num_rounds > 1:
            return self._advance_rounds(step, result)
        num_rows = num_decodes + sum(chunk.num_draws for chunk in step.chunks)
        if len(result.token_ids) != num_rows:
            raise EngineError(
                f"the runner returned {len(result.token_ids)} tokens; {num_rows} were asked for"
            )
        outputs = self._advance_decodes(step, result) if num_decodes else []
        prompt_logprobs = iter(result.prompt_logprobs)
        hidden_sums, head_scores = iter(result.hidden_sums), iter(result.head_scores)
        index = num_decodes
        for chunk in step.chunks:
            draws = slice(index, index + chunk.num_draws)
            index = draws.stop
            self._collect_prompt(chunk, prompt_logprobs, hidden_sums, head_scores)
            if chunk.sequence.finish_reason is None:
                output = self._advance_chunk(chunk, result, draws)
                if output is not None:
                    outputs.append(output)
        return outputs

    def _advance_decodes(self, step: Step, result: StepResult) -> list[RequestOutput]:
        sequences, rows = step.decodes, step.decode_rows
        count = len(sequences)
        tokens = result.token_ids[:count]
        logprobs = result.logprobs
        outputs: list[RequestOutput] = []
        is_good = self._good_decodes(step, result, outputs)
        if is_good is not None:
            kept = np.flatnonzero(is_good)
            rows, tokens = rows[kept], tokens[kept]
            sequences = [sequences[index] for index in kept.tolist()]
            if logprobs is not None:
                logprobs = [logprobs[index] for index in kept.tolist()]
        self._scheduler.running.append_one(rows, tokens)
        first, ended = len(outputs), []
        for sequence, token_id in zip(sequences, tokens.tolist(), strict=True):
            sequence.token_ids.append(token_id)
            output = RequestOutput(
                sequence.request_id,
                sequence.choice_index,
                [token_id],
                [],
                None,
                None,
                sequence.num_cached_tokens or 0,
                sequence.scheduled_time,
            )
            outputs.append(output)
            if sequence.end_after(token_id) is not None:
                ended.append((sequence, output))
        if logprobs is not None:
            for output, entry in zip(outputs[first:], logprobs, strict=False):
                output.logprobs = [] if entry is None else [entry]
        for sequence, output in ended:
            self._end_at(sequence, output)
        return outputs

    def _advance_rounds(self, step: Step, result: StepResult) -> list[RequestOutput]:
        """Several tokens of each decode, up to the one that ends it."""
        count = len(step.decodes)
        num_rounds, rest = divmod(len(result.token_ids), count)
        if rest or not 1 <= num_rounds <= step.num_rounds:
            raise EngineError(
                f"the runner returned {len(result.token_ids)} tokens; from 1 to {step.num_rounds} "
                f"rounds of {count} were asked for"
            )
        drawn: list[list[int]] = result.token_ids.reshape(num_rounds, count).T.tolist()
        if result.is_finite is not None:
            is_finite = result.is_finite.reshape(num_rounds, count).T
            drawn = [ids[: int(row.sum())] for ids, row in zip(drawn, is_finite, strict=True)]
        return [
            self._take_rounds(sequence, ids) if ids else self._fail(sequence)
            for sequence, ids in zip(step.decodes, drawn, strict=True)
            if sequence.finish_reason is None
        ]

    def _take_rounds(self, sequence: Sequence, token_ids: list[int]) -> RequestOutput:
        """Append what was drawn, up to the end; what is unusable behind it is found again."""
        output = _output(sequence)
        for token_id in token_ids:
            sequence.token_ids.append(token_id)
            output.token_ids.append(token_id)
            if sequence.end_after(token_id) is not None:
                break
        self._scheduler.running.settle(sequence)
        self._scheduler.settle_rounds(sequence)
        if sequence.end_after(output.token_ids[-1]) is not None:
            self._end_at(sequence, output)
        return output

    def _good_decodes(
        self, step: Step, result: StepResult, outputs: list[RequestOutput]
    ) -> np.ndarray[tuple[int], np.dtype[np.bool_]] | None:
        """Which decodes go on; None: all. Those with unusable logits end here."""
        count = len(step.decodes)
        is_good = None
        if any(sequence.finish_reason is not None for sequence in step.decodes):
            is_good = np.array([sequence.finish_reason is None for sequence in step.decodes])
        if result.is_finite is not None and not result.is_finite[:count].all():
            is_good = np.ones(count, dtype=np.bool_) if is_good is None else is_good
            bad = np.flatnonzero(is_good & ~result.is_finite[:count]).tolist()
            outputs += [self._fail(step.decodes[index]) for index in bad]
            is_good &= result.is_finite[:count]
        return is_good

    def _advance_chunk(
        self, chunk: Chunk, result: StepResult, draws: slice
    ) -> RequestOutput | None:
        sequence, running = chunk.sequence, self._scheduler.running
        if not chunk.is_last:
            running.num_computed[sequence.row] = chunk.stop
            return None
        if not sequence.draws:
            return self._end_without_draw(sequence)
        if result.is_finite is not None and not result.is_finite[draws.start]:
            return self._fail(sequence)
        output = _output(sequence)
        is_finite = None if result.is_finite is None else result.is_finite[draws]
        tokens: list[int] = result.token_ids[draws].tolist()
        logprobs = None if result.logprobs is None else result.logprobs[draws]
        for place, token_id in enumerate(tokens):
            if is_finite is not None and not is_finite[place]:
                break  # a draft led there; the model itself may not
            sequence.token_ids.append(token_id)
            output.token_ids.append(token_id)
            if logprobs is not None and (entry := logprobs[place]) is not None:
                output.logprobs.append(entry)
            output.finish_reason = sequence.end_after(token_id)
            if output.finish_reason is not None or place == len(chunk.draft_ids):
                break
            if token_id != chunk.draft_ids[place]:
                break
        self._note_tokens(chunk, output)
        return output

    def _note_tokens(self, chunk: Chunk, output: RequestOutput) -> None:
        """Move the sequence's row on by what was accepted, and give back what was not."""
        sequence = chunk.sequence
        self._scheduler.running.settle(sequence)
        if chunk.draft_ids:
            self._scheduler.settle_drafts(chunk, len(output.token_ids) - 1)
        if output.finish_reason is not None:
            self._end_at(sequence, output)

    def _collect_prompt(
        self,
        chunk: Chunk,
        prompt_logprobs: Iterator[list[TokenLogprobs]],
        hidden_sums: Iterator[DoubleArray],
        head_scores: Iterator[list[list[float]]],
    ) -> None:
        """Keep what was asked for about the prompt; the iterators follow the batch's order."""
        sequence = chunk.sequence
        if chunk.has_prompt_rows:
            sequence.prompt_logprobs += next(prompt_logprobs)
        if chunk.has_hidden_sum:
            sequence.hidden_sum = next(hidden_sums)
        if chunk.has_head_rows:
            sequence.head_scores += next(head_scores)

    def _end_without_draw(self, sequence: Sequence) -> RequestOutput:
        output = _output(sequence)
        if sequence.hidden_sum is not None:
            count = sequence.num_prompt_tokens if sequence.request.pooling is Pooling.MEAN else 1
            vector = (sequence.hidden_sum / count).astype(np.float32)
            if not np.isfinite(vector).all():
                return self._fail(sequence)
            output.vector = vector.tolist()
        if not np.isfinite(sequence.head_scores).all():
            return self._fail(sequence)
        output.scores = sequence.head_scores
        output.finish_reason = FinishReason.LENGTH
        self._end(sequence, FinishReason.LENGTH)
        return output

    def _end_at(self, sequence: Sequence, output: RequestOutput) -> None:
        token_id = sequence.token_ids[-1]
        reason = sequence.end_after(token_id)
        assert reason is not None, "a sequence ends without a reason"
        output.finish_reason = reason
        output.stop_token_id = token_id if reason is FinishReason.STOP else None
        self._end(sequence, reason)

    def _fail(self, sequence: Sequence) -> RequestOutput:
        """End a sequence whose numbers cannot be used; nobody is to find its blocks."""
        self._scheduler.kv.distrust(sequence)
        output = _output(sequence)
        constraint = sequence.constraint
        output.error = (constraint and constraint.error) or NOT_FINITE
        output.finish_reason = FinishReason.ERROR
        self._end(sequence, FinishReason.ERROR)
        return output


def _output(sequence: Sequence) -> RequestOutput:
    """An output without tokens; with the prompt's log-probabilities if they are due."""
    output = RequestOutput(
        sequence.request_id,
        sequence.choice_index,
        num_cached_tokens=sequence.num_cached_tokens or 0,
        scheduled_time=sequence.scheduled_time,
    )
    if sequence.owes_prompt_logprobs:
        sequence.owes_prompt_logprobs = False
        output.prompt_logprobs = sequence.prompt_logprobs
    return output
