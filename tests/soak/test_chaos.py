"""R30: everything at once, held against the answers of an undisturbed server.

Beside clients who stream and check every answer: clients who leave, who stop reading, who ask what
cannot be served, and bursts of far too many; engines are killed, their steps raise, and the model
is swapped meanwhile. Every answer must be one of the two models', or where its reader left the
beginning of one. Afterwards nothing may be left behind, and `/metrics` must have counted what the
clients saw. `LLMSERVE_SOAK_S` sets the duration; in runs of ten minutes or more (the full one is
1800 s) memory and latency over time are judged, too. The figures are printed (`pytest -s`),
`LLMSERVE_SOAK_SEED` chooses other prompts and moments.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from support.history import History
from support.models import make_model_folder
from support.serving import assert_clean_end, load_model, metric, metrics, read, serving
from support.streams import Load
from support.troublemakers import Troublemakers

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
FAILURES = {"LLMSERVE_FAILPOINTS": "engine.forward=raise@500"}
"""A step that raises, of each engine the 500th."""


def test_r30_everything_at_once(tmp_path: Path) -> None:
    for index in range(2):
        make_model_folder(tmp_path / f"model{index}", seed=index)
    with serving(tmp_path / "model0", *OPTIONS, environment=FAILURES) as server:
        url = server.wait_until_ready()
        history, is_over = History(), threading.Event()
        load = Load(url, NUM_STREAMS, seed=SEED, retries=True, history=history)
        others = Troublemakers(url, is_over, seed=SEED, history=history)
        others.learn()
        assert load_model(url, model="model1")[0] == 200
        load.learn()
        others.learn()
        process = psutil.Process(server.process.pid)
        num_files, memory, before = process.num_fds(), [], metrics(url)
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
        num_replaced = metric(url, "llmserve_engine_restarts_total")
        print(
            f"{len(history)} requests, {load.num_replies} long replies; {num_kills} kills, "
            f"{num_replaced:.0f} engines replaced, {num_swaps} swaps, {dict(others.counts)}; "
            f"longest pause {load.longest_pause_s:.2f} s; "
            f"memory {slope / 2**20:+.2f} MiB in 10 min; "
            f"p99 of the last sixth {slower:.2f} of that of the second"
        )
        assert not load.wrong
        assert not others.wrong
        assert_nothing_left(url, process, num_files)
        assert not history.disagreements(growth(before, metrics(url)))
        if DURATION_S >= LONG_S:
            assert slope <= MOST_SLOPE_BYTES
            assert slower <= MOST_SLOWER
        server.process.send_signal(signal.SIGTERM)
        assert_clean_end(server, url)


def assert_nothing_left(url: str, process: psutil.Process, num_files: int) -> None:
    """No request, no block, no connection."""
    deadline = time.monotonic() + 20
    idle = [f"llmserve_num_requests_{state}" for state in ("running", "waiting")]
    while left := {
        **{name: count for name in idle if (count := metric(url, name))},
        **({"files": process.num_fds()} if process.num_fds() > num_files + 2 else {}),
    }:
        assert time.monotonic() < deadline, (left, num_files, process.net_connections())
        time.sleep(0.1)
    assert metric(url, "llmserve_kv_cache_usage_perc") == 0
    (model,) = json.loads(read(url, "/kv-blocks"))["models"]
    assert not any(pool["owners"] for pools in model["replicas"] for pool in pools)


def growth(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """How much each number has grown."""
    return {name: value - before.get(name, 0.0) for name, value in after.items()}


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
