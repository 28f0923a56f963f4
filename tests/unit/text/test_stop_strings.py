"""Which stop string ends a text, and how much waits for it."""

from __future__ import annotations

import time

import pytest

from llmserve.text.stop_strings import StopScanner


def scan(stops: tuple[str, ...], pieces: list[str]) -> tuple[list[str], str | None]:
    scanner, shown = StopScanner(stops), []
    for piece in pieces:
        text, stop = scanner.push(piece)
        shown.append(text)
        if stop is not None:
            return shown, stop
    return [*shown, scanner.flush()], None


@pytest.mark.parametrize(
    ("stops", "pieces", "shown", "stop"),
    [
        ((), ["any", "thing"], ["any", "thing", ""], None),
        (("END",), ["the EN", "D of it"], ["the ", ""], "END"),
        (("END",), ["the EN", "Dless", " end"], ["the ", ""], "END"),
        (("END",), ["the EN", "T", " EN"], ["the ", "ENT", " ", "EN"], None),
        (("aab",), ["a", "a", "a", "b"], ["", "", "a", ""], "aab"),
        (("aab",), ["a", "a", "c"], ["", "", "aac", ""], None),
        # Complete first, though it begins later.
        (("abcd", "c"), ["ab", "cd"], ["", "ab"], "c"),
        # Complete at the same character: the longer one.
        (("c", "abc", "bc"), ["xabc"], ["x"], "abc"),
        (("\n\n",), ["a\n", "b\n", "\n"], ["a", "\nb", ""], "\n\n"),
        (("ü",), ["Gr", "ü"], ["Gr", ""], "ü"),
        (("abab",), ["aba", "cab", "ab"], ["", "abac", ""], "abab"),
    ],
)
def test_scanning(
    stops: tuple[str, ...], pieces: list[str], shown: list[str], stop: str | None
) -> None:
    assert scan(stops, pieces) == (shown, stop)


def test_stop_string_is_kept_on_demand() -> None:
    scanner = StopScanner(("###",), include_stop=True)
    assert scanner.push("the #") == ("the ", None)
    assert scanner.push("## and more") == ("###", "###")


def test_worst_stop_strings_cost_little_per_character() -> None:
    stops = tuple("a" * 255 + chr(0x100 + index) for index in range(16))
    scanner = StopScanner(stops)
    begin = time.process_time()
    for _ in range(20_000):
        assert scanner.push("aaaab")[1] is None
    assert time.process_time() - begin < 5.0
