"""R02: random requests, shaped like real ones and then damaged. Never a 5xx, never a hang, and the
engine holds together after each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.models import make_model_folder
from support.servers import LocalServer, local_server

ROUTES = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/embeddings",
    "/v1/score",
    "/v1/rerank",
    "/v1/classify",
    "/v1/answers",
    "/tokenize",
    "/detokenize",
)

numbers = st.integers(-3, 20) | st.integers() | st.floats()
scalars = st.none() | st.booleans() | numbers | st.text(max_size=8)
json_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
ids = st.lists(st.integers(0, 319), max_size=6)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system"]), "content": st.text(max_size=20)}
    ),
    max_size=3,
)
plausible: dict[str, st.SearchStrategy[Any]] = {
    "prompt": st.text(max_size=20) | ids | st.lists(st.text(max_size=8), max_size=3),
    "messages": messages,
    "tokens": ids,
    "max_tokens": st.integers(0, 8),
    "n": st.integers(0, 4),
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0, 1),
    "top_k": st.integers(-2, 400),
    "logprobs": st.integers(0, 5) | st.booleans(),
    "stop": st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=3),
    "stream": st.booleans(),
    "echo": st.booleans(),
    "seed": st.integers(0, 2**63),
    "logit_bias": st.dictionaries(st.integers(-1, 400).map(str), st.floats(-101, 101), max_size=3),
    "stop_token_ids": ids,
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}),
    "ignore_eos": st.booleans(),
    "input": st.text(max_size=20) | ids | st.lists(st.text(max_size=8), max_size=3),
    "text_1": st.text(max_size=8) | st.lists(st.text(max_size=8), max_size=2),
    "text_2": st.text(max_size=8) | st.lists(st.text(max_size=8), max_size=2),
    "query": st.text(max_size=8),
    "documents": st.lists(st.text(max_size=8), max_size=3),
    "question": st.text(max_size=8),
    "context": st.text(max_size=8),
    "top_n": st.integers(0, 3),
    "response_format": st.sampled_from(
        [{"type": "text"}, {"type": "json_object"}, {"type": "json_schema", "json_schema": {}}]
    ),
    "structured_outputs": st.fixed_dictionaries({"regex": st.text(max_size=6)}),
    "tools": st.lists(
        st.fixed_dictionaries(
            {
                "type": st.just("function"),
                "function": st.fixed_dictionaries({"name": st.text(max_size=3)}),
            }
        ),
        max_size=2,
    ),
    "tool_choice": st.sampled_from(["auto", "none", "required"]),
}


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """A plausible body with up to two odd values, sometimes with a byte changed or cut off."""
    names = draw(st.lists(st.sampled_from(sorted(plausible)), unique=True, max_size=7))
    body = {name: draw(plausible[name]) for name in names}
    if draw(st.booleans()):
        for name in draw(st.lists(st.sampled_from(sorted(plausible)), max_size=2)):
            body[name] = draw(json_values)
    data = json.dumps(body, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 4)) == 0:
        where = draw(st.integers(0, len(data) - 1))
        data = data[:where] + draw(st.binary(max_size=2)) + data[where + draw(st.integers(0, 2)) :]
    return data


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    folder = make_model_folder(tmp_path_factory.mktemp("model") / "tiny")
    with local_server(folder) as running:
        yield running


@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(route=st.sampled_from(ROUTES), body=bodies())
def test_no_request_harms_the_server(server: LocalServer, route: str, body: bytes) -> None:
    reply = server.post(route, body)
    assert reply.status == 200 or 400 <= reply.status < 500, (body, reply.body)
    if reply.status != 200:
        assert len(reply.body) <= 1024
        assert reply.json()["error"]["code"] == reply.status
    elif reply.headers["content-type"] == "text/event-stream":
        assert all("error" not in event for event in reply.events())
    else:
        reply.json()
    server.run(server.engine.requests.wait_idle(), timeout=5)
