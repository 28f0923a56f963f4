"""The shape of `/v1/chat/completions` replies."""

from __future__ import annotations

from llmserve.output import TextDelta
from llmserve.text.tokenizer import Tokenizer

from .generation import Update
from .logprobs import chat_logprobs
from .replies import ReplyFormat, ReplyHead

__all__ = ["ChatFormat"]

Json = dict[str, object]


class ChatFormat(ReplyFormat):
    """`/v1/chat/completions`."""

    kind = "chat.completion"
    stream_kind = "chat.completion.chunk"
    id_prefix = "chatcmpl"

    def __init__(
        self,
        head: ReplyHead,
        tokenizer: Tokenizer,
        *,
        num_choices: int,
        with_logprobs: bool,
        continuous_usage: bool = False,
    ) -> None:
        super().__init__(head, continuous_usage=continuous_usage)
        self._tokenizer = tokenizer
        self._with_logprobs = with_logprobs
        self._has_role = [False] * num_choices

    def _whole_choice(self, update: Update) -> Json:
        message = {"role": "assistant", "content": update.delta.text, "refusal": None}
        return {"index": update.index, "message": message, **self._end_of_choice(update.delta)}

    def _chunk_choice(self, update: Update) -> Json:
        content: Json = {"content": update.delta.text}
        if not self._has_role[update.index]:  # together with the first token, not before it
            self._has_role[update.index] = True
            content = {"role": "assistant", **content}
        return {"index": update.index, "delta": content, **self._end_of_choice(update.delta)}

    def _end_of_choice(self, delta: TextDelta) -> Json:
        logprobs: Json | None = None
        if self._with_logprobs:
            logprobs = {"content": chat_logprobs(self._tokenizer, delta)}
        return {
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
