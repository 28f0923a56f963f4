"""Conversations in the data, and their token ids with the assistant's words marked.

Rows are chats ({"messages": [{"role", "content"}, ...]}), instructions ({"instruction", "input",
"output"}) or pairs of prompt and response. The model's chat template makes the text, exactly as it
does when the model is served; a model without one gets the plain template below, which is saved
into its folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmserve.errors import ConfigError, DataError, TemplateError
from llmserve.text.chat_template import ChatTemplate
from llmserve.text.tokenizer import Tokenizer

from .finetune_examples import TokenRow
from .finetune_rows import Row

__all__ = ["PLAIN_TEMPLATE", "ChatEncoder", "Message", "read_chat", "read_prompt"]

Message = dict[str, str]

PLAIN_TEMPLATE = (
    "{{ bos_token if bos_token is defined else '' }}"
    "{% for message in messages %}"
    "{{ '### ' + message['role'] + ':\\n' + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '' }}"
    "{{ '\\n\\n' }}"
    "{% endfor %}"
    "{{ '### assistant:\\n' if add_generation_prompt else '' }}"
)
"""The template of models that have none: a heading for every turn, an end id after answers."""

_ROLES = ("system", "user", "assistant", "tool")


def read_chat(row: Row) -> list[Message]:
    """The conversation of a row; its last turn, at least, is the assistant's.

    Raises `DataError`, naming the place, for a row of another shape or an empty response.
    """
    if "messages" in row.values:
        messages = _messages(row, "messages")
    else:
        response = "output" if "instruction" in row.values else "response"
        answer = {"role": "assistant", "content": row.text(response)}
        messages = [*read_prompt(row), answer]
    if not messages or messages[-1]["role"] != "assistant":
        raise DataError(f"{row.place}: the last message is not the assistant's")
    return messages


def read_prompt(row: Row) -> list[Message]:
    """The turns before the answer: `prompt`, text or messages, or `instruction` with `input`.

    Raises `DataError`, naming the place, for a row of another shape.
    """
    if isinstance(row.values.get("prompt"), list):
        return _messages(row, "prompt")
    if "instruction" in row.values:
        parts = (row.text("instruction"), row.text("input", is_required=False))
        content = "\n\n".join(part for part in parts if part)
    else:
        content = row.text("prompt")
    return [{"role": "user", "content": content}]


def _messages(row: Row, name: str) -> list[Message]:
    values = row.values[name]
    if not isinstance(values, list):
        raise DataError(f"{row.place}: {name!r} must be a list of messages")
    return [_message(value, f"{row.place}: message {i}") for i, value in enumerate(values, 1)]


def _message(value: Any, place: str) -> Message:
    role, content = (
        (value.get("role"), value.get("content")) if isinstance(value, dict) else (None, None)
    )
    if role not in _ROLES or not isinstance(content, str):
        raise DataError(
            f"{place}: must have a role ({', '.join(_ROLES)}) and a string content, got "
            f"{value!r:.80}"
        )
    if role == "assistant" and not content.strip():
        raise DataError(f"{place}: the response is empty")
    return {"role": role, "content": content}


class ChatEncoder:
    """Turns conversations into ids by a model's template. Not changed by use."""

    def __init__(self, tokenizer: Tokenizer, *, template: str | None = None) -> None:
        """Use `template`, the tokenizer's own, or the plain one, the first that there is.

        Raises:
            ConfigError: the template is none, or the plain one is needed and no id ends a text.
        """
        self._tokenizer = tokenizer
        self.source = template or tokenizer.chat_template or PLAIN_TEMPLATE
        """The template's text."""
        if self.source == PLAIN_TEMPLATE and "eos_token" not in tokenizer.special_tokens:
            raise ConfigError(
                "the model has no chat template, and its tokenizer names no eos_token to end "
                "answers with: give a template with --chat-template"
            )
        try:
            self._template = ChatTemplate.for_tokenizer(tokenizer, source=self.source)
        except TemplateError as error:
            raise ConfigError(f"chat template: {error}") from error

    def encode(self, messages: Sequence[Message], place: str, *, first: int = 0) -> TokenRow:
        """The ids of a conversation; to be predicted are the answers from message `first` on.

        An answer includes what the template puts after it, up to the end id. `place` is for
        messages.

        Raises:
            DataError: the template refuses the conversation, or renders a turn otherwise once
                others follow it, so that an answer has no fixed place.
        """
        text = self._render(messages, place)
        spans = [
            self._span(messages, index, text, place)
            for index in range(first, len(messages))
            if messages[index]["role"] == "assistant"
        ]
        [(ids, offsets)] = self._tokenizer.encode_with_offsets([text], add_special_tokens=False)
        is_target = [
            any(start < high and low < end for low, high in spans) for start, end in offsets
        ]
        row = TokenRow.predicting(ids, is_target)
        if not row.num_targets:
            raise DataError(f"{place}: the template leaves nothing of the answer to learn from")
        return row

    def end_id(self, row: TokenRow) -> int | None:
        """The special id that ends the row's last answer; None if another ends it."""
        last = next((token for token in reversed(row.targets) if token >= 0), None)
        return last if last in self._tokenizer.special_ids else None

    def _span(
        self, messages: Sequence[Message], index: int, text: str, place: str
    ) -> tuple[int, int]:
        """From and to which character of `text` the answer at `index` reaches."""
        before = self._render(messages[:index], place, is_open=True)
        through = self._render(messages[: index + 1], place).rstrip()
        if not (text.startswith(through) and through.startswith(before.rstrip())):
            raise DataError(
                f"{place}: the chat template renders message {index + 1} otherwise when others "
                "follow it; give one row for each answer"
            )
        return len(before), len(through)

    def _render(self, messages: Sequence[Message], place: str, *, is_open: bool = False) -> str:
        try:
            return self._template.render(messages, add_generation_prompt=is_open)
        except TemplateError as error:
            raise DataError(f"{place}: {error}") from error
