"""Prose out of reference manuals: paragraphs that read as sentences, each said once.

Reference text is sentences between signatures, examples, tables and markup. A paragraph is kept
when all its signs say "sentence": it starts like one, ends like one, and is made of words. Wrapped
lines are joined, so that a line break in the result always means a new paragraph.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

__all__ = ["NoveltyFilter", "prose_paragraphs"]

MIN_WORDS = 4
MIN_WORDS_OF_PARAMETER = 8
"""Words of a paragraph that opens with the lower-case name of a parameter."""
MIN_LETTER_SHARE = 0.76
"""Letters and spaces among all characters; code and tables have less."""

_PUNCTUATION = str.maketrans(
    {
        "\N{LEFT SINGLE QUOTATION MARK}": "'",
        "\N{RIGHT SINGLE QUOTATION MARK}": "'",
        "\N{LEFT DOUBLE QUOTATION MARK}": '"',
        "\N{RIGHT DOUBLE QUOTATION MARK}": '"',
        "\N{EN DASH}": "-",
        "\N{EM DASH}": "--",
        "\N{HORIZONTAL ELLIPSIS}": "...",
        "\N{NO-BREAK SPACE}": " ",
    }
)
_BLANK_LINE = re.compile(r"\n[ \t]*\n")
_BULLET = re.compile(r"^(?:[*+-]|\(?\w{1,2}[.)])[ \t]+(?=\S)")
_TABLE = re.compile(r"([=\-~*^#+_.])\1{3,}|\S {3,}\S")
_FIELD = re.compile(r"^:(?:param|type|return|returns|rtype|raises?)\b[^:]*:\s*")
_ROLE = re.compile(r":\w+(?::\w+)?:`")
_EMPHASIS = re.compile(r"(?<![\w*])\*{1,2}([A-Za-z][\w .,-]*?)\*{1,2}(?![\w*])")
_BACKTICKS = re.compile(r"`+([^`]+)`+_*")
_CODE = re.compile(
    r">>>|Traceback \(|::=|\|\||\\|[|#]|://|\b(?:self|def|import) \w+\(|^\s*(?:\.\.|@|:\w+)"
)
_CAPITALIZED = re.compile(r"""["'(]?[A-Z]""")
_PARAMETER = re.compile(
    r"""["']?[a-z]\w*["']?(?: \([^)]*\))?(?::| --?| is| are| may| can| should| must) \w"""
)
_ENDS = re.compile(r"""[.!?:]["')]?$""")
_LACKS_STOP = re.compile(r"""[A-Za-z0-9)"']$""")
_WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?")


def prose_paragraphs(text: str) -> Iterator[str]:
    """Paragraphs of `text` that are prose, unwrapped, without markup, in ASCII."""
    for block in _BLANK_LINE.split(text.translate(_PUNCTUATION)):
        lines = [line for line in block.splitlines() if line.strip()]
        if any(_TABLE.search(line.strip()) for line in lines):
            continue
        items = list(_items(lines))
        for item in items:
            line = _plain(" ".join(item))
            paragraph = _closed(line) if len(items) == 1 else line
            if _is_prose(paragraph):
                yield paragraph


def _items(lines: list[str]) -> Iterator[list[str]]:
    """The lines of each entry where layout shows a list; else all lines as one entry."""
    indents = [len(line) - len(line.lstrip()) for line in lines]
    is_paragraph = len(set(indents[1:])) <= 1 and indents[:1] <= indents[1:2]
    item: list[str] = []
    start = 0
    for line, indent in zip(lines, indents, strict=True):
        is_deeper_list = item and item[-1].endswith(":") and indent > start
        is_start = not is_paragraph and (indent <= start or is_deeper_list)
        if item and (is_start or _BULLET.match(line.strip())):
            yield item
            item = []
        if not item:
            start = indent
        item.append(line.strip())
    if item:
        yield item


def _plain(line: str) -> str:
    """`line` without list marks, reStructuredText roles, emphasis and repeated spaces."""
    line = _FIELD.sub("", _BULLET.sub("", line))
    line = _BACKTICKS.sub(r"\1", _ROLE.sub("`", line))
    return " ".join(_EMPHASIS.sub(r"\1", line).replace("::", ":").split())


def _closed(line: str) -> str:
    """With the full stop that short descriptions often lack."""
    return line + "." if _LACKS_STOP.search(line) and not _ENDS.search(line) else line


def _is_prose(paragraph: str) -> bool:
    if not paragraph.isascii() or _CODE.search(paragraph) or not _ENDS.search(paragraph):
        return False
    num_words = len(_WORD.findall(paragraph))
    if _PARAMETER.match(paragraph):
        is_long = num_words >= MIN_WORDS_OF_PARAMETER
    else:
        is_long = num_words >= MIN_WORDS and _CAPITALIZED.match(paragraph) is not None
    letters = sum(char.isalpha() or char == " " for char in paragraph)
    return is_long and letters >= MIN_LETTER_SHARE * len(paragraph)


class NoveltyFilter:
    """Remembers runs of words and refuses a paragraph made mostly of runs seen before."""

    def __init__(self, *, run_words: int = 5, max_seen_share: float = 0.5) -> None:
        self._run_words = run_words
        self._max_seen_share = max_seen_share
        self._seen: set[tuple[str, ...]] = set()

    def is_new(self, paragraph: str) -> bool:
        """Whether `paragraph` says something new; if so, it is remembered. O(words)."""
        words = [word.casefold() for word in _WORD.findall(paragraph)]
        length = min(self._run_words, len(words))
        runs = {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}
        if not runs or len(runs & self._seen) > self._max_seen_share * len(runs):
            return False
        self._seen |= runs
        return True
