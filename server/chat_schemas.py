"""The request of the chat route: a conversation, tools, and how the template is to be used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field, PlainValidator, WithJsonSchema

from llmserve.engine.grammar import Grammar
from llmserve.errors import RequestError
from llmserve.limits import Limits

from .conversations import Messages
from .fields import CHAT_ONLY, UNSUPPORTED
from .grammar_fields import check_grammar
from .schemas import GenerationRequest
from .tools_fields import NamedTool, Tool, ToolChoice, Tools
from .tools_prompt import call_grammar

__all__ = ["ChatRequest"]

RESERVED_VARIABLES = frozenset({"self", "messages", "tools", "documents", "add_generation_prompt"})
"""Names in a chat template that `chat_template_kwargs` does not give."""


def _check_variables(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("takes an object")
    for name in value:
        if not name.isidentifier() or name in RESERVED_VARIABLES:
            raise ValueError(f"may not set {name[:64]!r}")
    return value


TemplateVariables = Annotated[
    dict[str, Any], PlainValidator(_check_variables), WithJsonSchema({"type": "object"})
]


class ChatRequest(GenerationRequest):
    """`POST /v1/chat/completions`."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {**UNSUPPORTED, **CHAT_ONLY}

    messages: Messages
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: TemplateVariables = Field(default_factory=dict)
    tools: Tools = ()
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True
    include_reasoning: bool = True

    @property
    def starts_turn(self) -> bool:
        """Whether the prompt goes on to where the model answers.

        Raises `RequestError` where the last message is to be gone on with, too.
        """
        if self.continue_final_message and self.add_generation_prompt:
            raise RequestError(
                "add_generation_prompt and continue_final_message exclude each other",
                param="continue_final_message",
            )
        if self.add_generation_prompt is None:
            return not self.continue_final_message
        return self.add_generation_prompt

    @property
    def offered_tools(self) -> tuple[Tool, ...]:
        """The functions that the model may call."""
        return () if self.tool_choice == "none" else self.tools

    @property
    def must_call(self) -> bool:
        """Whether the answer is a call and nothing else."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    def grammar(self, limits: Limits) -> Grammar | None:
        """Of the call, where one must be made."""
        if len(self.tools) > limits.max_tools:
            raise RequestError(
                f"{len(self.tools)} tools; this server allows {limits.max_tools}", param="tools"
            )
        grammar = super().grammar(limits)
        if not self.must_call:
            return grammar
        if grammar is not None:
            raise RequestError(
                f"{grammar.param} and tool_choice both say what the answer is: leave one out",
                param="tool_choice",
            )
        return check_grammar(call_grammar(self._callable_tools()), limits)

    def _callable_tools(self) -> list[Tool]:
        choice = self.tool_choice
        tools = [
            tool
            for tool in self.tools
            if not isinstance(choice, NamedTool) or tool.name == choice.name
        ]
        if not tools:
            raise RequestError(
                "tool_choice asks for a call of a function that tools does not hold",
                param="tool_choice",
            )
        return tools

    def token_budget(self) -> int | None:
        """`max_completion_tokens`, or its older name."""
        if self.max_completion_tokens is None:
            return self.max_tokens
        if self.max_tokens not in (None, self.max_completion_tokens):
            raise RequestError(
                "max_tokens and max_completion_tokens differ: give one", param="max_tokens"
            )
        return self.max_completion_tokens

    def num_logprobs(self) -> int | None:
        """`top_logprobs` where `logprobs` is true."""
        if self.logprobs:
            return self.top_logprobs or 0
        if self.top_logprobs:
            raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
        return None
