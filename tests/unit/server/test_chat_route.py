"""`/v1/chat/completions`, where it differs from completions."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.servers import LocalServer, local_server
from support.spelling import chat_of


def test_chat_logprobs_carry_bytes_that_spell_the_text(speller: LocalServer) -> None:
    body = {**chat_of("x"), "logprobs": True, "top_logprobs": 3, "temperature": 0}
    reply = speller.post("/v1/chat/completions", body).json()["choices"][0]
    content = reply["logprobs"]["content"]
    raw = bytes(byte for entry in content[:-1] for byte in entry["bytes"])  # the last is the end
    assert raw.decode() == reply["message"]["content"]
    assert all(len(entry["top_logprobs"]) == 3 for entry in content)
    assert content[0]["top_logprobs"][0] == {
        name: content[0][name] for name in ("token", "logprob", "bytes")
    }


def test_logprobs_are_left_out_unless_asked(server: LocalServer) -> None:
    assert server.complete(prompt="x", max_tokens=1).json()["choices"][0]["logprobs"] is None
    reply = server.complete(prompt="x", max_tokens=1, logprobs=0).json()["choices"][0]
    assert reply["logprobs"]["top_logprobs"] == [None]


def test_content_parts_and_developer_role_read_like_plain_text(server: LocalServer) -> None:
    def ask(messages: list[dict[str, object]]) -> str:
        body = {"messages": messages, "temperature": 0, "max_tokens": 8}
        reply = server.post("/v1/chat/completions", body)
        assert reply.status == 200, reply.body
        return reply.json()["choices"][0]["message"]["content"]

    parts = [{"type": "text", "text": "Once "}, {"type": "text", "text": "upon"}]
    plain = ask([{"role": "system", "content": "s"}, {"role": "user", "content": "Once upon"}])
    assert plain == ask([{"role": "developer", "content": "s"}, {"role": "user", "content": parts}])
    assert plain != ask([{"role": "user", "content": parts}])


@pytest.mark.parametrize("field", ["tools", "functions", "chat_template", "audio", "echo"])
def test_chat_fields_that_are_not_served_are_refused(server: LocalServer, field: str) -> None:
    reply = server.post("/v1/chat/completions", {**chat_of("x"), field: [{"type": "function"}]})
    assert reply.status == 400
    assert reply.json()["error"]["param"] == field
    null = {**chat_of("x"), field: None, "max_tokens": 1}
    assert server.post("/v1/chat/completions", null).status == 200


def test_a_model_without_a_template_refuses_chat_with_advice(
    model_folder: Path, tmp_path: Path
) -> None:
    import shutil

    folder = tmp_path / "bare"
    shutil.copytree(model_folder, folder)
    (folder / "chat_template.jinja").unlink()
    (folder / "manifest.json").unlink()
    with local_server(folder) as server:
        reply = server.post("/v1/chat/completions", chat_of("x"))
        assert reply.status == 400
        assert "--chat-template" in reply.json()["error"]["message"]
