"""Text as it comes, while tokens are generated.

A token may end in the middle of a character: its text is given out once the character is whole.
What a stream gives out, put together, is exactly the text of all its ids at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from .tokenizer import Tokenizer

__all__ = ["Detokenizer"]

# Tokens before the answer that can still matter to it: whether there is one, and up to three bytes
# of an unfinished character, at most one to a token.
_TAIL = 3


class Detokenizer:
    """The text of one sequence, piece by piece; special tokens have none.

    With `prompt_token_ids` it goes on where their text ends: a word's leading space stays, and
    bytes left unfinished by the prompt are completed. What the prompt itself settles is not given
    out. Without a prompt the pieces add up to `Tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._stream = tokenizer.open_stream()
        last_first = tokenizer.text_tokens(reversed(prompt_token_ids))
        for token in reversed(list(islice(last_first, _TAIL))):
            self._stream.push(token)
        # Nearly every token is whole characters after others like it: one look-up then.
        self._is_plain = self._stream.is_plain

    @property
    def is_pending(self) -> bool:
        """Whether bytes of an unfinished character are kept back."""
        return not self._is_plain and self._stream.is_pending

    def push(self, token_id: int) -> str:
        """Take the next id and return the characters that it settles. O(1)."""
        if self._is_plain and (text := self._tokenizer.whole_text(token_id)) is not None:
            return text
        text = "".join(map(self._stream.push, self._tokenizer.text_tokens((token_id,))))
        self._is_plain = self._stream.is_plain
        return text

    def flush(self) -> str:
        """Return what was kept back, unfinished bytes as U+FFFD; called at the end."""
        text = self._stream.flush()
        self._is_plain = self._stream.is_plain
        return text
