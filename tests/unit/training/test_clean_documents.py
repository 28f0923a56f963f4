"""Steps that look at all documents, against the obvious way and against known dirt."""

from __future__ import annotations

import base64
import random

import pytest

from llmserve.errors import ConfigError
from llmserve.training.clean_duplicates import (
    SHINGLE_CHARS,
    exact_duplicates,
    jaccard,
    near_duplicates,
    shingle_hashes,
)
from llmserve.training.clean_pipeline import Cleaner
from llmserve.training.clean_quality import quality_fault
from llmserve.training.clean_report import render_cleaning
from llmserve.training.clean_steps import STEPS, parse_steps

LETTERS = "etaoinshrdlucmfwypvbgk"


def make_document(choose: random.Random, num_words: int = 80) -> str:
    words = ["".join(choose.choices(LETTERS, k=choose.randint(2, 9))) for _ in range(num_words)]
    return " ".join(words).capitalize() + "."


def edited(choose: random.Random, document: str, num_edits: int) -> str:
    words = document.split(" ")
    for _ in range(num_edits):
        words[choose.randrange(len(words))] = "changed"
    return " ".join(words)


def plain_jaccard(first: str, second: str) -> float:
    """The definition, on sets of strings."""
    runs = []
    for text in (first, second):
        plain = "".join(filter(str.isalnum, text.casefold()))
        runs.append({plain[i : i + SHINGLE_CHARS] for i in range(len(plain) - SHINGLE_CHARS + 1)})
    return len(runs[0] & runs[1]) / max(1, len(runs[0] | runs[1]))


def test_exact_duplicates_are_equal_but_for_white_space() -> None:
    documents = ["one two", "three", "one\n two ", "One two", "three", "three."]
    assert exact_duplicates(documents) == {2, 4}


@pytest.mark.parametrize("num_edits", [0, 1, 3, 10])
def test_similarity_is_jaccards(num_edits: int) -> None:
    choose = random.Random(num_edits)
    first = make_document(choose)
    second = edited(choose, first, num_edits)
    ours = jaccard(shingle_hashes(first), shingle_hashes(second))
    assert ours == pytest.approx(plain_jaccard(first, second), abs=1e-12)


def test_near_duplicates_are_those_of_the_brute_force() -> None:
    choose = random.Random(0)
    originals = [make_document(choose) for _ in range(14)]
    copies = [edited(choose, text, edits) for text in originals for edits in (1, 2, 4, 8)]
    documents = originals + copies
    expected: set[int] = set()
    for index, document in enumerate(documents):
        kept = [documents[other] for other in range(index) if other not in expected]
        if any(plain_jaccard(document, other) >= 0.8 for other in kept):
            expected.add(index)
    assert len(expected) > 14
    assert near_duplicates(documents) == expected
    assert near_duplicates(documents) == near_duplicates(list(documents))


def test_short_and_empty_documents_are_no_near_duplicates() -> None:
    assert near_duplicates(["", "", "Yes.", "Yes.", "No"]) == set()


def test_near_duplicates_of_a_language_without_spaces() -> None:
    choose = random.Random(1)
    first = "".join(chr(choose.randrange(0x4E00, 0x5E00)) for _ in range(400))
    assert near_duplicates([first, first[:200] + "改" + first[201:], first[::-1]]) == {1}


@pytest.mark.parametrize(
    "document",
    [
        "A sentence of some words, no more.",
        "Ein kurzer Satz über Äpfel und Birnen.",
        "это предложение на русском языке, и оно короткое.",
        "这是一个关于大型语言模型训练数据清洗的中文句子。它没有空格。但它是完全正常的文本。",
        "यह हिन्दी में लिखा हुआ एक साधारण वाक्य है।",
        "هذه جملة عادية مكتوبة باللغة العربية.",
        "これは日本語で書かれた普通の文章です。空白はありません。",
    ],
)
def test_language_of_any_script_has_no_fault(document: str) -> None:
    assert quality_fault(document) is None


@pytest.mark.parametrize(
    ("document", "fault"),
    [
        ("Yes.", "too short"),
        ("1, 2, 3, 4, 5" * 20, "too short"),
        ("x = 3; " + "1.25 | 3.75 | 0.50 | total\n" * 20, "few letters"),
        ("The same line again.\n" * 4 + "Another.", "repeated lines"),
        ("All in one line, again and again. " * 60, "repetitive"),
        (base64.b64encode(random.Random(0).randbytes(3000)).decode(), "random"),
    ],
)
def test_what_is_no_language_is_named(document: str, fault: str) -> None:
    assert quality_fault(document) == fault


def test_known_dirt_is_found_and_nothing_else() -> None:
    """Each kind of dirt is put in by hand, so that every step's count is known."""
    choose = random.Random(3)
    good = [make_document(choose) for _ in range(100)]
    footer = "All rights reserved; read our terms."
    dirty = [f"<p>{text}</p>\n{footer}" for text in good[:20]]
    dirty += [f"{text}\n  ],\n" for text in good[20:30]]
    dirty += [f"{text} \x07\r\n" for text in good[30:40]]
    dirty += [f"{text}\n{text}" for text in good[40:50]]
    dirty += good[50:]
    dirty += [good[60], good[61] + "  "]
    dirty += [edited(choose, good[70], 1)]
    dirty += ["|".join(["0.5"] * 50), " \n"]
    cleaner = Cleaner(parse_steps("all"))
    assert list(cleaner.select([cleaner.clean(text) for text in dirty])) == good
    steps = {step.name: step for step in cleaner.report.steps}
    assert {name: steps[name].changed for name in ("markup", "json", "controls", "repeats")} == {
        "markup": 20,
        "json": 10,
        "controls": 10,
        "repeats": 10,
    }
    assert steps["boilerplate"].changed == 20
    assert steps["boilerplate"].characters_removed == 20 * (len(footer) + 2)
    removed = {name: step.removed for name, step in steps.items() if step.removed}
    assert removed == {"duplicates": 2, "near-duplicates": 1, "quality": 1, "empty": 1}
    assert steps["quality"].reasons == {"too short": 1}
    took = sum(step.characters_removed for step in steps.values())
    report = cleaner.report
    assert report.characters_before - took == report.characters_after == sum(map(len, good))
    assert (report.texts_before, report.documents_after) == (105, 100)
    table = render_cleaning(report)
    assert all(f"\n{name} " in table for name in STEPS)
    assert "too short 1" in table


def test_examples_begin_where_the_text_was_changed() -> None:
    cleaner = Cleaner(parse_steps("controls"))
    cleaner.clean("as it was \x00and is")
    assert cleaner.report.steps[0].examples == ["\x00and is"]


def test_steps_run_in_their_order_whatever_the_order_given() -> None:
    assert parse_steps(" quality, markup,") == ("markup", "quality")
    assert parse_steps("all") == tuple(STEPS)
    assert parse_steps("none") == ()


@pytest.mark.parametrize("text", ["", "spelling", "all,markup", "none,quality", "Markup"])
def test_unknown_steps_are_refused_with_the_list(text: str) -> None:
    with pytest.raises(ConfigError, match="near-duplicates"):
        parse_steps(text)
