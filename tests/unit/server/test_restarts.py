from __future__ import annotations

import pytest

from llmserve.errors import EngineDeadError
from llmserve.server.restarts import MAX_DEATHS, WINDOW_S, Restarts


def die(restarts: Restarts, times: int, *, every_s: float = 1.0) -> None:
    for index in range(times):
        restarts.death(index * every_s, "broken")


def test_deaths_without_a_token_between_are_the_end_and_say_of_what() -> None:
    restarts = Restarts()
    die(restarts, MAX_DEATHS - 1)
    with pytest.raises(EngineDeadError, match=r"5 engines ended in 4 s .* broken"):
        restarts.death(MAX_DEATHS - 1, "broken")


def test_tokens_between_and_time_forgive() -> None:
    restarts = Restarts()
    for _ in range(3):
        die(restarts, MAX_DEATHS - 1)
        restarts.progress()
    die(restarts, 3 * MAX_DEATHS, every_s=WINDOW_S / (MAX_DEATHS - 1) + 0.1)


def test_the_first_death_is_answered_at_once_and_all_delays_fit_the_window() -> None:
    restarts = Restarts()
    delays = [restarts.delay_s]
    for index in range(MAX_DEATHS - 1):
        restarts.death(index, "broken")
        delays.append(restarts.delay_s)
    assert delays[:2] == [0.0, 0.0]
    assert delays == sorted(delays)
    assert sum(delays) < WINDOW_S
