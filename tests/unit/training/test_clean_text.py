"""Steps that change texts: what goes, what stays, and how long the worst text takes."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmserve.training.clean_json import drop_json_debris
from llmserve.training.clean_markup import drop_markup
from llmserve.training.clean_repeats import drop_boilerplate, drop_repeats, find_boilerplate

LINE = "The quick brown fox jumps over the lazy dog"


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("<p class='x'>One</p><p>two &amp; <b>three</b></p>", "\nOne\n\ntwo & three\n"),
        ("a<br/>b<BR>c", "a\nb\nc"),
        ("a <!-- not\nshown --> b", "a  b"),
        ("a<script type='x'>if (a<b) {}</SCRIPT>b<style>p {}</style>c", "abc"),
        ("a <!-- never ends", "a <!-- never ends"),
        ("&lt;p&gt; &#233;&#xe9; &nbsp;&hellip;", "<p> éé \N{NO-BREAK SPACE}…"),
        ("&#0; &#xD800; &#x110000; &nosuchname; AT&T; ?a=1&copy=2", None),
        ("a < b and b > c, <0x41>, <name>, x<y>z", None),
        ("<|endoftext|> \u2039p\u203a", None),
    ],
)
def test_markup(raw: str, clean: str | None) -> None:
    assert drop_markup(raw) == (raw if clean is None else clean)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ('end."\n  ],\n  [\n    "Next\nline', "end.\nNext\nline"),
        ('end.",\n    ...\n    "Next', "end.\nNext"),
        ('end.",\n    "Next', "end.\nNext"),
        ('"Yes," he said.\n"No."', None),
        ('He said "no"\n\n    "Quoted and indented', None),
        ("(1, 2)\n* * *\n:\n,", None),
        ("a list [1]\n[see below]", None),
        ('one\\ntwo \\"x\\" \\u00e9 \\ud83d\\ude00', 'one\ntwo "x" é 😀'),
        ('print("\\\\n")\nprint("\\n")', None),
        ("\\nu is a letter\n\\nabla too", None),
        ("no break and \\u00e9", None),
    ],
)
def test_json_debris(raw: str, clean: str | None) -> None:
    assert drop_json_debris(raw) == (raw if clean is None else clean)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        (f"{LINE}\n{LINE}\n", f"{LINE}\n"),
        (f"{LINE}{LINE}", LINE),
        (f"{LINE}\n{LINE}\n{LINE}\nend", f"{LINE}\nend"),
        (f"a\n{LINE},\nb and c.{LINE},\nb and c.\nd", f"a\n{LINE},\nb and c.\nd"),
        (f"{LINE}\nsomething else\n{LINE}", None),
        ("Row, row,\nRow, row,\nRow", None),
        ("-" * 200, None),
        ("\n" * 200, None),
    ],
)
def test_repeats(raw: str, clean: str | None) -> None:
    assert drop_repeats(raw) == (raw if clean is None else clean)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("ab \n", max_size=50), max_size=6), st.text("abc \n", max_size=60))
def test_repeats_takes_nothing_but_copies(parts: list[str], tail: str) -> None:
    """What goes is each time a copy of what stays: every line of the text is still in it."""
    text = "\n".join(parts * 2) + tail
    assert set(drop_repeats(text)) == set(text)
    assert drop_repeats(text) in text or len(drop_repeats(text)) < len(text)


def test_boilerplate_is_what_many_documents_say() -> None:
    menu = "Home | About | Contact us | Imprint"
    documents = [f"{menu}\nText {i}\nshort\n{menu}" for i in range(10)] + ["Another."] * 100
    assert find_boilerplate(documents) == {menu}
    assert drop_boilerplate(documents[3], {menu}) == "Text 3\nshort"
    assert find_boilerplate(documents[:9]) == set()
    assert find_boilerplate(documents + ["Other text."] * 200) == set()  # 10 of 310


@pytest.mark.parametrize("step", [drop_markup, drop_json_debris, drop_repeats])
@pytest.mark.parametrize(
    "unit",
    [
        "<!--",
        "<script",
        "<p ",
        "<",
        "&#",
        "\\u",
        "\\n",
        "\n ",
        "[",
        '",\n  "',
        "a",
        "ab" * 700 + "c",
    ],
)
def test_no_text_takes_unreasonable_time(step: Callable[[str], str], unit: str) -> None:
    begin = time.process_time()
    step(unit * (200_000 // len(unit)) + "x")
    step("".join(f"{unit}{number}\n" for number in range(200_000 // (len(unit) + 6))))
    assert time.process_time() - begin < 5.0
