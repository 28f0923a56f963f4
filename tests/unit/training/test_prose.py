"""Telling prose from the rest of a manual."""

from __future__ import annotations

import pytest

from llmserve.training.prose import NoveltyFilter, prose_paragraphs


def prose(text: str) -> list[str]:
    return list(prose_paragraphs(text))


def test_wrapped_lines_are_joined() -> None:
    assert prose("Return the number of items\n   that the list holds.") == [
        "Return the number of items that the list holds."
    ]


def test_markup_goes_and_its_text_stays() -> None:
    text = "Return *width* characters of ``text``, see :meth:`str.center` for **more** of it."
    assert prose(text) == ["Return width characters of text, see str.center for more of it."]


def test_typographic_signs_become_ascii() -> None:
    assert prose("The \u201cname\u201d is the user\u2019s choice \u2013 always.") == [
        'The "name" is the user\'s choice - always.'
    ]


def test_missing_full_stop_is_added() -> None:
    assert prose("Return the size of the file") == ["Return the size of the file."]


def test_parameters_are_paragraphs_of_their_own() -> None:
    text = (
        "Arguments:\n"
        "  name: the name of the file that is opened\n"
        "    and read to its end.\n"
        "  mode: how it is opened, which is to read it if nothing is said.\n"
    )
    assert prose(text) == [
        "name: the name of the file that is opened and read to its end.",
        "mode: how it is opened, which is to read it if nothing is said.",
    ]


@pytest.mark.parametrize(
    "text",
    [
        ">>> print(1)\n1",
        "def f(x):\n    return x",
        "assert_stmt ::= 'assert' expression",
        "+-----+------+\n| One | Two words here now. |",
        "A heading that looks like prose\n===============================",
        "See https://example.org for all of the details.",
        ".. note:: This is a directive with some text.",
        "str.split(sep=None, maxsplit=-1)",
        "Too short.",
        "0 1 2 3 (4) [5] 6 7 8 9 a b c d = 5.",
        "Stra\u00dfe is a word with a letter that is not ASCII.",
    ],
)
def test_what_is_no_prose_goes(text: str) -> None:
    assert prose(text) == []


def test_repetition_is_refused_and_novelty_kept() -> None:
    novelty = NoveltyFilter()
    assert novelty.is_new("Return a copy of the string with its first character capitalized.")
    assert not novelty.is_new("Return a copy of the string with its first character in upper case.")
    assert novelty.is_new("Split the string at every line break and return a list of lines.")
