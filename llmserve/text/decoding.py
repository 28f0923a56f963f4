"""How tokens become text, one token at a time: the `decoder` part of a tokenizer.json.

Sits between sampled ids and everything that shows text: `Tokenizer.decode`, the incremental
`Detokenizer` and the token texts of logprobs all use the stream defined here, so streamed and
whole text cannot differ. The library's own decoder takes only whole sequences; running it over a
growing window costs O(n) per token while a model emits invalid bytes, and is not exact.

The decoders of byte-level and SentencePiece-like tokenizers are carried out here and every other
one is refused by name. Texts equal those of the `tokenizers` library, with one exception: where a
run of `<0xXX>` tokens is not valid UTF-8, only the stray bytes become U+FFFD, one each, as
SentencePiece does (`ProcessBytePieces`); the library also destroys the valid characters of that
run, which a stream would already have sent.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ..errors import CheckpointError

__all__ = ["DecoderSpec", "TextStream", "parse_decoder", "whole_piece"]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_UTF8 = codecs.getincrementaldecoder("utf-8")


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    """Decode every byte of an invalid sequence as one U+FFFD of its own."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error("llmserve.each_byte", _replace_each_byte)


def _byte_of_char() -> dict[str, int]:
    """The character that stands for each byte in byte-level tokens (GPT-2's table), inverted.

    Printable Latin-1 characters stand for themselves; the other bytes, in order, for U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSpec:
    """What each token adds to a text, under one tokenizer's decoder."""

    is_byte_level: bool = False
    """Token characters stand for bytes (GPT-2's table)."""
    has_byte_fallback: bool = False
    """Tokens `<0x00>` to `<0xFF>` stand for one byte each."""
    replacements: tuple[tuple[str, str], ...] = ()
    """Substitutions inside each token, in order."""
    separator: str = ""
    """Put before every token but the first."""
    dropped_at_start: str = ""
    """Removed from the first token, before the substitutions."""
    stripped: str = ""
    """One of this character is removed from the beginning of the whole text."""
    _pieces: dict[str, bytes | str] = field(default_factory=dict, compare=False, repr=False)

    def piece(self, token: str) -> bytes | str:
        """What `token` adds where another token precedes it: bytes of UTF-8, or characters."""
        piece = self._pieces.get(token)
        if piece is None:
            piece = self._pieces[token] = self._make_piece(token, self.separator)
        return piece

    def first_piece(self, token: str) -> bytes | str:
        """What `token` adds as the first of a text."""
        if self.dropped_at_start:
            token = token.replace(self.dropped_at_start, "")
        return self._make_piece(token, "")

    def _make_piece(self, token: str, separator: str) -> bytes | str:
        if self.is_byte_level:
            return _bytes_of(token)
        for old, new in self.replacements:
            token = token.replace(old, new)
        if self.has_byte_fallback and (byte := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        return separator + token


def whole_piece(piece: bytes | str) -> str | None:
    """The characters of a token's piece; None where its bytes are not whole characters."""
    if isinstance(piece, str):
        return piece
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return None


class TextStream:
    """The text of a sequence of tokens, as far as it is settled.

    O(length of the token) per push. Characters are given out once complete; bytes that may still
    become one are kept back (`is_pending`) until the next token or `flush`.
    """

    def __init__(self, spec: DecoderSpec) -> None:
        self._spec = spec
        self._is_first = True
        self._strips = bool(spec.stripped)
        self._utf8 = _UTF8("replace" if spec.is_byte_level else "llmserve.each_byte")

    @property
    def is_pending(self) -> bool:
        """Whether bytes of an unfinished character are kept back."""
        return bool(self._utf8.getstate()[0])

    @property
    def is_plain(self) -> bool:
        """Whether a token of whole characters now adds exactly those: it is not the first, and
        nothing is kept back or still to be stripped."""
        return not (self._is_first or self._strips or self.is_pending)

    def push(self, token: str) -> str:
        """Take the next token and return the characters that it settles."""
        piece = self._spec.first_piece(token) if self._is_first else self._spec.piece(token)
        self._is_first = False
        if isinstance(piece, bytes):
            return self._strip(self._utf8.decode(piece))
        if self.is_pending:  # no later byte can complete a character across a text token
            piece = self._utf8.decode(b"", final=True) + piece
        return self._strip(piece)

    def flush(self) -> str:
        """Return what was kept back, unfinished bytes as U+FFFD. The stream may go on after it."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return self._strip(text)

    def _strip(self, text: str) -> str:
        if not self._strips or not text:
            return text
        self._strips = False
        return text.removeprefix(self._spec.stripped)


def parse_decoder(decoder: object) -> DecoderSpec:
    """Read the value of `decoder` in a tokenizer.json (None: tokens joined by spaces).

    Raises:
        CheckpointError: it is none of ByteLevel, Metaspace, or a sequence of Replace, ByteFallback,
            Fuse and Strip in that order.
    """
    if decoder is None:
        return DecoderSpec(separator=" ")
    spec, last = DecoderSpec(), ""
    for step in _steps(decoder):
        kind = str(step.get("type"))
        if kind not in _FOLLOWS.get(last, ()):
            raise _unsupported(f"{kind} {f'after {last}' if last else ''}".strip())
        spec, last = _add_step(spec, kind, step), kind
    return spec


# Which decoder may follow which; "" is the beginning.
_AFTER_FALLBACK = ("Fuse",)
_AFTER_REPLACE = ("Replace", "ByteFallback", *_AFTER_FALLBACK)
_FOLLOWS = {
    "": ("ByteLevel", "Metaspace", *_AFTER_REPLACE),
    "ByteLevel": ("Fuse",),
    "Metaspace": ("Fuse",),
    "Replace": _AFTER_REPLACE,
    "ByteFallback": _AFTER_FALLBACK,
    "Fuse": ("Strip",),
}


def _add_step(spec: DecoderSpec, kind: str, step: Mapping[str, object]) -> DecoderSpec:
    if kind == "ByteLevel":
        return replace(spec, is_byte_level=True)
    if kind == "Metaspace":
        mark = _text(step, "replacement")
        drops = step.get("prepend_scheme", "always") != "never"
        return replace(spec, replacements=((mark, " "),), dropped_at_start=mark if drops else "")
    if kind == "Replace":
        pattern = step.get("pattern")
        if not isinstance(pattern, dict) or set(pattern) != {"String"}:
            raise _unsupported("Replace with a pattern that is no plain string")
        change = (_text(pattern, "String"), _text(step, "content", empty=True))
        return replace(spec, replacements=(*spec.replacements, change))
    if kind == "ByteFallback":
        return replace(spec, has_byte_fallback=True)
    if kind == "Strip":
        if (step.get("start"), step.get("stop")) != (1, 0):
            raise _unsupported("Strip of other than one leading character")
        return replace(spec, stripped=_text(step, "content"))
    return spec  # Fuse: the stream joins what the tokens add in any case


def _steps(decoder: object) -> list[Mapping[str, object]]:
    if not isinstance(decoder, dict):
        raise CheckpointError("decoder must be an object or null")
    steps = decoder.get("decoders") if decoder.get("type") == "Sequence" else [decoder]
    if not isinstance(steps, list) or any(not isinstance(step, dict) for step in steps):
        raise CheckpointError("decoder: a Sequence needs a list of decoders")
    return steps


def _text(step: Mapping[str, object], name: str, *, empty: bool = False) -> str:
    value = step.get(name)
    if not isinstance(value, str) or not (value or empty):
        raise CheckpointError(f"decoder: {name} must be a string, got {value!r}")
    return value


def _unsupported(what: str) -> CheckpointError:
    return CheckpointError(
        f"decoder {what} is not supported; supported are ByteLevel, Metaspace, and sequences of "
        "Replace, ByteFallback, Fuse and Strip"
    )


def _bytes_of(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF_CHAR[char] for char in token])
    except KeyError:  # an added token in plain text
        return token.encode()
