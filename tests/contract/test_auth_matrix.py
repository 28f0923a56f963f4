"""R23: who may call what, for every route, equal to the table of docs/http-api.md."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmserve.server.auth import Key, KeyRing, RouteScope
from llmserve.server.page_files import PAGE_FILES
from support.models import make_model_folder
from support.servers import LocalServer, call, local_server

PAGE = Path(__file__).parents[2] / "docs" / "http-api.md"
SECRETS = {"user": "user-secret-1", "metrics": "metrics-secret-1", "admin": "admin-secret-1"}
CALLERS = {"without a key": None, "inference key": "user", "metrics key": "metrics"}
CALLERS["admin key"] = "admin"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    folder = make_model_folder(tmp_path_factory.mktemp("model") / "tiny")
    keys = KeyRing(
        [
            Key.of(SECRETS["user"], {RouteScope.USER}),
            Key.of(SECRETS["metrics"], {RouteScope.METRICS}),
            Key.of(SECRETS["admin"], set(RouteScope)),
        ]
    )
    with local_server(folder, keys=keys) as server:
        yield server


def table() -> list[dict[str, str]]:
    """The rows of the page's table of routes."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    cells = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]
    head = next(index for index, row in enumerate(cells) if row[:2] == ["method", "route"])
    rows = []
    for row in cells[head + 2 :]:
        if len(row) != len(cells[head]):
            break
        rows.append(dict(zip(cells[head], row, strict=True)))
    return rows


BODIES = {
    "/v1/completions": {"prompt": "x", "max_tokens": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
    "/v1/responses": {"input": "x", "max_output_tokens": 1},
    "/v1/messages": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
    "/v1/embeddings": {"input": "x"},
    "/v1/score": {"text_1": "x", "text_2": "y"},
    "/v1/rerank": {"query": "x", "documents": ["y"]},
    "/v1/classify": {"input": "x"},
    "/v1/answers": {"question": "x", "context": "y"},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [5]},
    "/admin/models/load": {"model": "no such folder"},
}
ALLOWED = {
    "/v1/classify": 400,
    "/v1/answers": 400,
    "/requests/{request_id}/trace": 404,
    "/admin/models/load": 400,
}
"""What whoever is let in gets, if not 200: of a model without a head, of a request that nobody
made, of a folder that is not there."""


def status(server: LocalServer, row: dict[str, str], secret: str | None, header: str) -> int:
    path = row["route"].replace("{model_id}", "tiny")
    headers = {} if secret is None else {header: secret}
    body = json.dumps(BODIES.get(path, {})).encode()
    return server.run(call(server.app, row["method"], path, body, headers)).status


@pytest.mark.parametrize("row", table(), ids=lambda row: row["route"])
def test_each_route_lets_in_whom_the_page_says(guarded: LocalServer, row: dict[str, str]) -> None:
    for column, name in CALLERS.items():
        secret = None if name is None else f"Bearer {SECRETS[name]}"
        allowed = ALLOWED.get(row["route"], 200)
        expected = allowed if row[column] == "yes" else int(row[column])
        assert status(guarded, row, secret, "authorization") == expected, column
        if name is not None:
            assert status(guarded, row, SECRETS[name], "x-api-key") == expected, column
    wrong = 200 if row["without a key"] == "yes" else 401
    for secret in (
        "Bearer wrong-secret-1",
        "Bearer ",
        "Basic dXNlcg==",
        f"Bearer {SECRETS['user']}x",
    ):
        assert status(guarded, row, secret, "authorization") == wrong


def test_the_page_lists_every_route(guarded: LocalServer) -> None:
    listed = {(row["method"], row["route"]) for row in table()}
    document = guarded.get("/openapi.json", authorization=f"Bearer {SECRETS['user']}").json()
    served = {
        (method.upper(), re.sub(r":path", "", path))
        for path, methods in document["paths"].items()
        for method in methods
    }
    served |= {("GET", path) for path in PAGE_FILES} | {("GET", "/openapi.json")}
    assert listed == served


@pytest.mark.parametrize("path", ["/nothing", "/v1", "//metrics", "/health/", "/docs", "/redoc"])
def test_routes_that_do_not_exist_are_closed_too(guarded: LocalServer, path: str) -> None:
    assert guarded.get(path).status == 401
    assert guarded.get(path, authorization=f"Bearer {SECRETS['user']}").status == 404


def test_refusals_say_how_and_never_repeat_the_key(guarded: LocalServer) -> None:
    reply = guarded.get("/v1/models", authorization="Bearer wrong-secret-1")
    assert reply.headers["www-authenticate"] == "Bearer"
    assert reply.json()["error"]["type"] == "authentication_error"
    assert b"wrong-secret-1" not in reply.body
