from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmserve.errors import RequestError
from llmserve.server.request_body import parse_object

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


@given(st.dictionaries(st.text(), values, max_size=5), st.booleans())
def test_well_formed_objects_come_back(value: dict[str, object], ascii_only: bool) -> None:
    body = json.dumps(value, ensure_ascii=ascii_only).encode()
    assert parse_object(body, 32) == value


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "no body"),
        (b" \n", "no body"),
        (b"null", "must be a JSON object"),
        (b"[]", "must be a JSON object"),
        (b'"x"', "must be a JSON object"),
        (b"{", "not valid JSON"),
        (b'{"a":1,}', "not valid JSON"),
        (b"{'a':1}", "not valid JSON"),
        (b'{"a":1} x', "not valid JSON"),
        (b'{"a":01}', "not valid JSON"),
        (b'{"a":"\n"}', "not valid JSON"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
        (b'{"a":"\xff"}', "not UTF-8 at byte 6"),
        (b'{"a":"\xed\xa0\x80"}', "not UTF-8"),
        (b'{"a":1,"a":1}', "'a' occurs twice"),
        (b'{"b":{"a":1,"a":2}}', "'a' occurs twice"),
        (b'{"a":1,"\\u0061":2}', "'a' occurs twice"),
        (b'{"a":NaN}', "NaN is not a JSON number"),
        (b'{"a":[-Infinity]}', "-Infinity is not"),
        (b'{"a":"\\ud800"}', "surrogate"),
        (b'{"\\uDC00":1}', "surrogate"),
        (b'{"a":["\\ud83d\\ud83d"]}', "surrogate"),
        (b'{"a":' + b"9" * 5000 + b"}", "too many digits"),
    ],
)
def test_what_parsers_disagree_about_is_refused(body: bytes, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        parse_object(body, 32)


def test_escaped_pairs_and_escaped_backslashes_are_no_lone_surrogates() -> None:
    assert parse_object(rb'{"a":"\ud83d\ude00","b":"\\ud83d"}', 32) == {"a": "😀", "b": r"\ud83d"}


def test_nesting_is_bounded_and_brackets_in_strings_do_not_count() -> None:
    inside = {"a": "[" * 100, "b": '\\"[{' * 50}
    assert parse_object(json.dumps(inside).encode(), 2) == inside
    allowed = b'{"a":' + b"[" * 31 + b"]" * 31 + b"}"
    parse_object(allowed, 32)
    with pytest.raises(RequestError, match="deeper than 32"):
        parse_object(b'{"a":' + b"[" * 32 + b"]" * 32 + b"}", 32)
    with pytest.raises(RequestError, match="deeper than 32"):
        parse_object(b"[" * 100_000, 32)


@pytest.mark.parametrize(
    "body",
    [b'"' + b'\\"' * 500_000, b"[" * 33 + b'"' + b'\\"' * 500_000, b'{"a":' * 170_000],
    ids=["escaped quotes", "nested, then escaped quotes", "objects"],
)
def test_hostile_bodies_cost_a_scan_not_its_square(body: bytes) -> None:
    started = time.process_time()
    with pytest.raises(RequestError):
        parse_object(body, 32)
    assert time.process_time() - started < 0.5  # the square would take minutes
