from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from llmserve.limits import Limits
from llmserve.runners.protocol import SamplingRow
from llmserve.server.auth import Key, KeyRing, RouteScope
from llmserve.server.page import FOLDER
from llmserve.server.page_files import PAGE_FILES
from llmserve.text.tokenizer import Tokenizer
from support.servers import LocalServer, call, local_server

PAYLOADS = (
    "\n\ndata: [DONE]\n\n",
    '"}]}\n\ndata: {"error"',
    "\u2028\u2029 \x00 \x1b[31m",
    "<script>alert(1)</script>",
)


@pytest.mark.parametrize("path", ["/", "/v1/models", "/health", "/nothing", "/openapi.json"])
def test_every_reply_has_the_security_headers(server: LocalServer, path: str) -> None:
    headers = server.get(path).headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("127.0.0.1:8000", 200),
        ("localhost:1", 200),
        ("LOCALHOST", 200),
        ("[::1]:8000", 200),
        ("evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("evil.example:8000", 421),
        ("", 421),
    ],
)
def test_on_loopback_only_its_own_names_are_answered(
    server: LocalServer, host: str, status: int
) -> None:
    assert server.get("/v1/models", host=host).status == status


def test_two_host_headers_are_refused(server: LocalServer) -> None:
    async def ask() -> int:
        async def app(scope, receive, send):  # type: ignore[no-untyped-def]
            scope["headers"].append((b"host", b"127.0.0.1"))
            await server.app(scope, receive, send)

        return (await call(app, "GET", "/health")).status

    assert server.run(ask()) == 421


def test_allowed_hosts_replace_the_list(model_folder: Path) -> None:
    with local_server(model_folder, allowed_hosts=("llm.example",)) as server:
        assert server.get("/health", host="llm.example:443").status == 200
        assert server.get("/health", host="127.0.0.1").status == 421


def test_other_origins_are_let_in_only_when_listed(model_folder: Path, server: LocalServer) -> None:
    async def preflight(server: LocalServer, origin: str):  # type: ignore[no-untyped-def]
        headers = {
            "origin": origin,
            "access-control-request-method": "POST",
            "access-control-request-headers": "content-type",
        }
        return await call(server.app, "OPTIONS", "/v1/completions", headers=headers)

    assert (
        "access-control-allow-origin" not in server.get("/v1/models", origin="http://a.b").headers
    )
    assert server.run(preflight(server, "http://a.b")).status == 405
    with local_server(model_folder, allowed_origins=("http://a.b",)) as open_server:
        allowed = open_server.run(preflight(open_server, "http://a.b"))
        assert allowed.headers["access-control-allow-origin"] == "http://a.b"
        assert "access-control-allow-credentials" not in allowed.headers
        refused = open_server.run(preflight(open_server, "http://c.d"))
        assert "access-control-allow-origin" not in refused.headers
        reply = open_server.get("/v1/models", origin="http://a.b")
        assert reply.headers["access-control-allow-origin"] == "http://a.b"


def test_sane_request_ids_come_back_and_others_are_replaced(server: LocalServer) -> None:
    assert server.get("/health", x_request_id="abc-1.2_3").headers["x-request-id"] == "abc-1.2_3"
    for odd in ("a b", "x" * 129, "a\tb", "é"):
        given = server.get("/health", x_request_id=odd).headers["x-request-id"]
        assert re.fullmatch("[0-9a-f]{32}", given)


def test_headers_are_bounded_by_count_and_size(server: LocalServer) -> None:
    limits = Limits()
    few = {f"x-{index}": "1" for index in range(limits.max_headers - 2)}
    assert server.get("/health", **few).status == 200
    assert server.get("/health", **few, **{"x-a": "1"}).status == 431
    assert server.get("/health", x_big="a" * limits.max_header_bytes).status == 431


def test_the_log_holds_neither_prompts_nor_keys(
    model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    secret, prompt = "a-very-secret-key", "a very private prompt"
    keys = KeyRing([Key.of(secret, {RouteScope.USER})])
    with local_server(model_folder, keys=keys) as server, caplog.at_level(logging.DEBUG):
        bearer = f"Bearer {secret}"
        assert server.post(
            "/v1/completions", {"prompt": prompt, "max_tokens": 1}, authorization=bearer
        ).status == 200  # fmt: skip
        server.post("/v1/completions", {"prompt": prompt, "n": 0}, authorization=bearer)
        server.get(f"/v1/models?key={secret}", authorization=bearer)
        server.get("/a\r\nINFO forged line\x1b[31m", authorization=bearer)
        metrics = server.state.metrics.render().decode()
    assert secret not in caplog.text + metrics + repr(keys)
    assert prompt not in caplog.text + metrics
    lines = [record.getMessage() for record in caplog.records if record.name == "llmserve.access"]
    assert len(lines) == 4
    assert all("\n" not in line and "\x1b" not in line for line in lines)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_text_cannot_break_out_of_a_stream(model_folder: Path, payload: str) -> None:
    ids = Tokenizer.load(model_folder).encode(payload, add_special_tokens=False)

    def script(row: SamplingRow) -> int:
        made = len(row.token_ids) - row.num_prompt_tokens
        return ids[made] if made < len(ids) else 0

    with local_server(model_folder, script=script) as server:
        body = {"prompt": "x", "max_tokens": 100, "stream": True}
        events = server.post("/v1/completions", body).events()
        assert "".join(event["choices"][0]["text"] for event in events) == payload


def test_the_page_loads_nothing_from_elsewhere_and_builds_no_markup() -> None:
    for name, _ in PAGE_FILES.values():
        text = (FOLDER / name).read_text(encoding="utf-8")
        for address in re.findall(r"(?:https?:)?//[a-z][^\s\"'`]*", text):
            assert "www.w3.org" in address, f"{name} refers to {address}"
        for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
            assert sink not in text, f"{name} uses {sink}"
        assert not re.search(r"<script(?![^>]*\bsrc=)|\son[a-z]+=|style=|javascript:", text)
        assert "localStorage" not in text or "key" not in text.lower().split("localstorage")[1][:40]


def test_the_page_is_served_with_its_types(server: LocalServer) -> None:
    for path, (name, media_type) in PAGE_FILES.items():
        reply = server.get(path)
        assert reply.status == 200
        assert reply.headers["content-type"] == media_type
        assert reply.body == (FOLDER / name).read_bytes()
    assert server.get("/static/../auth.py").status == 404
    assert server.get("/static/none.js").status == 404


def test_a_defect_in_a_route_is_500_in_the_same_shape(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with local_server(model_folder) as server:
        monkeypatch.setattr(type(server.state.metrics), "render", lambda _self: 1 / 0)
        with pytest.raises(ZeroDivisionError):  # starlette hands it on, for uvicorn's log
            server.get("/metrics")
