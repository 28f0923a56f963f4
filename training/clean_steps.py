"""The steps of cleaning by name, in the one order in which they make sense.

`markup` and `json` undo what a text was wrapped in, so they come first; what judges whole
documents comes after all that changes them.
"""

from __future__ import annotations

from llmserve.errors import ConfigError

__all__ = ["DEFAULT_STEPS", "STEPS", "parse_steps"]

STEPS = {
    "markup": "HTML's tags, comments, scripts and styles; entities become characters",
    "json": "lines of JSON punctuation, quotes at their seams, escapes in one-line texts",
    "controls": "control and invisible characters; every line end becomes a newline",
    "unicode": "NFC; every wide or fixed space becomes a plain one",
    "repeats": "runs of 30 to 2000 characters that follow themselves at once",
    "spaces": "trailing spaces, blank lines but one in a row",
    "boilerplate": "lines that stand in 5 % of the documents, in 10 at least",
    "duplicates": "documents that stood before, white space aside",
    "near-duplicates": "documents of Jaccard similarity 0.8 with one that stood before",
    "quality": "documents that do not read like language, whatever the language",
}
"""Every step and what it takes away, in the order in which they run."""

DEFAULT_STEPS = "controls,unicode,spaces"
"""What any text needs and no text is harmed by."""


def parse_steps(text: str) -> tuple[str, ...]:
    """The steps of a list of names with commas between, `all` or `none`, in the order they run.

    Raises:
        ConfigError: an unknown name.
    """
    names = {name.strip() for name in text.split(",")} - {""}
    if names == {"all"}:
        return tuple(STEPS)
    if names == {"none"}:
        return ()
    if not names or names - STEPS.keys():
        raise ConfigError(
            f"cleaning must be all, none or some of {', '.join(STEPS)} with commas between, "
            f"got {text!r}"
        )
    return tuple(name for name in STEPS if name in names)
