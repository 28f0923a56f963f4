"""Engines killed, stopped and swapped for a minute under load (R14, R20, R30's idea: each reply
equals the answer that an undisturbed server gave).

`LLMSERVE_SOAK_SEED` chooses other prompts, `LLMSERVE_SOAK_S` another duration. The first two tests
take another model than a tiny one from `LLMSERVE_SOAK_MODEL`, and another number of clients from
`LLMSERVE_SOAK_STREAMS`. The longest pause of a stream is printed (`pytest -s`).
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from support.models import make_model_folder
from support.serving import ServeProcess, assert_clean_end, in_threads, load_model, serving

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

Reply = tuple[str, str, list[float]]
"""Fingerprint of the model, text, log-probabilities."""


class Load:
    """Clients that stream the same prompts again and again, and check what they get."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._random = random.Random(SEED)
        self._bodies = [self._body() for _ in range(NUM_STREAMS)]
        self._is_over = threading.Event()
        self.known: list[list[Reply]] = [[self._stream(body)[0]] for body in self._bodies]
        self.num_replies = 0
        self.wrong: list[object] = []
        self.longest_pause_s = 0.0

    def run_while(self, disturb: Callable[[], None]) -> None:
        """Have every client at work until `disturb` returns."""
        threads = in_threads(NUM_STREAMS, self._client)
        disturb()
        self._is_over.set()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive(), "a stream hangs"

    def _client(self, index: int) -> None:
        while not self._is_over.is_set():
            try:
                reply, pause_s = self._stream(self._bodies[index])
            except (AssertionError, OSError) as error:
                self.wrong.append(error)
                return
            self.num_replies += 1
            self.longest_pause_s = max(self.longest_pause_s, pause_s)
            if reply not in self.known[index]:
                self.wrong.append((index, reply))

    def learn(self) -> None:
        """Take the answers of the model that is served now for right, too."""
        for known, body in zip(self.known, self._bodies, strict=True):
            known.append(self._stream(body)[0])

    def _body(self) -> dict[str, Any]:
        length = self._random.randint(1, 60)
        return {
            "prompt": [self._random.randrange(10, 300) for _ in range(length)],
            "max_tokens": self._random.randint(100, 190),
            "seed": self._random.randrange(1000),
            "temperature": self._random.choice([0.0, 0.8]),
            "logprobs": 1,
            "ignore_eos": True,
            "stream": True,
        }

    def _stream(self, body: dict[str, Any]) -> tuple[Reply, float]:
        """A stream's reply, and its longest pause between two events."""
        request = urllib.request.Request(  # noqa: S310
            self._url + "/v1/completions",
            json.dumps(body).encode(),
            {"content-type": "application/json"},
        )
        events, pause_s, before = [], 0.0, time.monotonic()
        with urllib.request.urlopen(request, timeout=60) as reply:  # noqa: S310
            for line in reply:
                if not line.startswith(b"data: {"):
                    continue
                now = time.monotonic()
                pause_s, before = max(pause_s, now - before), now
                events.append(json.loads(line[6:]))
                assert "error" not in events[-1], events[-1]
        choices = [event["choices"][0] for event in events]
        assert choices[-1]["finish_reason"] == "length"
        fingerprints = {event["system_fingerprint"] for event in events}
        assert len(fingerprints) == 1, "a reply of two models"
        logprobs = [value for one in choices for value in one["logprobs"]["token_logprobs"]]
        return (fingerprints.pop(), "".join(one["text"] for one in choices), logprobs), pause_s


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
        load = Load(server.wait_until_ready())
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
        load = Load(url := server.wait_until_ready())
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
    assert_clean_end(server, load._url)
