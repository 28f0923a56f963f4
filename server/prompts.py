"""From the texts of a request to token ids, without holding up the event loop.

Short texts are encoded at once, since a thread would take longer to start than the work; long
ones go to a thread, and what cannot possibly fit the context is refused by its length alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial

from llmserve.errors import RequestError, TemplateError
from llmserve.limits import Limits
from llmserve.text.chat_template import ChatTemplate
from llmserve.text.tokenizer import Tokenizer

from .conversations import Message

__all__ = ["PromptReader"]

INLINE_CHARS = 4096
"""Texts up to this length are encoded on the event loop."""

MAX_CHARS_PER_TOKEN = 128
"""More than any token of a known vocabulary stands for, on average over a whole prompt."""


class PromptReader:
    """Encodes prompts and conversations for one model."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        *,
        max_seq_len: int,
        limits: Limits,
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._max_chars = max_seq_len * MAX_CHARS_PER_TOKEN
        self._max_seq_len = max_seq_len
        self._limits = limits

    @property
    def has_template(self) -> bool:
        """Whether conversations can be read."""
        return self._template is not None

    async def read(
        self, prompts: Sequence[str | list[int]], *, add_special_tokens: bool
    ) -> list[list[int]]:
        """Token ids of each prompt; lists of ids are taken as they are.

        Raises `RequestError` for too many prompts, an empty one, or a text that cannot be encoded
        or fit.
        """
        if len(prompts) > self._limits.max_prompts:
            raise RequestError(
                f"{len(prompts)} prompts; this server allows at most {self._limits.max_prompts}",
                param="prompt",
            )
        if not all(prompts):
            # A tokenizer may put a first id before nothing: still nobody asked for anything.
            raise RequestError(
                "the prompt is empty: give at least one character or id", param="prompt"
            )
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        encoded = iter(await self._encode(texts, add_special_tokens=add_special_tokens))
        return [next(encoded) if isinstance(prompt, str) else prompt for prompt in prompts]

    async def read_messages(
        self, messages: Sequence[Message], *, add_generation_prompt: bool
    ) -> list[int]:
        """Token ids of a conversation, through the chat template.

        Raises `TemplateError` without a template, or where it fails on the messages.
        """
        template = self._template
        if template is None:
            raise TemplateError(
                "this model has no chat template: use /v1/completions, or start the server with "
                "--chat-template FILE",
                param="messages",
            )
        if len(messages) > self._limits.max_messages:
            raise RequestError(
                f"{len(messages)} messages; this server allows {self._limits.max_messages}",
                param="messages",
            )
        turns = [_as_turn(message) for message in messages]
        # A template is a program of others: never on the event loop.
        text = await asyncio.to_thread(
            template.render, turns, add_generation_prompt=add_generation_prompt
        )
        return (await self._encode([text], add_special_tokens=False, param="messages"))[0]

    async def _encode(
        self, texts: list[str], *, add_special_tokens: bool, param: str = "prompt"
    ) -> list[list[int]]:
        longest = max(map(len, texts), default=0)
        if longest > self._max_chars:
            raise RequestError(
                f"{param} has {longest} characters: more than this model's {self._max_seq_len} "
                "tokens of context can hold",
                param=param,
            )
        encode = partial(self._tokenizer.encode_batch, texts, add_special_tokens=add_special_tokens)
        if sum(map(len, texts)) <= INLINE_CHARS:
            return encode()
        return await asyncio.to_thread(encode)


def _as_turn(message: Message) -> dict[str, str]:
    """What templates know: the newer role `developer` is their `system`."""
    role = "system" if message.role == "developer" else message.role
    turn = {"role": role, "content": message.content}
    return turn if message.name is None else {**turn, "name": message.name}
