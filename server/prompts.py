"""From the texts of a request to token ids, without holding up the event loop.

Short texts are encoded at once, since a thread would take longer to start than the work; long
ones go to a thread, and what cannot possibly fit the context is refused by its length alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from llmserve.errors import RequestError, TemplateError
from llmserve.limits import Limits
from llmserve.text.chat_template import ChatTemplate
from llmserve.text.tokenizer import Tokenizer

from .conversations import CalledFunction, Message
from .message_parts import THINK_CLOSE, THINK_OPEN
from .tools_calls import CALL_OPEN
from .tools_fields import Tool
from .tools_prompt import with_tools_described

__all__ = ["ChatPrompt", "PromptReader"]

INLINE_CHARS = 4096
"""Texts up to this length are encoded on the event loop."""

MAX_CHARS_PER_TOKEN = 128
"""More than any token of a known vocabulary stands for, on average over a whole prompt."""


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation as the model sees it."""

    token_ids: list[int]
    opens_reasoning: bool
    """Whether the model's answer begins within its reasoning."""


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
        self,
        prompts: Sequence[str | list[int]],
        *,
        add_special_tokens: bool,
        param: str = "prompt",
        most: int | None = None,
    ) -> list[list[int]]:
        """Token ids of each prompt; lists of ids are taken as they are.

        `param` names the field that they come from, `most` says how many there may be, if not as
        many as a completion's prompts.

        Raises `RequestError` for too many prompts, an empty one, or a text that cannot be encoded
        or fit.
        """
        most = most or self._limits.max_prompts
        if len(prompts) > most:
            raise RequestError(
                f"{param} has {len(prompts)} texts; this server allows at most {most}", param=param
            )
        if not all(prompts):
            # A tokenizer may put a first id before nothing: still nobody asked for anything.
            raise RequestError(f"{param} is empty: give at least one character or id", param=param)
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        encoded = iter(
            await self._encode(texts, add_special_tokens=add_special_tokens, param=param)
        )
        return [next(encoded) if isinstance(prompt, str) else prompt for prompt in prompts]

    @property
    def marks_reasoning(self) -> bool:
        """Whether the template knows reasoning, between the marks of `message_parts.py`."""
        template = self._template
        return template is not None and THINK_CLOSE in template.source

    @property
    def marks_calls(self) -> bool:
        """Whether calls of tools come between marks; else as JSON alone."""
        template = self._template
        return template is None or not template.reads("tools") or CALL_OPEN in template.source

    async def read_messages(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] = (),
        add_generation_prompt: bool = True,
        continues_last: bool = False,
        variables: Mapping[str, object] | None = None,
    ) -> ChatPrompt:
        """A conversation through the chat template.

        Args:
            messages: At least one.
            tools: Functions that the model may call.
            add_generation_prompt: Whether the prompt goes on to where the model answers.
            continues_last: Whether it ends within the last message, which the model goes on with.
            variables: More values for the template, by name.

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
        values = dict(variables or {})
        if template.reads("tools"):
            values["tools"] = [tool.definition for tool in tools] or None
        else:
            turns = with_tools_described(turns, tools)
        # A template is a program of others: never on the event loop.
        text = await asyncio.to_thread(
            template.render, turns, add_generation_prompt=add_generation_prompt, **values
        )
        if continues_last:
            text = _cut_after(text, messages[-1].content or "")
        ids = (await self._encode([text], add_special_tokens=False, param="messages"))[0]
        return ChatPrompt(ids, opens_reasoning=text.rstrip().endswith(THINK_OPEN))

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


def _as_turn(message: Message) -> dict[str, Any]:
    """What templates know: the newer role `developer` is their `system`."""
    role = "system" if message.role == "developer" else message.role
    turn: dict[str, Any] = {"role": role, "content": message.content or ""}
    if message.name is not None:
        turn["name"] = message.name
    if message.reasoning is not None:
        turn["reasoning_content"] = message.reasoning
    if message.tool_call_id is not None:
        turn["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        turn["tool_calls"] = [_as_call(call) for call in message.tool_calls]
    return turn


def _as_call(call: CalledFunction) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.call_id, "type": "function", "function": function}


def _cut_after(text: str, content: str) -> str:
    """`text` without what the template puts behind the last message."""
    content = content.strip()
    place = text.rfind(content)
    if not content or place < 0:
        raise TemplateError(
            "continue_final_message needs a last message with a content that the chat template "
            "shows as it is",
            param="continue_final_message",
        )
    return text[: place + len(content)]
