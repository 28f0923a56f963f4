"""Where an answer's text begins, and what is kept back; splits are in tests/property."""

from __future__ import annotations

from llmserve.text.detokenizer import Detokenizer
from support.texts import sentencepiece_like, trained


def text_of(stream: Detokenizer, ids: list[int]) -> str:
    """What `ids` add to the stream."""
    return "".join(map(stream.push, ids))


def test_space_before_the_first_word_stays_after_a_prompt() -> None:
    tokenizer = sentencepiece_like()
    the = tokenizer.encode("the", add_special_tokens=False)
    assert text_of(Detokenizer(tokenizer), the) == "the"
    assert text_of(Detokenizer(tokenizer, [1]), the) == "the", "a special token is no text"
    assert text_of(Detokenizer(tokenizer, [1, *the]), the) == " the"
    assert text_of(Detokenizer(tokenizer, [1, *the * 9]), the) == " the"


def test_character_left_unfinished_by_the_prompt_is_completed() -> None:
    tokenizer = trained("bpe")
    names = tokenizer.encode("the list of names")
    clef = tokenizer.encode("𝄞", add_special_tokens=False)  # not in the corpus: a token a byte
    assert len(clef) == 4
    for num_bytes in range(4):
        for before in ([], names):
            stream = Detokenizer(tokenizer, [*before, *clef[:num_bytes]])
            assert text_of(stream, clef[num_bytes:]) + stream.flush() == "𝄞"
    assert text_of(Detokenizer(tokenizer, clef), names) == "the list of names"


def test_half_characters_wait() -> None:
    tokenizer = trained("char")
    first, second, third = tokenizer.encode("漢", add_special_tokens=False)
    stream = Detokenizer(tokenizer)
    assert (stream.push(first), stream.is_pending) == ("", True)
    assert (stream.push(second), stream.is_pending) == ("", True)
    assert (stream.push(third), stream.is_pending) == ("漢", False)
    assert stream.push(first) + stream.flush() == "\ufffd"


def test_genuine_replacement_character_comes_at_once() -> None:
    tokenizer = trained("bpe")
    ids = tokenizer.encode("\ufffd", add_special_tokens=False)
    assert text_of(Detokenizer(tokenizer), ids) == "\ufffd"


def test_invalid_byte_is_not_waited_for() -> None:
    tokenizer = trained("bpe")
    last = tokenizer.encode("漢", add_special_tokens=False)[-1]  # a continuation byte alone
    assert Detokenizer(tokenizer).push(last) == "\ufffd"


def test_special_tokens_have_no_text() -> None:
    tokenizer = trained("bpe")
    assert text_of(Detokenizer(tokenizer), tokenizer.encode("the")) == "the"
