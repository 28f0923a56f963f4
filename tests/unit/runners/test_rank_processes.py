"""Processes of ranks, as rank 0 sees them."""

from __future__ import annotations

import socket
import threading

import pytest

from llmserve.errors import EngineError
from llmserve.runners import rank_processes
from llmserve.runners.rank_messages import Logits, receive_command
from llmserve.runners.rank_processes import RankProcess, Ranks, when_closed
from support.ranks import in_threads


def wait_for_the_end(connection: socket.socket) -> int:
    try:
        while True:
            receive_command(connection)
    except EngineError:
        return 0


def test_all_hear_what_is_told_and_end_when_it_is_closed() -> None:
    heard: list[object] = []

    def serve(connection: socket.socket) -> int:
        heard.append(receive_command(connection))
        return wait_for_the_end(connection)

    ranks = Ranks(4, in_threads(serve))
    processes = [one.process for one in ranks._ranks]
    ranks.tell(Logits(5))
    ranks.close()
    ranks.close()
    assert heard == [Logits(5)] * 3
    assert [process.poll() for process in processes] == [0] * 3
    with pytest.raises(EngineError, match="the runner was closed"):
        ranks.tell(Logits(5))


def test_who_is_gone_is_named_at_the_next_word() -> None:
    def serve(connection: socket.socket) -> int:
        return -9

    ranks = Ranks(2, in_threads(serve))
    ranks._ranks[0].process.wait(5)
    with pytest.raises(EngineError, match="load it anew: rank 1 ended: by signal 9"):
        ranks.tell(Logits(5))


def test_a_start_that_fails_ends_those_that_were_started() -> None:
    started: list[RankProcess] = []

    def start(index: int) -> RankProcess:
        if index == 2:
            raise OSError("no more processes")
        started.append(in_threads(wait_for_the_end)(index))
        return started[-1]

    with pytest.raises(OSError, match="no more processes"):
        Ranks(3, start)
    assert started[0].process.poll() == 0


def test_a_watched_rank_that_is_gone_is_acted_upon_and_makes_the_result_worthless() -> None:
    go, acted = threading.Event(), threading.Event()

    def serve(connection: socket.socket) -> int:
        go.wait(5)
        return 1

    ranks = Ranks(2, in_threads(serve))
    ranks.watch(acted.set)
    ranks.check()
    assert not acted.is_set()
    go.set()
    assert acted.wait(5)
    with pytest.raises(EngineError, match="rank 1 ended: with exit status 1"):
        ranks.check()
    ranks.close()


def test_a_thread_that_watches_ends_with_the_group() -> None:
    ranks = Ranks(2, in_threads(wait_for_the_end))
    ranks.watch(lambda: None)
    watch = ranks._watch
    assert watch is not None
    assert watch.is_alive()
    ranks.close()
    assert not watch.is_alive()


def test_one_closed_connection_of_several_is_noticed() -> None:
    noticed = threading.Event()
    pairs = [socket.socketpair() for _ in range(3)]
    when_closed([ours for ours, _ in pairs], noticed.set)
    pairs[0][1].sendall(b"a word is no end")
    assert not noticed.wait(0.05)
    pairs[2][1].close()
    assert noticed.wait(5)
    for end in (end for pair in pairs for end in pair):
        end.close()


def test_a_process_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real one, stopped before it could read that it should end."""
    import signal

    monkeypatch.setattr(rank_processes, "END_TIMEOUT_S", 0.05)
    rank = RankProcess.start(1)
    rank.process.send_signal(signal.SIGSTOP)
    rank.end()
    assert rank.process.returncode == -signal.SIGKILL
