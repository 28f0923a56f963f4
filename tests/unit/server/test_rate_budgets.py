"""Budgets of keys: what they let through, when, and that every way of a request is charged."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from llmserve.errors import ConfigError, OverloadedError
from llmserve.server.auth import Key, KeyRing, RouteScope
from llmserve.server.rate_budgets import Budget, RateBudgets
from llmserve.server.settings import load_keys
from support.servers import LocalServer, Reply, local_server

ANN, BOB = "a-key-of-ann", "a-key-of-bob"
FOREVER = 1e9


def budgets(**bounds: int) -> RateBudgets:
    return RateBudgets({"ann": Budget(**bounds)})


def wait_of(found: RateBudgets, now: float, tenant: str = "ann") -> float:
    """Seconds to wait; 0 where the request is let through."""
    try:
        found.admit(tenant, now)
    except OverloadedError as error:
        return error.retry_after_s
    return 0.0


def test_a_minutes_requests_at_once_then_one_by_one() -> None:
    found = budgets(requests_per_minute=6)
    now = FOREVER
    assert [wait_of(found, now) for _ in range(7)] == [0.0] * 6 + [pytest.approx(10.0)]
    assert wait_of(found, now + 9.9) > 0
    assert wait_of(found, now + 10.1) == 0
    assert wait_of(found, now + 10.1) > 0
    assert [wait_of(found, now + 1000) for _ in range(7)][5:] == [0.0, pytest.approx(10.0)]


def test_tokens_may_be_overdrawn_once_and_are_paid_back() -> None:
    found = budgets(tokens_per_minute=60)
    assert wait_of(found, FOREVER) == 0
    found.charge("ann", 90, FOREVER)
    assert wait_of(found, FOREVER) == pytest.approx(31)
    assert wait_of(found, FOREVER + 31.1) == 0


def test_others_have_no_bounds() -> None:
    found = budgets(requests_per_minute=1)
    assert [wait_of(found, FOREVER, "bob") for _ in range(50)] == [0.0] * 50
    found.charge("bob", 10**9, FOREVER)
    assert wait_of(found, FOREVER, "bob") == 0


def test_over_any_time_no_more_than_the_budget_gets_through() -> None:
    generator = random.Random(0)
    found, now, passed = budgets(requests_per_minute=30), FOREVER, []
    for _ in range(2000):
        now += generator.expovariate(5)
        if wait_of(found, now) == 0:
            passed.append(now)
    for first in range(len(passed)):
        for count in (31, 60, 100):
            if first + count < len(passed):
                taken_s = passed[first + count] - passed[first]
                assert count <= 30 + taken_s / 2 + 1e-6


def ask(server: LocalServer, key: str, route: str = "completions", **body: Any) -> Reply:
    given = {"input": "x"} if route == "embeddings" else {"prompt": [5, 6], "max_tokens": 4}
    return server.post(f"/v1/{route}", {**given, **body}, authorization=f"Bearer {key}")


def limited(folder: Path, **bounds: int) -> Any:
    keys = [
        Key.of(ANN, {RouteScope.USER}, budget=Budget(**bounds)),
        Key.of(BOB, {RouteScope.USER}),
    ]
    return local_server(folder, keys=KeyRing(keys))


@pytest.mark.parametrize("route", ["completions", "embeddings"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_too_many_is_429_for_its_key_alone(
    model_folder: Path, route: str, stream: bool
) -> None:
    if route == "embeddings" and stream:
        pytest.skip("not streamed")
    body = {"stream": True} if stream else {}
    with limited(model_folder, requests_per_minute=2) as server:
        assert [ask(server, ANN, route, **body).status for _ in range(3)] == [200, 200, 429]
        reply = ask(server, ANN, route, **body)
        assert 25 <= int(reply.headers["retry-after"]) <= 31
        assert reply.json()["error"]["type"] == "overloaded_error"
        assert "2 requests" in reply.json()["error"]["message"]
        assert ask(server, BOB, route, **body).status == 200
        headers = {"authorization": f"Bearer {ANN}"}
        assert server.get("/v1/models", **headers).status == 200
        server.wait_idle()


def test_prompts_and_answers_are_charged(model_folder: Path) -> None:
    with limited(model_folder, tokens_per_minute=12) as server:
        assert ask(server, ANN, ignore_eos=True).status == 200  # 6 tokens
        assert ask(server, ANN, ignore_eos=True).status == 200  # 12
        assert ask(server, ANN).status == 429
        assert ask(server, BOB).status == 200


def test_what_is_refused_costs_no_tokens(model_folder: Path) -> None:
    with limited(model_folder, tokens_per_minute=6) as server:
        for _ in range(20):
            assert ask(server, ANN, max_tokens=10**6).status == 400
        assert ask(server, ANN).status == 200


def test_budgets_stand_in_the_key_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{ANN} name=ann requests_per_minute=5 tokens_per_minute=70\n{BOB}\n")
    ring = load_keys(user_file=file, metrics_file=None, admin_file=None)
    found = ring.budgets()
    assert found == {ring.tenant_named("ann"): Budget(requests_per_minute=5, tokens_per_minute=70)}


@pytest.mark.parametrize(
    "line",
    [
        "requests_per_minute=0",
        "requests_per_minute=-1",
        "requests_per_minute=1.5",
        "tokens_per_minute=many",
        "tokens_per_minute=",
        "tokens=5",
        "name=a name=b",
        "tokens_per_minute=5 tokens_per_minute=6",
        "name=a/b",
        "more",
    ],
)
def test_other_things_said_of_a_key_are_refused(tmp_path: Path, line: str) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{ANN} {line}\n")
    with pytest.raises(ConfigError) as caught:
        load_keys(user_file=file, metrics_file=None, admin_file=None)
    assert ANN not in str(caught.value)
