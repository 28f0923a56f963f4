r"""What is left in a text that was cut out of JSON: brackets, quotes at the seams, escapes.

    ...as well as they could.",         ← a string's end
        ...                             ← a debris line
        "The next string of the list    ← a string's beginning

Prose has quotes and ellipses too, so each is taken for debris only beside a sure sign: a line of
punctuation alone, or an end and a beginning that follow each other.
"""

from __future__ import annotations

import json
import re

__all__ = ["drop_json_debris"]

_DEBRIS = re.compile(r"""(?:[\[\]{}(),:;"'\s]|\.{3})+""")
_SIGNS = ("[", "]", "{", "}", "...")
_STRING_END = re.compile(r'",?\s*$')
_SURE_END = re.compile(r'",\s*$')
_STRING_START = re.compile(r'^\s{2,}"')
_ESCAPE = re.compile(r'(?:\\u[dD][89abAB][0-9a-fA-F]{2})?\\(?:u[0-9a-fA-F]{4}|["\\/bfnrt])')


def drop_json_debris(text: str) -> str:
    r"""`text` without JSON's punctuation, and with its escapes undone.

    A line of nothing but punctuation goes where it holds a bracket or an ellipsis, and with it the
    quote that ends the string before it or begins the string after it. Escapes (`\n`, `\"`,
    `\u00e9`) are undone in a text that has a `\n` in two characters and no line break of its own;
    elsewhere they may be code or formulas.
    """
    if "\n" not in text:
        return _ESCAPE.sub(_unescaped, text) if "\\n" in text else text
    lines = text.split("\n")
    is_debris = [_is_debris(line) for line in lines]
    last = len(lines) - 1
    kept = []
    for index, line in enumerate(lines):
        if is_debris[index]:
            continue
        before = index > 0 and (is_debris[index - 1] or _is_seam(lines[index - 1], line))
        after = index < last and is_debris[index + 1]
        seam_after = index < last and _is_seam(line, lines[index + 1])
        line = _STRING_START.sub("", line) if before else line
        kept.append(_STRING_END.sub("", line) if after or seam_after else line)
    return "\n".join(kept)


def _is_debris(line: str) -> bool:
    return any(sign in line for sign in _SIGNS) and _DEBRIS.fullmatch(line) is not None


def _is_seam(line: str, following: str) -> bool:
    """Whether one JSON string ends with `line` and the next begins with `following`."""
    return _SURE_END.search(line) is not None and _STRING_START.match(following) is not None


def _unescaped(match: re.Match[str]) -> str:
    value: str = json.loads(f'"{match[0]}"')
    return value
