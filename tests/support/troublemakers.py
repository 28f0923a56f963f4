"""Clients of a server process that leave, stall, ask what cannot be served, or come all at once."""

from __future__ import annotations

import json
import random
import socket
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from support.history import History
from support.serving import in_threads, post

NUM_AT_ONCE = 40
STREAM = {
    "prompt": [9, 8, 7], "max_tokens": 200, "temperature": 0, "ignore_eos": True, "stream": True,
}  # fmt: skip
"""What is left in the middle."""
SHORT = [{"prompt": [prompt], "max_tokens": 4, "temperature": 0} for prompt in range(5, 13)]
"""What is asked by many at once."""

Answer = tuple[str, str]
"""Fingerprint of the model, text."""


class Troublemakers:
    """What such clients do, until told to end. A reply that may not be is kept in `wrong`."""

    def __init__(self, url: str, is_over: threading.Event, *, seed: int, history: History) -> None:
        self._url = url
        self._is_over = is_over
        self._seed = seed
        self._history = history
        self._streams: dict[str, str] = {}
        self._short: list[set[Answer]] = [set() for _ in SHORT]
        self.wrong: list[object] = []
        self.counts: Counter[str] = Counter()

    def learn(self) -> None:
        """Take the answers of the model that is served now for right, too."""
        fingerprint, text, _ = self._ask({**STREAM, "stream": False})
        self._streams[fingerprint] = text
        for known, body in zip(self._short, SHORT, strict=True):
            known.add(self._ask(body)[:2])

    def start(self) -> list[threading.Thread]:
        """A thread for each kind of client."""
        works = [self.leave, self.stall, self.ask_badly, self.ask_too_much, self.burst]
        return in_threads(len(works), lambda index: self._repeat(works[index], index))

    def _repeat(self, work: Callable[[random.Random], None], number: int) -> None:
        generator = random.Random(self._seed * 100 + number)
        while not self._is_over.wait(generator.uniform(0.05, 0.5)):
            try:
                work(generator)
            except OSError as error:
                self.wrong.append((work.__name__, repr(error)))
                return
            self.counts[work.__name__] += 1

    def leave(self, generator: random.Random) -> None:
        """Close in the middle of a stream; what came of it must begin a known answer."""
        received = b""
        with self._open_stream() as connection:
            for _ in range(generator.randrange(6)):
                received += connection.recv(512)
        head = received.partition(b"\r\n")[0].split()
        status = int(head[1]) if len(head) > 1 else None
        self._history.add(429 if status == 429 else None)
        if status not in {200, 429, None} or not self._begins_an_answer(received):
            self.wrong.append((STREAM, received))

    def stall(self, generator: random.Random) -> None:
        """Ask, and read nothing."""
        with self._open_stream():
            self._is_over.wait(generator.uniform(0.5, 3))
        self._history.add(None)

    def ask_badly(self, generator: random.Random) -> None:
        """What is no request."""
        self._refused(
            generator.choice(
                [
                    {"prompt": []},
                    {"prompt": "x", "max_tokens": -1},
                    {"prompt": [10**9]},
                    {"no_such_field": "x"},
                ]
            )
        )

    def ask_too_much(self, generator: random.Random) -> None:
        """What is above a limit."""
        self._refused(generator.choice([{"prompt": [5] * 5000}, {"prompt": "x", "n": 10**6}]))

    def burst(self, generator: random.Random) -> None:
        """Far too many at once."""
        chosen = generator.randrange(len(SHORT))
        for thread in in_threads(NUM_AT_ONCE, lambda _: self._short_answer(chosen)):
            thread.join(60)
            assert not thread.is_alive(), "a request hangs"

    def _refused(self, body: dict[str, Any]) -> None:
        status, said = post(self._url, body, 60)
        self._history.add(status)
        if status != 400:
            self.wrong.append((body, status, said))

    def _short_answer(self, chosen: int) -> None:
        status, said = post(self._url, SHORT[chosen], 60)
        if status == 200:
            fingerprint, text, reason = _answer(said)
            self._history.add(status, reason)
            if (fingerprint, text) in self._short[chosen]:
                return
        else:
            self._history.add(status)
            if status == 429:
                return
        self.wrong.append((SHORT[chosen], status, said))

    def _begins_an_answer(self, received: bytes) -> bool:
        """Whether the whole events of the bytes are the first of a known answer's."""
        lines = received.split(b"\n")[:-1]
        events = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
        if not events:
            return True
        text = "".join(event["choices"][0]["text"] for event in events if event.get("choices"))
        known = self._streams.get(str(events[0].get("system_fingerprint")))
        return known is not None and known.startswith(text)

    def _ask(self, body: dict[str, Any]) -> tuple[str, str, str]:
        status, said = post(self._url, body, 60)
        assert status == 200, said
        return _answer(said)

    def _open_stream(self) -> socket.socket:
        place = urlsplit(self._url)
        connection = socket.create_connection((place.hostname, place.port), 30)
        body = json.dumps(STREAM).encode()
        head = "POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json"
        connection.sendall(f"{head}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
        return connection


def _answer(said: bytes) -> tuple[str, str, str]:
    """Fingerprint, text and finish reason of a completion of one choice."""
    reply = json.loads(said)
    (choice,) = reply["choices"]
    return reply["system_fingerprint"], choice["text"], choice["finish_reason"]
