from __future__ import annotations

from llmserve.server.progress import COMPUTING_FACTOR, STALL_FACTOR, Progress


def test_silence_with_work_is_stuck_and_a_step_ends_it() -> None:
    progress = Progress(stall_s=1.0)
    for _ in range(10):
        progress.tick(0.1, has_work=True, is_computing=False, most_s=0.2)
    assert not progress.is_stuck
    progress.tick(0.1, has_work=True, is_computing=False, most_s=0.2)
    assert progress.is_stuck
    progress.step(0.01)
    assert not progress.is_stuck


def test_an_idle_engine_is_well_for_ever() -> None:
    progress = Progress(stall_s=1.0)
    for has_work in (True, False):
        for _ in range(9):
            progress.tick(0.1, has_work=has_work, is_computing=False, most_s=0.2)
    assert progress.silent_s == 0.0


def test_a_pause_of_this_process_proves_nothing() -> None:
    progress = Progress(stall_s=1.0)
    progress.tick(3600.0, has_work=True, is_computing=False, most_s=0.2)
    assert not progress.is_stuck


def test_slow_steps_get_more_time() -> None:
    progress = Progress(stall_s=1.0)
    progress.step(0.5)
    progress.tick(4.9, has_work=True, is_computing=False, most_s=10.0)
    assert not progress.is_stuck
    progress.tick(0.2, has_work=True, is_computing=False, most_s=10.0)
    assert progress.silent_s > STALL_FACTOR * 0.5
    assert progress.is_stuck


def test_an_engine_that_computes_gets_more_time() -> None:
    progress = Progress(stall_s=1.0)
    for _ in range(int(COMPUTING_FACTOR)):
        progress.tick(0.9, has_work=True, is_computing=True, most_s=1.0)
    assert not progress.is_stuck
    progress.tick(0.2, has_work=True, is_computing=False, most_s=1.0)
    assert progress.is_stuck


def test_what_engines_before_it_took_is_granted_to_the_next() -> None:
    progress = Progress(stall_s=1.0, slowest_step_s=0.5)
    progress.tick(4.9, has_work=True, is_computing=False, most_s=10.0)
    assert not progress.is_stuck


def test_a_pause_within_a_step_is_forgotten() -> None:
    progress = Progress(stall_s=1.0)
    progress.step(1000.0)
    for _ in range(2000):
        progress.step(0.01)
    progress.tick(1.1, has_work=True, is_computing=False, most_s=10.0)
    assert progress.is_stuck
