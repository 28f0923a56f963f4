"""Making raw text fit for training: one form for what looks alike, nothing that cannot be seen.

Three steps that every text needs, each linear in its length; `clean_text` is all of them. What is
dropped by judging or comparing whole documents is the training's part.
"""

from __future__ import annotations

import re
import unicodedata

__all__ = ["clean_text", "drop_controls", "normalize_unicode", "tidy_spaces"]

_LINE_ENDS = re.compile(r"\r\n?|[\u2028\u2029\x85\x0b\x0c]")
_SPACES = re.compile(r"[\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]")
# Control characters but tab and newline; marks of byte order and of invisible breaks; surrogates.
_INVISIBLE = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f\u00ad\u200b\u2060\ufeff\ud800-\udfff]")
_TRAILING_SPACE = re.compile(r"(?<![ \t])[ \t]+$", re.MULTILINE)  # looks at each run once
_BLANK_LINES = re.compile(r"\n{3,}")


def clean_text(text: str) -> str:
    """Normalize `text`: the same words in the same lines, without the debris.

    Unicode NFC; every line end as a newline and every wide or fixed space as a plain one; control
    and invisible characters and lone surrogates dropped; no trailing spaces, no more than one blank
    line in a row, none at the ends. Indentation and tabs stay. Cleaning twice changes nothing more.
    """
    return tidy_spaces(normalize_unicode(drop_controls(text)))


def drop_controls(text: str) -> str:
    """Every line end as a newline; control and invisible characters and lone surrogates gone."""
    return _INVISIBLE.sub("", _LINE_ENDS.sub("\n", text))


def normalize_unicode(text: str) -> str:
    """Unicode NFC, and every wide or fixed space as a plain one.

    After `drop_controls`: letters that an invisible character parted may now join.
    """
    return unicodedata.normalize("NFC", _SPACES.sub(" ", text))


def tidy_spaces(text: str) -> str:
    """No trailing spaces, no more than one blank line in a row, none at the ends."""
    return _BLANK_LINES.sub("\n\n", _TRAILING_SPACE.sub("", text)).strip("\n")
