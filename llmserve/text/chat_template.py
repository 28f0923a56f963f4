"""Messages to the text of a prompt: the chat template of a model.

The template is a program in Jinja that came with the model; it runs in the sandbox of `sandbox.py`
and gives the text that `transformers.apply_chat_template` gives. Encode that text with
`add_special_tokens=False`: the template writes special tokens itself. As everywhere in the field,
their names become special ids wherever they stand in the text, in a user's message, too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache

from jinja2.exceptions import TemplateError as JinjaError

from ..errors import TemplateError
from ..limits import Limits
from .sandbox import RefusalError, Sandbox
from .tokenizer import Tokenizer

__all__ = ["ChatTemplate"]


class ChatTemplate:
    """A compiled chat template. Threads may render it at the same time.

    Args:
        source: The template, at most `limits.max_template_bytes`.
        special_tokens: Texts that it may use by name (`bos_token`, ...).
        limits: `max_rendered_chars` and `template_timeout_s` bound a rendering; values on the way
            may be four times as long.
        now: The clock behind `strftime_now`.

    Raises:
        TemplateError: the source is too large, no template, or uses what is not offered.
    """

    def __init__(
        self,
        source: str,
        *,
        special_tokens: Mapping[str, str] | None = None,
        limits: Limits | None = None,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        limits = limits or Limits()
        self.source = source
        if (size := len(source.encode("utf-8", "replace"))) > limits.max_template_bytes:
            raise TemplateError(
                f"the chat template has {size} bytes; at most {limits.max_template_bytes}"
            )
        self._special_tokens = dict(special_tokens or {})
        self._max_chars = limits.max_rendered_chars
        self._timeout_s = limits.template_timeout_s
        self._sandbox = Sandbox(max_size=4 * self._max_chars, now=now)
        try:
            self._template = self._sandbox.from_string(source)
        except (JinjaError, SyntaxError, RecursionError, MemoryError) as error:
            raise TemplateError(f"the chat template is not valid: {_describe(error)}") from error

    @classmethod
    def for_tokenizer(
        cls, tokenizer: Tokenizer, limits: Limits | None = None, *, source: str | None = None
    ) -> ChatTemplate:
        """The template of a model, or `source` with that model's special tokens.

        Raises:
            TemplateError: the model has none, or it cannot be used.
        """
        source = source if source is not None else tokenizer.chat_template
        if source is None:
            raise TemplateError(
                "this model has no chat template: give one with --chat-template FILE, or ask for a "
                "completion of a plain prompt",
                param="messages",
            )
        names = tuple(sorted(tokenizer.special_tokens.items()))
        return _compile(source, names, limits or Limits())

    def reads(self, name: str) -> bool:
        """Whether the template speaks of a variable of that name."""
        return re.search(rf"\b{re.escape(name)}\b", self.source) is not None

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = True,
        **variables: object,
    ) -> str:
        """The text of a conversation; with `add_generation_prompt`, up to where the model answers.

        `messages` hold plain JSON values, their `content` a string. `variables` reach the template
        by name; `tools` and `documents` are null unless given.

        Raises:
            TemplateError: the template refused the messages, failed, or went beyond a bound.
        """
        values = {
            "tools": None,
            "documents": None,
            **self._special_tokens,
            **variables,
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._generate(values)
        except TemplateError:
            raise
        except RefusalError as error:
            reason = f"the chat template refuses the messages: {_describe(error)}"
            raise TemplateError(reason, param="messages") from error
        except Exception as error:  # a program of others may fail in any way
            reason = f"the chat template failed: {_describe(error)}"
            raise TemplateError(reason, param="messages") from error

    def _generate(self, values: Mapping[str, object]) -> str:
        self._sandbox.start_clock(self._timeout_s)
        pieces, size = [], 0
        for piece in self._template.generate(values):
            self._sandbox.tick()
            size += len(piece)
            if size > self._max_chars:
                raise TemplateError(
                    f"the chat template renders more than {self._max_chars} characters",
                    param="messages",
                )
            pieces.append(piece)
        return "".join(pieces)


@lru_cache(maxsize=8)
def _compile(source: str, names: tuple[tuple[str, str], ...], limits: Limits) -> ChatTemplate:
    return ChatTemplate(source, special_tokens=dict(names), limits=limits)


def _describe(error: BaseException) -> str:
    text = str(error)[:300] or type(error).__name__
    line = getattr(error, "lineno", None)
    return f"{text} (line {line})" if line else text
