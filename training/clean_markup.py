"""HTML in a training text: what a page shows stays, what it is made of goes.

Not a parser: scraped text holds pieces of pages, and prose holds "a < b". So only elements of HTML
count as tags, by name. Every search is linear, whatever the text: an opening without its end is
looked for once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.entities import html5

__all__ = ["drop_markup"]

# Spans whose content is not shown, and what ends them.
_HIDDEN = {"<!--": "-->", "<script": "</script>", "<style": "</style>"}
_HIDDEN_START = re.compile("|".join(_HIDDEN), re.IGNORECASE)
_ENDS = {start: re.compile(end, re.IGNORECASE) for start, end in _HIDDEN.items()}

_BLOCKS = (
    "address|article|aside|blockquote|body|br|center|dd|div|dl|dt|figcaption|figure|footer|form|"
    "h[1-6]|head|header|hr|html|li|main|nav|ol|p|pre|section|table|tbody|td|tfoot|th|thead|title|"
    "tr|ul"
)
_INLINES = (
    "a|abbr|b|big|button|cite|code|del|em|font|i|iframe|img|input|ins|kbd|label|link|mark|meta|"
    "noscript|option|q|s|samp|select|small|span|strike|strong|sub|sup|tt|u|var"
)
_BLOCK_TAG = re.compile(rf"</?(?:{_BLOCKS})(?:[\s/][^<>]*)?>", re.IGNORECASE)
_INLINE_TAG = re.compile(rf"</?(?:{_INLINES})(?:[\s/][^<>]*)?>", re.IGNORECASE)
_ENTITY = re.compile(r"&(#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")


def drop_markup(text: str) -> str:
    """`text` without tags, comments, scripts and styles, its entities read.

    The tags of paragraphs, list items, table cells and the like become line ends. Entities may
    stand for any character, so this comes before the steps that judge characters.
    """
    if "<" in text:
        text = "".join(_shown(text))
        text = _INLINE_TAG.sub("", _BLOCK_TAG.sub("\n", text))
    return _ENTITY.sub(_character, text)


def _shown(text: str) -> Iterator[str]:
    """The parts of `text` outside hidden spans; one that never ends is left in."""
    start = 0
    endless: set[str] = set()
    while match := _HIDDEN_START.search(text, start):
        kind = match[0].lower()
        end = None if kind in endless else _ENDS[kind].search(text, match.end())
        if end is None:
            endless.add(kind)
            yield text[start : match.end()]
            start = match.end()
        else:
            yield text[start : match.start()]
            start = end.end()
    yield text[start:]


def _character(match: re.Match[str]) -> str:
    """What an entity stands for; itself where HTML knows no such entity."""
    name = match[1]
    if not name.startswith("#"):
        return html5.get(f"{name};", match[0])
    is_hex = name[1] in "xX"
    code = int(name[2:], 16) if is_hex else int(name[1:])
    return chr(code) if 0 < code < 0xD800 or 0xDFFF < code < 0x110000 else match[0]
