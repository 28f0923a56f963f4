"""What a text must look like, as a mask over the next token.

A request may come with a grammar. Its matcher, compiled elsewhere (`grammar_compiler.py`), follows
the tokens of one choice and says which may come next: the packed mask goes to the runner with the
row, in the engine's process from beginning to end. Masks follow from the tokens alone, so a
preempted or resumed sequence has the ones it would have had.

Shapes: V vocabulary. Bit i % 32 of word i // 32 stands for the token i.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from itertools import chain
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..runners.protocol import MaskArray

if TYPE_CHECKING:
    from .step import Step

__all__ = ["Constraint", "Grammar", "GrammarKind", "Matcher", "constrain"]


class GrammarKind(StrEnum):
    """The language that a grammar is written in."""

    JSON_SCHEMA = "json_schema"
    """A JSON schema; the text is a value that it describes."""
    REGEX = "regex"
    """A regular expression without look-around, matched by the whole text."""
    CHOICE = "choice"
    """A JSON list of texts; the text is one of them."""
    LARK = "lark"
    """A context-free grammar in Lark's notation, with the library's `%json` and `%regex`."""
    GBNF = "gbnf"
    """A context-free grammar in llama.cpp's notation."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """What the text of every choice must match."""

    kind: GrammarKind
    text: str
    param: str = "response_format"
    """The request's field that it comes from, for errors."""


class Matcher(Protocol):
    """A compiled grammar's state after some tokens of one choice."""

    def copy(self) -> Matcher:
        """An independent matcher in the same state."""

    def advance(self, token_ids: list[int]) -> None:
        """Go on by tokens that the masks allowed."""

    def mask(self) -> MaskArray:
        """[ceil(V / 32)] the tokens that may come next; end ids where the text may end."""

    def error(self) -> str | None:
        """Why it cannot go on, if it cannot: no token is allowed then."""


class Constraint:
    """A matcher that follows one sequence."""

    __slots__ = ("_matcher", "_num_seen", "_num_words")

    def __init__(self, matcher: Matcher, *, num_prompt_tokens: int, vocab_size: int) -> None:
        """`matcher` is at the beginning of the text, and this sequence's own."""
        self._matcher = matcher
        self._num_seen = num_prompt_tokens
        self._num_words = -(-vocab_size // 32)

    @property
    def error(self) -> str | None:
        """Why no token is allowed, where it is the matcher's doing."""
        return self._matcher.error()

    def mask_after(self, token_ids: list[int]) -> MaskArray:
        """The mask for the token after `token_ids`, a longer list each time."""
        self._matcher.advance(token_ids[self._num_seen :])
        self._num_seen = len(token_ids)
        if self._matcher.error() is not None:
            return np.zeros(self._num_words, dtype=np.uint32)
        return self._matcher.mask()


def constrain(step: Step) -> None:
    """Give every row of `step` that a grammar rules the mask of the token to be drawn."""
    drawing = (chunk.sequence for chunk in step.chunks if chunk.num_draws)
    for sequence in chain(step.decodes, drawing):
        if sequence.constraint is not None:
            mask = sequence.constraint.mask_after(sequence.token_ids)
            sequence.sampling.allowed_mask = mask
