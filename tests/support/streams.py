"""Clients that stream from a server process and know what the answers must be."""

from __future__ import annotations

import json
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

from support.history import History
from support.serving import in_threads

Reply = tuple[str, str, list[float]]
"""Fingerprint of the model, text, log-probabilities."""


class Load:
    """Clients that stream the same prompts again and again, and check what they get."""

    def __init__(
        self,
        url: str,
        num_streams: int,
        *,
        seed: int,
        retries: bool = False,
        history: History | None = None,
    ) -> None:
        """`retries`: a full queue (429) is no failure but waited out.

        What clients see while `run_while` runs is added to `history`.
        """
        self._retries = retries
        self._history = History() if history is None else history
        self.url = url
        self._random = random.Random(seed)
        self._num_streams = num_streams
        self._bodies = [self._body() for _ in range(num_streams)]
        self._is_over = threading.Event()
        self.known: list[list[Reply]] = [[self._stream(body)[0]] for body in self._bodies]
        self.num_replies = 0
        self.wrong: list[object] = []
        self.longest_pause_s = 0.0
        self.durations: list[tuple[float, float]] = []
        """When each reply ended, and how many seconds it took."""

    def run_while(self, disturb: Callable[[], None]) -> None:
        """Have every client at work until `disturb` returns."""
        threads = in_threads(self._num_streams, self._client)
        disturb()
        self._is_over.set()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive(), "a stream hangs"

    def _client(self, index: int) -> None:
        while not self._is_over.is_set():
            started = time.monotonic()
            try:
                reply, pause_s = self._stream(self._bodies[index])
            except urllib.error.HTTPError as error:
                with error:
                    self._history.add(error.code)
                    if error.code != 429 or not self._retries:
                        self.wrong.append(error)
                        return
                self._is_over.wait(0.1)
                continue
            except (AssertionError, OSError) as error:
                self.wrong.append(error)
                return
            self._history.add(200, "length")
            self.num_replies += 1
            self.durations.append((time.monotonic(), time.monotonic() - started))
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
            self.url + "/v1/completions",
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
