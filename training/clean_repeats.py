"""Text that says the same thing twice: in a row within a document, or in document after document.

The first comes from cutting a text into overlapping pieces and joining them again; the second from
menus, notices and footers of pages. Both teach a model to recite (Lee et al., Deduplicating
Training Data Makes Language Models Better, arXiv:2107.06499).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from llmserve.text.cleaning import tidy_spaces

__all__ = ["drop_boilerplate", "drop_repeats", "find_boilerplate"]

MIN_REPEAT_CHARS = 30
"""A shorter run may be repeated on purpose."""
MAX_REPEAT_CHARS = 2000
"""A second copy is looked for this far from the first."""
MIN_BOILERPLATE_CHARS = 20
"""A shorter line may be said in many documents."""
MIN_BOILERPLATE_DOCUMENTS = 10
BOILERPLATE_SHARE = 0.05


def drop_repeats(text: str) -> str:
    """`text` with every run that follows itself at once kept once.

    A run begins with a line and has 30 to 2000 characters; its copy may begin inside a line. A
    refrain of that length that is sung twice in a row is kept once, too. O(characters).
    """
    return "".join(_parts(text))


def find_boilerplate(documents: Sequence[str]) -> set[str]:
    """Lines of 20 characters or more that stand in 5 % of the documents and in 10 at least."""
    counts: Counter[str] = Counter()
    for document in documents:
        counts.update({line for line in document.split("\n") if _is_long(line)})
    limit = max(MIN_BOILERPLATE_DOCUMENTS, BOILERPLATE_SHARE * len(documents))
    return {line for line, count in counts.items() if count >= limit}


def drop_boilerplate(document: str, boilerplate: set[str]) -> str:
    """`document` without the lines in `boilerplate` and the gaps they would leave."""
    lines = document.split("\n")
    kept = [line for line in lines if line not in boilerplate]
    return document if len(kept) == len(lines) else tidy_spaces("\n".join(kept))


def _is_long(line: str) -> bool:
    return len(line.strip()) >= MIN_BOILERPLATE_CHARS


def _parts(text: str) -> Iterator[str]:
    """What is kept of `text`, line by line."""
    start = 0
    while start < len(text):
        length = _repeat_at(text, start)
        if length:
            start += length  # the copy that is kept begins here
            continue
        end = text.find("\n", start) + 1 or len(text)
        yield text[start:end]
        start = end


def _repeat_at(text: str, start: int) -> int:
    """Characters of the run at `start` that is followed by its copy; 0: there is none."""
    head = text[start : start + MIN_REPEAT_CHARS]
    if len(head.strip()) < MIN_REPEAT_CHARS // 2:
        return 0
    # Found sooner than a head's length on, it is a rule of dashes or the like: left alone.
    copy = text.find(head, start + 1, start + MAX_REPEAT_CHARS + MIN_REPEAT_CHARS)
    if copy < start + MIN_REPEAT_CHARS:
        return 0
    run = text[start:copy].rstrip("\n")  # its copy may end with the text
    return copy - start if text.startswith(run, copy) else 0
