"""The two figures about generated text."""

from __future__ import annotations

from llmserve.training.sample_check import check_samples, describe

TEXT = "The list holds items.\nIts length is the number of them, and it doesn't change by itself."


def test_known_words_are_counted_in_any_case() -> None:
    figures = check_samples(["THE items doesn't change", "a frobnicated list!"], TEXT)
    assert figures.known_word_share == 5 / 7


def test_longest_copy_is_found_across_line_breaks() -> None:
    sample = "Nobody says: items. Its length is   the number of cats, and it does."
    figures = check_samples([sample], TEXT)
    assert figures.longest_copies == (len(" items. Its length is the number of "),)


def test_whole_text_is_a_copy_and_other_text_is_not() -> None:
    figures = check_samples([TEXT, "zzz"], TEXT)
    assert figures.longest_copies == (len(TEXT), 0)
    assert figures.num_without_copy(60) == 1
    assert "1 of 2 samples" in describe(figures)


def test_brute_force_agrees() -> None:
    sample = "and it holds the length of the list, it doesn't hold itself. is the number of"
    flat = " ".join(TEXT.split())
    pieces = (sample[i:j] for i in range(len(sample)) for j in range(i, len(sample) + 1))
    longest = max(len(piece) for piece in pieces if piece in flat)
    assert check_samples([sample], TEXT).longest_copies == (longest,)


def test_no_samples_have_no_words() -> None:
    assert check_samples([], TEXT).known_word_share == 0.0
