"""Engines killed, stopped and swapped for a minute under load (R14, R20, R30's idea: each reply
equals the answer that an undisturbed server gave).

`LLMSERVE_SOAK_SEED` chooses other prompts, `LLMSERVE_SOAK_S` another duration. The first two tests
take another model than a tiny one from `LLMSERVE_SOAK_MODEL`, and another number of clients from
`LLMSERVE_SOAK_STREAMS`. The longest pause of a stream is printed (`pytest -s`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest

from support.models import make_model_folder
from support.serving import ServeProcess, assert_clean_end, load_model, serving
from support.streams import Load

pytestmark = [pytest.mark.soak, pytest.mark.http, pytest.mark.timeout(900)]

SEED = int(os.environ.get("LLMSERVE_SOAK_SEED", "0"))
DURATION_S = float(os.environ.get("LLMSERVE_SOAK_S", "60"))
EVERY_S = 2.0
NUM_STREAMS = int(os.environ.get("LLMSERVE_SOAK_STREAMS", "32"))
SIZE = (
    "--max-num-batched-tokens",
    "128",
    "--limit",
    "engine_stall_s=0.5",
    "--log-level",
    "warning",
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for index in range(2):
        make_model_folder(root / f"model{index}", seed=index)
    shutil.copytree(root / "model1", root / "broken")
    os.truncate(root / "broken" / "model.safetensors", 10_000)
    return root


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["kill", "stop"])
def test_engines_ended_every_two_seconds_under_streams(
    models: Path, number: signal.Signals
) -> None:
    folder = os.environ.get("LLMSERVE_SOAK_MODEL", models / "model0")
    with serving(folder, *SIZE) as server:
        load = Load(server.wait_until_ready(), NUM_STREAMS, seed=SEED)
        count = 0

        def disturb() -> None:
            nonlocal count
            end = time.monotonic() + DURATION_S
            while time.monotonic() < end:
                time.sleep(EVERY_S)
                with contextlib.suppress(ValueError, psutil.NoSuchProcess):
                    server.engine().send_signal(number)
                    count += 1

        load.run_while(disturb)
        report(f"{number.name} {count} times", load)
        assert not load.wrong
        assert count >= DURATION_S / EVERY_S / 2
        stop(server, load)


def test_twenty_swaps_under_load_five_of_them_to_a_broken_folder(models: Path) -> None:
    """R20."""
    with serving(models / "model0", *SIZE) as server:
        load = Load(url := server.wait_until_ready(), NUM_STREAMS, seed=SEED)
        assert load_model(url, model="model1")[0] == 200
        load.learn()
        statuses: list[int] = []

        def disturb() -> None:
            for index in range(20):
                folder = "broken" if index % 4 == 3 else f"model{index % 2}"
                statuses.append(load_model(url, model=folder)[0])

        load.run_while(disturb)
        report("20 swaps", load)
        assert not load.wrong
        assert statuses == [400 if index % 4 == 3 else 200 for index in range(20)]
        stop(server, load)


def report(what: str, load: Load) -> None:
    print(f"{what}: {load.num_replies} replies, longest pause {load.longest_pause_s:.2f} s")


def stop(server: ServeProcess, load: Load) -> None:
    server.process.send_signal(signal.SIGTERM)
    assert_clean_end(server, load.url)
