"""Pairs of answers to one prompt, the better one named, as two conversations."""

from __future__ import annotations

from llmserve.errors import DataError

from .finetune_chats import ChatEncoder, Message, read_prompt
from .finetune_examples import Lengths, TokenRow
from .finetune_rows import Row

__all__ = ["encode_pair"]


def encode_pair(
    encoder: ChatEncoder, row: Row, lengths: Lengths
) -> tuple[TokenRow, TokenRow] | None:
    """Chosen and rejected answer after their prompt; None if `lengths` left the row out.

    Raises `DataError`, naming the place, for a row of another shape or two equal answers.
    """
    prompt = read_prompt(row)
    chosen, rejected = (_answer(row, name) for name in ("chosen", "rejected"))
    if chosen == rejected:
        raise DataError(f"{row.place}: the chosen and the rejected answer are the same")
    first = len(prompt)
    texts = [
        lengths.fit(encoder.encode([*prompt, answer], row.place, first=first), row.place)
        for answer in (chosen, rejected)
    ]
    if texts[0] is None or texts[1] is None:
        return None
    if texts[0].ids == texts[1].ids:  # they differed behind the cut
        lengths.num_dropped += 1
        return None
    return texts[0], texts[1]


def _answer(row: Row, name: str) -> Message:
    """A string, or a list of messages of which the last one is the answer."""
    value = row.values.get(name)
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[-1].get("content")
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{row.place}: the field {name!r} must hold an answer, got {value!r:.80}")
    return {"role": "assistant", "content": value}
