"""The shape of `/v1/completions` replies: text, and what was asked about the prompt before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmserve.text.tokenizer import Tokenizer

from .generation import Update
from .logprobs import LegacyLogprobs, prompt_logprobs
from .replies import ChoicesFormat, ReplyHead

__all__ = ["CompletionFormat", "PromptPart"]

Json = dict[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptPart:
    """A prompt, as far as its choices tell of it."""

    token_ids: list[int]
    echo: str
    """The text to put before each choice."""


class CompletionFormat(ChoicesFormat):
    """`/v1/completions`."""

    kind = stream_kind = "text_completion"
    id_prefix = "cmpl"

    def __init__(
        self,
        head: ReplyHead,
        tokenizer: Tokenizer,
        *,
        prompts: Sequence[PromptPart],
        n: int,
        num_logprobs: int | None,
        echoes_logprobs: bool,
        num_prompt_logprobs: int | None,
        continuous_usage: bool = False,
    ) -> None:
        """How each of the `n` choices of each prompt is told.

        Args:
            head: What every part has in common.
            tokenizer: For the tokens' texts.
            prompts: In their order.
            n: Choices of each prompt.
            num_logprobs: Likeliest tokens to tell beside each; None: no log-probabilities.
            echoes_logprobs: Whether those begin with the prompt's.
            num_prompt_logprobs: The same for the list `prompt_logprobs`.
            continuous_usage: Whether every event of a stream tells the tokens so far.
        """
        super().__init__(head, continuous_usage=continuous_usage)
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._n = n
        self._logprobs: list[LegacyLogprobs] | None = None
        if num_logprobs is not None:
            self._logprobs = [
                LegacyLogprobs(tokenizer, num_top=num_logprobs) for _ in range(len(prompts) * n)
            ]
        self._echoes_logprobs = echoes_logprobs
        self._num_prompt_logprobs = num_prompt_logprobs
        self._begun: set[int] = set()

    def _whole_choice(self, update: Update) -> Json:
        return self._choice(update)

    def _chunk_choice(self, update: Update) -> Json:
        return self._choice(update)

    def _choice(self, update: Update) -> Json:
        index, delta = update.index, update.delta
        prompt = self._prompts[index // self._n]
        is_first = index not in self._begun
        self._begun.add(index)
        choice: Json = {
            "index": index,
            "text": (prompt.echo if is_first else "") + delta.text,
            "logprobs": self._lists(prompt, update),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if self._num_prompt_logprobs is not None and update.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(
                self._tokenizer,
                prompt.token_ids,
                update.prompt_logprobs,
                self._num_prompt_logprobs,
            )
        return choice

    def _lists(self, prompt: PromptPart, update: Update) -> dict[str, list[Any]] | None:
        """The lists of log-probabilities, the prompt's first where they are echoed."""
        if self._logprobs is None:
            return None
        logprobs, entries = self._logprobs[update.index], update.prompt_logprobs
        if not self._echoes_logprobs or entries is None:
            return logprobs.of_text(update.delta)
        before = logprobs.of_prompt(prompt.token_ids, entries)
        after = logprobs.of_text(update.delta)
        return {name: before[name] + after[name] for name in before}
