"""From a grammar's text to a matcher: the one door to llguidance, which is loaded at first use.

Compilation and each mask have a budget of work, counted by the library and not by a clock: what is
too complex fails the same way everywhere, and alone. Derivative-based regular expressions over an
Earley parser: https://github.com/guidance-ai/llguidance (docs/toktrie.md).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from ..errors import MissingDependencyError, RequestError
from ..runners.protocol import MaskArray, RunnerInfo
from .grammar import Grammar, GrammarKind

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer

__all__ = ["JSON_OPTIONS", "GrammarCompiler", "LLGuidanceMatcher", "Library"]

JSON_OPTIONS = {"whitespace_flexible": True, "whitespace_pattern": " ?"}
"""One space between the parts of a value at most: small models fill their budget of tokens with
line breaks where they may."""

ROW_ITEMS, STEP_FUEL, STEP_ITEMS = 500, 50_000, 5_000
"""Work for one mask, in the library's units: a few milliseconds at most."""

MAX_MESSAGE_CHARS = 300


class Library(Protocol):
    """What is used of the module llguidance."""

    LLTokenizer: Any
    LLMatcher: Any
    LLParserLimits: Any
    TokenizerWrapper: Any

    def grammar_from(self, kind: str, text: str) -> str:
        """A grammar in the library's own form."""


def _load_library() -> Library:
    try:
        import llguidance
    except ImportError as error:
        raise MissingDependencyError(
            "llguidance", extra="structured", feature="structured output"
        ) from error
    return cast("Library", llguidance)


class GrammarCompiler:
    """Compiles grammars for one model. Threads may compile at the same time."""

    def __init__(self, tokenizer: Tokenizer, info: RunnerInfo) -> None:
        """O(vocabulary), some milliseconds.

        Raises:
            MissingDependencyError: llguidance is not installed.
        """
        self._library = library = _load_library()
        vocabulary = _Vocabulary(tokenizer, info)
        self._tokenizer = library.LLTokenizer(
            library.TokenizerWrapper(vocabulary), eos_token=list(info.eos_token_ids)
        )
        self._limits = library.LLParserLimits(
            max_items_in_row=ROW_ITEMS,
            step_lexer_fuel=STEP_FUEL,
            step_max_items=STEP_ITEMS,
            verbose_errors=False,
        )

    def compile(self, grammar: Grammar) -> LLGuidanceMatcher:
        """The matcher of a text that has not begun.

        Raises:
            RequestError: the grammar is malformed, not satisfiable, or too complex.
        """
        try:
            source = self._source(grammar)
        except ValueError as error:
            raise _refusal(grammar, str(error)) from error
        matcher = LLGuidanceMatcher(
            self._library.LLMatcher(self._tokenizer, source, log_level=0, limits=self._limits)
        )
        if matcher.error() is None:
            matcher.mask()  # a grammar that allows nothing, or too much work, shows here
        if (message := matcher.error()) is not None:
            raise _refusal(grammar, message)
        return matcher

    def _source(self, grammar: Grammar) -> str:
        if grammar.kind is GrammarKind.JSON_SCHEMA:
            matcher_type = self._library.LLMatcher
            return str(matcher_type.grammar_from_json_schema(grammar.text, JSON_OPTIONS))
        if grammar.kind is GrammarKind.CHOICE:
            choices = json.loads(grammar.text)
            return self._library.grammar_from(
                "lark",
                "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in choices),
            )
        return self._library.grammar_from(grammar.kind.value, grammar.text)


class LLGuidanceMatcher:
    """A matcher of the library's. Implements `Matcher`."""

    __slots__ = ("_inner",)

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def copy(self) -> LLGuidanceMatcher:
        """An independent matcher in the same state."""
        return LLGuidanceMatcher(self._inner.deep_copy())

    def advance(self, token_ids: list[int]) -> None:
        """Go on by tokens; one that was not allowed leaves the matcher in error."""
        if token_ids:
            self._inner.consume_tokens(token_ids)

    def mask(self) -> MaskArray:
        """[ceil(V / 32)] the tokens that may come next."""
        return np.frombuffer(self._inner.compute_bitmask(), dtype=np.uint32)

    def error(self) -> str | None:
        """Why it cannot go on, if it cannot."""
        return _short(self._inner.get_error()) if self._inner.is_error() else None


class _Vocabulary:
    """A tokenizer in the shape that the library asks for."""

    def __init__(self, tokenizer: Tokenizer, info: RunnerInfo) -> None:
        self._tokenizer = tokenizer
        self.tokens = [tokenizer.token_bytes(token_id) for token_id in range(info.vocab_size)]
        self.eos_token_id = info.eos_token_ids[0]
        self.bos_token_id = tokenizer.bos_token_id
        self.special_token_ids = sorted(tokenizer.special_ids)
        self._ids = {text: token_id for token_id, text in enumerate(self.tokens) if text}
        self._longest = max(map(len, self._ids), default=1)

    def __call__(self, text: str | bytes) -> list[int]:
        """Ids of a text that is fixed: the tokenizer's own where they say just that text."""
        wanted = text.encode() if isinstance(text, str) else text
        try:
            ids = self._tokenizer.encode(wanted.decode("utf-8"), add_special_tokens=False)
        except (RequestError, UnicodeDecodeError):
            return self._longest_first(wanted)
        for start in range(len(ids)):  # a tokenizer may put a space before every text
            if self._spell(ids[start:]) == wanted:
                return ids[start:]
        return self._longest_first(wanted)

    def _spell(self, ids: Sequence[int]) -> bytes:
        return b"".join(self.tokens[token_id] for token_id in ids)

    def _longest_first(self, wanted: bytes) -> list[int]:
        ids, start = [], 0
        while start < len(wanted):
            for size in range(min(self._longest, len(wanted) - start), 0, -1):
                if (token_id := self._ids.get(wanted[start : start + size])) is not None:
                    ids.append(token_id)
                    start += size
                    break
            else:
                break  # no token of this model says the rest: its masks will allow none
        return ids


def _refusal(grammar: Grammar, message: str) -> RequestError:
    return RequestError(
        f"the {grammar.kind.value.replace('_', ' ')} cannot be used: {_short(message)}",
        param=grammar.param,
    )


def _short(message: str) -> str:
    """One line, and not all of what the client sent."""
    return " ".join(message.split())[:MAX_MESSAGE_CHARS]
