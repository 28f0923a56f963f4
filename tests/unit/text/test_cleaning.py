"""What cleaning changes, and what it leaves."""

from __future__ import annotations

import time

import pytest

from llmserve.text.cleaning import clean_text


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("one\r\ntwo\rthree\u2028four\x0cfive", "one\ntwo\nthree\nfour\nfive"),
        ("e\u0301 ﬁ", "é ﬁ"),
        ("e\u200b\u0301", "é"),
        ("a\u00a0b\u3000c", "a b c"),
        ("\ufeffa\x00b\x07\x7f\u00ad\u2060c", "abc"),
        ("a\ud800b", "ab"),
        ("a  \t\nb \n", "a\nb"),
        ("a\n\n\n\n \n\nb", "a\n\nb"),
        ("\n\n    indented\n\tby tab", "    indented\n\tby tab"),
        ("👩\u200d👧 naïve — “x” \ufffd", "👩\u200d👧 naïve — “x” \ufffd"),
        ("", ""),
        (" \n ", ""),
    ],
)
def test_cleaning(raw: str, clean: str) -> None:
    assert clean_text(raw) == clean


def test_long_runs_of_spaces_take_no_unreasonable_time() -> None:
    begin = time.process_time()
    assert clean_text(" " * 200_000 + "x") == " " * 200_000 + "x"
    assert time.process_time() - begin < 5.0
