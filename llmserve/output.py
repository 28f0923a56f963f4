"""Ids to text: the last hop of a token, shared by `LLM` and the server.

The engine ends sequences on ids and lengths only. Here their text is made, stop strings are found
in it, and what must not be seen is kept back: part of a character, and the beginning of what may
become a stop string.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

from .engine.request import FinishReason, RequestOutput
from .runners.protocol import TokenLogprobs
from .sampling import SamplingParams
from .text.detokenizer import Detokenizer
from .text.stop_strings import StopScanner
from .text.tokenizer import Tokenizer

__all__ = ["OutputProcessor", "TextDelta"]


@dataclass(slots=True, kw_only=True)
class TextDelta:
    """What one output of the engine adds to what a client sees of a choice.

    A token comes with the delta that completes its text, so while text is held back its tokens and
    logprobs are, too; the tokens of a stop string come with the last delta.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """One entry per token where they were asked for, else empty."""
    finish_reason: FinishReason | None = None
    """Set on the last delta."""
    stop_reason: str | int | None = None
    """The stop string or the id of `stop_token_ids` that ended the text; None for an end id."""


class OutputProcessor:
    """The text of one choice of one request.

    Special tokens have no text. Neither has the id that ended the choice, unless the request says
    `include_stop`. When a stop string is found the text is over: the delta says so, `stopped` is
    True, and the caller tells the engine (`Engine.finish`) if it has not ended the choice itself;
    later outputs add nothing.

    Attributes:
        stopped: Whether a stop string was found.
        num_tokens: Tokens generated, up to the one that completed a stop string.
    """

    def __init__(
        self, tokenizer: Tokenizer, params: SamplingParams, prompt_token_ids: Sequence[int] = ()
    ) -> None:
        self.stopped = False
        self.num_tokens = 0
        self._params = params
        self._detokenizer = Detokenizer(tokenizer, prompt_token_ids)
        self._scanner = StopScanner(params.stop, include_stop=params.include_stop)
        self._is_finished = False
        self._shown: list[str] = []
        self._num_settled = 0  # characters detokenized
        self._num_shown = 0
        # Tokens not given out yet: id, logprobs, and how many characters must be shown first.
        self._waiting: deque[tuple[int, TokenLogprobs | None, int]] = deque()

    @property
    def text(self) -> str:
        """All text given out so far."""
        self._shown = ["".join(self._shown)]
        return self._shown[0]

    def push(self, output: RequestOutput) -> TextDelta:
        """Take the engine's next output for this choice. O(length of its text)."""
        if self._is_finished:
            return TextDelta()
        if len(output.token_ids) == 1 and output.finish_reason is None and not output.logprobs:
            return self._push_one(output)
        return self._push_all(output)

    def _push_one(self, output: RequestOutput) -> TextDelta:
        """A token in the middle of an answer, as nearly every output is; mostly shown at once."""
        [token_id] = output.token_ids
        text = self._detokenizer.push(token_id)
        shown, stop = self._scanner.push(text)
        self._num_settled += len(text)
        is_held = stop is not None or len(shown) < len(text) or self._detokenizer.is_pending
        if not is_held and not self._waiting:
            self.num_tokens += 1
            self._shown.append(text)
            self._num_shown += len(text)
            return TextDelta(text=text, token_ids=[token_id])
        self._await_text(token_id, None)
        delta = TextDelta()
        self._end(delta, output, stop)
        self._give_out(delta, shown)
        return delta

    def _push_all(self, output: RequestOutput) -> TextDelta:
        delta = TextDelta()
        pieces: list[str] = []
        stop = None
        for token_id, logprobs in zip_longest(output.token_ids, output.logprobs):
            text = "" if self._is_hidden(token_id, output) else self._detokenizer.push(token_id)
            stop = self._scan(text, pieces)
            self._await_text(token_id, logprobs)
            if stop is not None:
                break
        if stop is None and output.finish_reason is not None:
            stop = self._scan(self._detokenizer.flush(), pieces)
            if stop is None:
                pieces.append(self._scanner.flush())
        self._end(delta, output, stop)
        self._give_out(delta, "".join(pieces))
        return delta

    def _is_hidden(self, token_id: int, output: RequestOutput) -> bool:
        return token_id == output.stop_token_id and not self._params.include_stop

    def _scan(self, text: str, pieces: list[str]) -> str | None:
        self._num_settled += len(text)
        shown, stop = self._scanner.push(text)
        pieces.append(shown)
        return stop

    def _await_text(self, token_id: int, logprobs: TokenLogprobs | None) -> None:
        self.num_tokens += 1
        unfinished = 1 if self._detokenizer.is_pending else 0
        self._waiting.append((token_id, logprobs, self._num_settled + unfinished))

    def _end(self, delta: TextDelta, output: RequestOutput, stop: str | None) -> None:
        delta.finish_reason = output.finish_reason
        if stop is not None:
            self.stopped = True
            delta.finish_reason, delta.stop_reason = FinishReason.STOP, stop
        elif output.stop_token_id in self._params.stop_token_ids:
            delta.stop_reason = output.stop_token_id
        self._is_finished = delta.finish_reason is not None

    def _give_out(self, delta: TextDelta, text: str) -> None:
        delta.text = text
        if text:
            self._shown.append(text)
            self._num_shown += len(text)
        while self._waiting and (self._is_finished or self._waiting[0][2] <= self._num_shown):
            token_id, logprobs, _ = self._waiting.popleft()
            delta.token_ids.append(token_id)
            if logprobs is not None:
                delta.logprobs.append(logprobs)
