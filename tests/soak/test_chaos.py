"""R30: everything at once, held against the answers of an undisturbed server.

Beside clients who stream and check every answer: clients who leave, who stop reading, who ask what
cannot be served, and bursts of far too many; engines are killed and the model is swapped meanwhile.
Afterwards nothing may be left behind. `LLMSERVE_SOAK_S` sets the duration; in runs of ten minutes
or more (the full one is 1800 s) memory and latency over time are judged, too. The figures are
printed (`pytest -s`), `LLMSERVE_SOAK_SEED` chooses other prompts and moments.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import psutil
import pytest

from support.models import make_model_folder
from support.serving import assert_clean_end, in_threads, load_model, metric, post, read, serving
from support.streams import Load

pytestmark = [pytest.mark.soak, pytest.mark.http, pytest.mark.timeout(3600)]

SEED = int(os.environ.get("LLMSERVE_SOAK_SEED", "0"))
DURATION_S = float(os.environ.get("LLMSERVE_SOAK_S", "1800"))
LONG_S = 600.0
"""A shorter run has too few samples to judge memory and latency over time."""
NUM_STREAMS = 8
MOST_SLOPE_BYTES = 1 << 20
"""Of the API process's memory in ten minutes, after a sixth of the run."""
MOST_SLOWER = 1.2
"""p99 of the last sixth over that of the second."""
OPTIONS = (
    "--max-num-batched-tokens", "128", "--max-num-seqs", "24", "--log-level", "warning",
    "--limit", "engine_stall_s=1", "--limit", "max_waiting_requests=48",
    "--limit", "write_stall_s=2",
)  # fmt: skip
STREAM = {"prompt": [9, 8, 7], "max_tokens": 200, "ignore_eos": True, "stream": True}


class Troublemakers:
    """What other clients do, until told to end. A reply that may not be is kept in `wrong`."""

    def __init__(self, url: str, is_over: threading.Event) -> None:
        self._url = url
        self._is_over = is_over
        self.wrong: list[object] = []
        self.counts: dict[str, int] = {}

    def start(self) -> list[threading.Thread]:
        works = [self.leave, self.stall, self.ask_badly, self.ask_too_much, self.burst]
        return in_threads(len(works), lambda index: self._repeat(works[index], index))

    def _repeat(self, work: Callable[[random.Random], None], number: int) -> None:
        generator = random.Random(SEED * 100 + number)
        while not self._is_over.wait(generator.uniform(0.05, 0.5)):
            try:
                work(generator)
            except OSError as error:
                self.wrong.append((work.__name__, repr(error)))
                return
            self.counts[work.__name__] = self.counts.get(work.__name__, 0) + 1

    def leave(self, generator: random.Random) -> None:
        """Close in the middle of a stream."""
        with self._open_stream() as connection:
            for _ in range(generator.randrange(6)):
                connection.recv(512)

    def stall(self, generator: random.Random) -> None:
        """Ask, and read nothing."""
        with self._open_stream():
            self._is_over.wait(generator.uniform(0.5, 3))

    def ask_badly(self, generator: random.Random) -> None:
        """What is no request."""
        body = generator.choice(
            [
                {"prompt": []},
                {"prompt": "x", "max_tokens": -1},
                {"prompt": [10**9]},
                {"no_such_field": "x"},
            ]
        )
        self._expect(body, {400})

    def ask_too_much(self, generator: random.Random) -> None:
        """What is above a limit."""
        body = generator.choice([{"prompt": [5] * 5000}, {"prompt": "x", "n": 10**6}])
        self._expect(body, {400})

    def burst(self, generator: random.Random) -> None:
        """Far too many at once."""
        body = {"prompt": [generator.randrange(5, 300)], "max_tokens": 4}
        for thread in in_threads(40, lambda _: self._expect(body, {200, 429})):
            thread.join(60)
            assert not thread.is_alive(), "a request hangs"

    def _expect(self, body: dict[str, object], statuses: set[int]) -> None:
        status, said = post(self._url, body, 60)
        if status not in statuses:
            self.wrong.append((body, status, said))

    def _open_stream(self) -> socket.socket:
        place = urlsplit(self._url)
        connection = socket.create_connection((place.hostname, place.port), 30)
        body = json.dumps(STREAM).encode()
        head = "POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json"
        connection.sendall(f"{head}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
        return connection


def test_r30_everything_at_once(tmp_path: Path) -> None:
    for index in range(2):
        make_model_folder(tmp_path / f"model{index}", seed=index)
    with serving(tmp_path / "model0", *OPTIONS) as server:
        url = server.wait_until_ready()
        load = Load(url, NUM_STREAMS, seed=SEED, retries=True)
        assert load_model(url, model="model1")[0] == 200
        load.learn()
        process = psutil.Process(server.process.pid)
        num_files, memory = process.num_fds(), []
        is_over = threading.Event()
        others = Troublemakers(url, is_over)
        num_kills = num_swaps = 0

        def disturb() -> None:
            nonlocal num_kills, num_swaps
            threads, end = others.start(), time.monotonic() + DURATION_S
            generator = random.Random(SEED)
            while time.monotonic() < end:
                time.sleep(generator.uniform(2, 6))
                memory.append((time.monotonic(), process.memory_info().rss))
                if generator.random() < 0.6:
                    with contextlib.suppress(ValueError, psutil.NoSuchProcess):
                        server.engine().send_signal(signal.SIGKILL)
                        num_kills += 1
                else:
                    folder = f"model{num_swaps % 2}"
                    assert load_model(url, model=folder)[0] == 200
                    num_swaps += 1
            is_over.set()
            for thread in threads:
                thread.join(60)
                assert not thread.is_alive(), "a client hangs"

        load.run_while(disturb)
        slope, slower = slope_of(memory), slowdown(load.durations)
        print(
            f"{load.num_replies} replies, {num_kills} kills, {num_swaps} swaps, {others.counts}; "
            f"longest pause {load.longest_pause_s:.2f} s; memory {slope / 2**20:+.2f} MiB "
            f"in 10 min; "
            f"p99 of the last sixth {slower:.2f} of that of the second"
        )
        assert not load.wrong
        assert not others.wrong
        assert_nothing_left(url, process, num_files)
        if DURATION_S >= LONG_S:
            assert slope <= MOST_SLOPE_BYTES
            assert slower <= MOST_SLOWER
        server.process.send_signal(signal.SIGTERM)
        assert_clean_end(server, url)


def assert_nothing_left(url: str, process: psutil.Process, num_files: int) -> None:
    """No request, no block, no connection."""
    deadline = time.monotonic() + 20
    idle = [f"llmserve_num_requests_{state}" for state in ("running", "waiting")]
    while any(metric(url, name) for name in idle) or process.num_fds() > num_files + 2:
        assert time.monotonic() < deadline, read(url, "/metrics")
        time.sleep(0.1)
    assert metric(url, "llmserve_kv_cache_usage_perc") == 0
    (model,) = json.loads(read(url, "/kv-blocks"))["models"]
    assert not any(pool["owners"] for pools in model["replicas"] for pool in pools)


def slope_of(memory: list[tuple[float, int]]) -> float:
    """Bytes in ten minutes, by a line through the samples after the first sixth."""
    times, sizes = np.array(memory[len(memory) // 6 :], dtype=np.float64).T
    return float(np.polyfit(times, sizes, 1)[0] * 600)


def slowdown(durations: list[tuple[float, float]]) -> float:
    """p99 of how long replies took, of the last sixth over the second."""
    sixth = len(durations) // 6
    values = [took for _, took in sorted(durations)]
    last, second = values[-sixth:], values[sixth : 2 * sixth]
    return float(np.percentile(last, 99) / np.percentile(second, 99))
