from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from llmserve.server.log_format import JsonFormatter, start_log
from support.servers import LocalServer


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """What the access log writes, as JSON."""
    log, stream = logging.getLogger("llmserve.access"), io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield stream
    log.removeHandler(handler)
    log.setLevel(level)


def test_a_request_is_one_object_without_its_prompt(
    server: LocalServer, lines: io.StringIO
) -> None:
    reply = server.complete(prompt="a secret prompt", max_tokens=1)
    server.get("/%0a%22forged\x1b[0m")
    first, second = map(json.loads, lines.getvalue().splitlines())
    assert first["path"] == "/v1/completions"
    assert (first["method"], first["status"]) == ("POST", 200)
    assert first["duration_ms"] > 0
    assert first["request_id"] == reply.headers["x-request-id"]
    assert (first["level"], first["logger"]) == ("info", "llmserve.access")
    assert "secret" not in lines.getvalue()
    assert second["status"] == 404
    assert "\x1b" not in second["path"]


def test_errors_come_with_their_trace() -> None:
    try:
        raise ValueError("no")
    except ValueError:
        record = logging.getLogger("x").makeRecord(
            "x", logging.ERROR, "f", 1, "failed: %s", ("why",), __import__("sys").exc_info()
        )
    told = json.loads(JsonFormatter().format(record))
    assert told["message"] == "failed: why"
    assert "ValueError: no" in told["exception"]


@pytest.mark.parametrize(("log_format", "kind"), [("json", JsonFormatter), ("text", None)])
def test_start_log_sets_the_form(
    monkeypatch: pytest.MonkeyPatch, log_format: str, kind: type | None
) -> None:
    given: list[logging.Handler] = []
    monkeypatch.setattr(logging, "basicConfig", lambda **options: given.extend(options["handlers"]))
    start_log(log_format)
    assert isinstance(given[0].formatter, JsonFormatter) == (kind is not None)
