"""Texts and ids, there and back, in any pieces."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from llmserve.text.cleaning import clean_text
from llmserve.text.detokenizer import Detokenizer
from llmserve.text.tokenizer import Tokenizer
from llmserve.text.train import TokenizerKind
from support.texts import KINDS, all_tokenizers, trained

# Bytes are most of a small vocabulary, so that random ids are mostly broken characters; whole
# characters come from texts.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@st.composite
def id_lists(draw: st.DrawFn, tokenizer: Tokenizer, max_size: int = 30) -> list[int]:
    """Random ids, ids of random texts, and slices of those that cut characters."""
    parts = draw(
        st.lists(
            st.one_of(
                st.lists(st.integers(-1, tokenizer.vocab_size), max_size=max_size),
                texts.map(lambda text: tokenizer.encode(text, add_special_tokens=False)[1:]),
            ),
            max_size=4,
        )
    )
    return [token_id for part in parts for token_id in part]


def check_stream(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """The pieces add up to the whole, with and without a prompt before them."""
    prompt = data.draw(st.one_of(st.just([]), id_lists(tokenizer)))
    ids = data.draw(id_lists(tokenizer))
    stream = Detokenizer(tokenizer, prompt)
    pieces = [stream.push(token_id) for token_id in ids]
    settled = "".join(map(Detokenizer(tokenizer).push, prompt))
    assert settled + "".join(pieces) + stream.flush() == tokenizer.decode(prompt + ids)


def check_settling(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Characters come with the very token that a stream of tokens says settles them."""
    ids = data.draw(id_lists(tokenizer))
    stream, slow = Detokenizer(tokenizer), tokenizer.open_stream()
    for token_id in ids:
        piece = "".join(map(slow.push, tokenizer.text_tokens([token_id])))
        assert (stream.push(token_id), stream.is_pending) == (piece, slow.is_pending)
    assert stream.flush() == slow.flush()


@pytest.mark.parametrize("kind", range(4))
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_pieces_add_up_to_the_whole(kind: int, data: st.DataObject) -> None:
    check_stream(all_tokenizers()[kind], data)


@pytest.mark.parametrize("kind", range(4))
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_characters_come_as_soon_as_they_are_whole(kind: int, data: st.DataObject) -> None:
    check_settling(all_tokenizers()[kind], data)


@pytest.mark.shared
def test_pieces_add_up_to_the_whole_with_a_real_tokenizer(stories260k: Path) -> None:
    tokenizer = Tokenizer.load(stories260k)

    @settings(max_examples=60, deadline=None)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        check_stream(tokenizer, data)

    check()


@pytest.mark.parametrize("kind", range(4))
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_piece_holds_half_a_character(kind: int, data: st.DataObject) -> None:
    tokenizer = all_tokenizers()[kind]
    text = data.draw(texts).replace("\ufffd", "")
    ids = tokenizer.encode(text, add_special_tokens=False)
    stream = Detokenizer(tokenizer)
    assert not any("\ufffd" in stream.push(token_id) for token_id in ids)


@pytest.mark.parametrize("kind", range(4))
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_text_equals_the_library(kind: int, data: st.DataObject) -> None:
    tokenizer = all_tokenizers()[kind]
    library = tokenizers.Tokenizer.from_str(tokenizer.files()["tokenizer.json"].decode())
    ids = [token_id for token_id in data.draw(id_lists(tokenizer)) if token_id >= 0]
    text, expected = tokenizer.decode(ids), library.decode(ids)
    is_byte_level = kind == KINDS.index("bpe")
    if is_byte_level or "\ufffd" not in expected:
        assert text == expected
    else:  # the library also destroys the valid characters beside a stray byte
        assert len(text.encode()) <= len(expected.encode())
        assert "\ufffd" in text


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(text=texts)
def test_every_text_comes_back(kind: TokenizerKind, text: str) -> None:
    tokenizer = trained(kind)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60))
def test_cleaning_twice_changes_nothing_more(text: str) -> None:
    once = clean_text(text)
    assert clean_text(once) == once
    once.encode()
