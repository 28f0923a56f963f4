from __future__ import annotations

import signal

import pytest

from llmserve.server.poison import CrashCounts, is_from_outside


def test_two_crashes_make_a_suspect_and_a_third_alone_convicts_it() -> None:
    crashes = CrashCounts()
    assert crashes.blame(["a", "b"], alone=None) is None
    assert not crashes.is_suspect("a")
    assert crashes.blame(["a"], alone=None) is None
    assert crashes.is_suspect("a")
    assert not crashes.is_suspect("b")
    assert crashes.blame(["a"], alone="a") == "a"
    assert not crashes.is_suspect("a"), "it is over"


def test_a_token_clears_and_a_crash_of_others_convicts_nobody() -> None:
    crashes = CrashCounts()
    for _ in range(2):
        crashes.blame(["a"], alone=None)
    assert crashes.blame([], alone="a") is None, "it was alone, but in no step"
    assert crashes.is_suspect("a")
    crashes.clear("a")
    assert not crashes
    assert crashes.blame(["a"], alone="a") is None


@pytest.mark.parametrize(
    ("status", "is_outside"),
    [
        (-signal.SIGKILL, True),
        (-signal.SIGTERM, True),
        (None, True),
        (-signal.SIGSEGV, False),
        (-signal.SIGABRT, False),
        (1, False),
    ],
)
def test_whose_signal_it_was(status: int | None, is_outside: bool) -> None:
    assert is_from_outside(status) is is_outside
