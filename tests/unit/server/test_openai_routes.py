from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmserve.runners.fake import next_token
from llmserve.runners.protocol import SamplingRow
from llmserve.text.tokenizer import Tokenizer
from support.models import MAX_SEQ_LEN, make_model_folder
from support.servers import LocalServer, local_server

VOCAB = 320
PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> Tokenizer:
    return Tokenizer.load(model_folder)


def greedy(prompt: list[int], count: int) -> list[int]:
    """The scripted runner's answer, computed without a server."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(next_token(ids, VOCAB))
    return ids[len(prompt) :]


def spell(text: str, tokenizer: Tokenizer):
    """A script that answers every prompt with `text`, whatever the prompt is."""
    ids = tokenizer.encode(text, add_special_tokens=False)

    def script(row: SamplingRow) -> int:
        made = len(row.token_ids) - row.num_prompt_tokens
        return ids[made] if made < len(ids) else 0

    return script


@pytest.fixture(scope="module")
def speller(model_folder: Path, tokenizer: Tokenizer) -> Iterator[LocalServer]:
    """A server that always answers with the same sentence, then ends."""
    script = spell("she saw a 🙂 dog, and the dog said hello.", tokenizer)
    with local_server(model_folder, script=script) as server:
        yield server


def test_completion_is_the_models_text_with_its_usage(
    server: LocalServer, tokenizer: Tokenizer
) -> None:
    reply = server.complete(prompt=PROMPT, max_tokens=12)
    assert reply.status == 200
    body = reply.json()
    prompt = tokenizer.encode(PROMPT)
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert body["model"] == "tiny"
    assert body["system_fingerprint"].startswith("fp_")
    choice = body["choices"][0]
    assert choice["text"] == tokenizer.decode([*prompt, *greedy(prompt, 12)]).removeprefix(PROMPT)
    assert (choice["index"], choice["finish_reason"]) == (0, "length")
    assert body["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": 12,
        "total_tokens": len(prompt) + 12,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_default_is_sixteen_tokens_and_less_at_the_contexts_end(server: LocalServer) -> None:
    assert server.complete(prompt=[5]).json()["usage"]["completion_tokens"] == 16
    near_end = [5] * (MAX_SEQ_LEN - 3)
    reply = server.complete(prompt=near_end).json()
    assert reply["usage"]["completion_tokens"] == 3
    assert reply["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions"])
def test_stream_joins_to_the_whole_reply(server: LocalServer, route: str) -> None:
    content = {"prompt": PROMPT} if route == "/v1/completions" else chat_of(PROMPT)
    body = {**content, "max_tokens": 40, "n": 3, "seed": 7, "ignore_eos": True}
    whole = server.post(route, body).json()["choices"]
    streamed = server.post(route, {**body, "stream": True})
    assert streamed.headers["content-type"] == "text/event-stream"
    texts = ["", "", ""]
    ends = ["", "", ""]
    for event in streamed.events():
        (choice,) = event["choices"]
        assert not ends[choice["index"]], "an event after the choice's end"
        texts[choice["index"]] += choice.get("text", "") + choice.get("delta", {}).get(
            "content", ""
        )
        ends[choice["index"]] = choice["finish_reason"] or ""
    assert texts == [choice.get("text") or choice["message"]["content"] for choice in whole]
    assert ends == ["length"] * 3
    assert len(set(texts)) == 3, "choices share their random numbers"


def chat_of(text: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": text}]}


def test_stream_has_one_event_a_token_and_merges_role_and_end(speller: LocalServer) -> None:
    body = {**chat_of("x"), "stream": True, "temperature": 0}
    events = speller.post("/v1/chat/completions", body).events()
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas[0]["role"] == "assistant"
    assert deltas[0]["content"], "the role came before the first token"
    assert all("role" not in delta for delta in deltas[1:])
    assert "".join(d["content"] for d in deltas) == "she saw a 🙂 dog, and the dog said hello."
    reasons = [event["choices"][0]["finish_reason"] for event in events]
    assert reasons == [None] * (len(events) - 1) + ["stop"]
    assert all(event["object"] == "chat.completion.chunk" for event in events)
    assert len({event["id"] for event in events}) == 1


def test_usage_event_comes_only_when_asked_and_last(server: LocalServer) -> None:
    body = {"prompt": PROMPT, "max_tokens": 4, "stream": True}
    assert all(event["choices"] for event in server.complete(**body).events())
    events = server.complete(**body, stream_options={"include_usage": True}).events()
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 4
    assert all("usage" not in event for event in events[:-1])
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = server.complete(**body, stream_options=options).events()
    assert [event["usage"]["completion_tokens"] for event in events][-2:] == [4, 4]
    assert all("usage" in event for event in events)


def test_prompt_lists_and_n_number_their_choices(server: LocalServer, tokenizer: Tokenizer) -> None:
    prompts = [[5, 6], [7, 8, 9]]
    body = server.complete(prompt=prompts, n=2, max_tokens=6).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    texts = [choice["text"] for choice in body["choices"]]
    assert (
        texts[0]
        == texts[1]
        == server.complete(prompt=[5, 6], max_tokens=6).json()["choices"][0]["text"]
    )
    assert texts[2] == texts[3] != texts[0]
    assert body["usage"]["prompt_tokens"] == 5
    assert body["usage"]["completion_tokens"] == 24
    as_text = server.complete(prompt=["dog", "park"], max_tokens=1).json()
    expected = sum(len(tokenizer.encode(text)) for text in ("dog", "park"))
    assert as_text["usage"]["prompt_tokens"] == expected


def test_echo_puts_the_prompt_before_each_choice(server: LocalServer, tokenizer: Tokenizer) -> None:
    plain = server.complete(prompt=PROMPT, max_tokens=5).json()["choices"][0]["text"]
    whole = server.complete(prompt=PROMPT, max_tokens=5, echo=True, n=2).json()["choices"]
    assert [choice["text"] for choice in whole] == [PROMPT + plain] * 2
    ids = tokenizer.encode(PROMPT)
    events = server.complete(prompt=ids, max_tokens=5, echo=True, stream=True).events()
    assert "".join(event["choices"][0]["text"] for event in events) == PROMPT + plain


def test_stop_string_ends_the_text_before_it_in_both_forms(speller: LocalServer) -> None:
    body = {"prompt": "x", "max_tokens": 60, "stop": ["zebra", "dog, a"]}
    choice = speller.complete(**body).json()["choices"][0]
    assert choice["text"] == "she saw a 🙂 "
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "dog, a")
    events = speller.complete(**body, stream=True).events()
    assert "".join(event["choices"][0]["text"] for event in events) == "she saw a 🙂 "
    assert events[-1]["choices"][0]["stop_reason"] == "dog, a"
    kept = speller.complete(**body, include_stop_str_in_output=True).json()["choices"][0]
    assert kept["text"] == "she saw a 🙂 dog, a"
    speller.wait_idle()


def test_a_stopped_choice_costs_no_more_steps_while_others_go_on(
    model_folder: Path, tokenizer: Tokenizer
) -> None:
    sentence = spell("a dog said", tokenizer)

    def script(row: SamplingRow) -> int:
        return sentence(row) if row.token_ids[0] == 5 else 9

    with local_server(model_folder, script=script) as server:
        body = {"prompt": [[5], [6]], "max_tokens": 200, "stop": "dog"}
        choices = server.complete(**body).json()["choices"]
        assert [choice["finish_reason"] for choice in choices] == ["stop", "length"]
        server.wait_idle()
        computed = server.engine.engine.stats().num_decode_tokens
        assert 200 <= computed < 240


def test_stop_id_is_reported_by_its_number(server: LocalServer) -> None:
    ids = greedy([5], 8)
    body = server.complete(prompt=[5], max_tokens=20, stop_token_ids=[ids[7]]).json()
    choice = body["choices"][0]
    first = ids.index(ids[7])
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", ids[7])
    assert body["usage"]["completion_tokens"] == first + 1


def test_legacy_logprobs_of_a_stream_join_to_the_whole(speller: LocalServer) -> None:
    body = {"prompt": "x", "max_tokens": 60, "logprobs": 2}
    whole = speller.complete(**body, ignore_eos=False).json()["choices"][0]["logprobs"]
    joined: dict[str, list[object]] = {name: [] for name in whole}
    for event in speller.complete(**body, ignore_eos=False, stream=True).events():
        for name, values in event["choices"][0]["logprobs"].items():
            joined[name] += values
    assert joined == whole
    assert whole["text_offset"][0] == 0
    assert len(whole["tokens"]) == len(whole["token_logprobs"]) == len(whole["top_logprobs"])
    assert all(len(top) <= 2 for top in whole["top_logprobs"])


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


def test_seed_repeats_and_its_absence_varies(server: LocalServer) -> None:
    def ask(**changes: object) -> str:
        body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 1, **changes}
        return server.complete(**body).json()["choices"][0]["text"]

    assert ask(seed=3) == ask(seed=3) != ask(seed=4)
    assert len({ask() for _ in range(4)}) == 4


def test_only_allowed_ids_are_generated_and_banned_ones_never(server: LocalServer) -> None:
    def ids(**fields: object) -> set[str]:
        body = {"prompt": [5], "max_tokens": 40, "logprobs": 0, **fields}
        return set(server.complete(**body).json()["choices"][0]["logprobs"]["tokens"])

    texts = {token_id: server.service.tokenizer.token_text(token_id) for token_id in (70, 71)}
    assert ids(allowed_token_ids=[70, 71]) == set(texts.values())
    assert ids(allowed_token_ids=[70, 71], banned_token_ids=[71]) == {texts[70]}
    first = greedy([5], 1)[0]
    stopped = server.complete(prompt=[5], max_tokens=1, stop_token_ids=[first])
    assert stopped.json()["choices"][0]["stop_reason"] == first
    other = server.complete(
        prompt=[5], max_tokens=1, stop_token_ids=[first], banned_token_ids=[first]
    )
    assert other.json()["choices"][0]["stop_reason"] is None


def test_ignored_fields_are_named_in_a_header(server: LocalServer) -> None:
    reply = server.complete(prompt="x", max_tokens=1, user="me", metadata={"a": "b"}, store=True)
    assert reply.status == 200
    assert reply.headers["x-llmserve-ignored"] == "user, metadata, store"
    assert "x-llmserve-ignored" not in server.complete(prompt="x", max_tokens=1).headers


def test_unknown_fields_are_refused_or_skipped_where_asked(model_folder: Path) -> None:
    body = {"prompt": "x", "max_tokens": 1, "max_tokns": 3, "x\r\nset-cookie: a": 1}
    with local_server(model_folder, ignore_unknown_fields=True) as lenient:
        reply = lenient.complete(**body)
        assert reply.status == 200
        assert reply.headers["x-llmserve-ignored"] == "max_tokns, and 1 more"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("best_of", 1),
        ("suffix", None),
        ("length_penalty", 1.0),
        ("use_beam_search", False),
        ("response_format", {"type": "text"}),
        ("skip_special_tokens", True),
        ("logit_bias", None),
        ("stop", None),
        ("stop", []),
        ("max_tokens", None),
        ("logprobs", None),
        ("priority", 0),
        ("cache_salt", None),
        ("prompt_logprobs", None),
        ("allowed_token_ids", None),
        ("banned_token_ids", []),
        ("typical_p", 1),
    ],
)
def test_neutral_values_of_known_fields_are_accepted(
    server: LocalServer, field: str, value: object
) -> None:
    assert server.complete(**{"prompt": "x", "max_tokens": 1, field: value}).status == 200


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("best_of", 2),
        ("best_of", True),
        ("suffix", "end"),
        ("bad_words", ["x"]),
        ("truncate_prompt_tokens", 3),
        ("skip_special_tokens", False),
        ("request_id", "x"),
        ("max_tokns", 3),
        ("messages", []),
    ],
)
def test_fields_that_are_not_served_are_refused_by_name(
    server: LocalServer, field: str, value: object
) -> None:
    reply = server.complete(**{"prompt": "x", "max_tokens": 1, field: value})
    assert reply.status == 400
    assert reply.json()["error"]["param"] == field
    assert field in reply.json()["error"]["message"]


@pytest.mark.parametrize("field", ["tools", "functions", "chat_template", "audio", "echo"])
def test_chat_fields_that_are_not_served_are_refused(server: LocalServer, field: str) -> None:
    reply = server.post("/v1/chat/completions", {**chat_of("x"), field: [{"type": "function"}]})
    assert reply.status == 400
    assert reply.json()["error"]["param"] == field
    null = {**chat_of("x"), field: None, "max_tokens": 1}
    assert server.post("/v1/chat/completions", null).status == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options"),
        ({"prompt": "x", "min_tokens": 9, "max_tokens": 8}, "min_tokens"),
        ({"prompt": "x", "allowed_token_ids": []}, "allowed_token_ids"),
        ({"prompt": "x", "allowed_token_ids": [5], "banned_token_ids": [5]}, "allowed_token_ids"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", [1]]}, "prompt"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(
    server: LocalServer, body: dict[str, object], param: str
) -> None:
    reply = server.complete(**body)
    assert reply.status == 400
    assert reply.json()["error"]["param"] == param


def test_too_long_a_prompt_names_both_numbers(server: LocalServer) -> None:
    reply = server.complete(prompt=[5] * MAX_SEQ_LEN)
    message = reply.json()["error"]["message"]
    assert reply.status == 400
    assert str(MAX_SEQ_LEN) in message
    assert str(MAX_SEQ_LEN - 1) in message
    reply = server.complete(prompt=[5] * 10, max_tokens=MAX_SEQ_LEN)
    assert reply.status == 400
    assert reply.json()["error"]["param"] == "max_tokens"


def test_unknown_model_is_404_and_the_right_one_or_none_is_served(server: LocalServer) -> None:
    for route, content in (
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/chat/completions", chat_of("x")),
    ):
        reply = server.post(route, {**content, "model": "gpt-9", "max_tokens": 1})
        assert reply.status == 404
        assert reply.json()["error"]["param"] == "model"
        assert server.post(route, {**content, "model": "tiny", "max_tokens": 1}).status == 200
    assert server.get("/v1/models/gpt-9").status == 404


def test_models_list_their_facts_under_every_name(model_folder: Path) -> None:
    with local_server(model_folder, names=("a", "org/b")) as server:
        listed = server.get("/v1/models").json()["data"]
        assert [model["id"] for model in listed] == ["a", "org/b"]
        one = server.get("/v1/models/org/b").json()
        assert {**listed[1], "lineage": None, "certificate": None} == one
        assert one["root"] == str(model_folder)
        assert one["max_model_len"] == MAX_SEQ_LEN
        assert {"executed_form", "cache_dtype", "quantization", "runner"} <= one.keys()
        assert server.complete(prompt="x", model="org/b", max_tokens=1).json()["model"] == "a"


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


def test_a_full_queue_is_429_with_retry_after(model_folder: Path) -> None:
    from llmserve.limits import Limits

    limits = Limits(max_waiting_requests=1)
    with local_server(model_folder, limits=limits, engine={"max_num_seqs": 1}) as server:
        server.loop.call_soon_threadsafe(server.engine.running.clear)
        import threading

        replies: list[int] = []

        def ask() -> None:
            replies.append(server.complete(prompt="x", max_tokens=2).status)

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        while server.engine.requests.num_sequences < 2:
            threading.Event().wait(0.001)
        refused = server.complete(prompt="x", max_tokens=2)
        assert refused.status == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "overloaded_error"
        server.loop.call_soon_threadsafe(server.engine.running.set)
        for thread in threads:
            thread.join()
        assert replies == [200, 200]
        server.wait_idle()


def test_engine_errors_end_replies_of_both_forms(model_folder: Path) -> None:
    with local_server(model_folder, step_s=0.005) as server:

        async def kill_soon() -> None:
            while server.engine.stats is None or server.engine.stats.num_steps < 5:
                await asyncio.sleep(0.001)
            server.engine.lose("test")

        import asyncio

        killing = asyncio.run_coroutine_threadsafe(kill_soon(), server.loop)
        streamed = server.complete(prompt="x", max_tokens=200, stream=True)
        killing.result(5)
        events = streamed.events()
        assert streamed.status == 200
        assert events[-1]["error"]["type"] == "unavailable_error"
        whole = server.complete(prompt="x", max_tokens=200)
        assert whole.status == 503
        assert server.get("/health").status == 503
        assert server.get("/ready").status == 503


def test_a_deadline_ends_the_request(model_folder: Path) -> None:
    from llmserve.limits import Limits

    with local_server(model_folder, step_s=0.02, limits=Limits(max_deadline_s=0.15)) as server:
        whole = server.complete(prompt="x", max_tokens=200)
        assert whole.status == 504
        assert whole.json()["error"]["type"] == "timeout_error"
        events = server.complete(prompt="x", max_tokens=200, stream=True).events()
        assert events[-1]["choices"][0]["finish_reason"] == "timeout"
        server.wait_idle()


def test_a_model_tells_of_its_lineage_and_certificate(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "m")
    (folder / "lineage.json").write_text('{"run": {"sha256": "abc"}}')
    sha256 = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    form = {"name": "paged", "mean_kl": 0.01}
    certificate = {"manifest_sha256": sha256, "forms": [form]}
    plotted = {**certificate, "forms": [{**form, "scatter": [[0, 1]]}]}
    (folder / "certificate.json").write_text(json.dumps(plotted))
    with local_server(folder) as server:
        card = server.get("/v1/models/m").json()
        (listed,) = server.get("/v1/models").json()["data"]
    assert card["lineage"] == {"run": {"sha256": "abc"}}
    assert card["certificate"] == certificate  # what is there for plots stays in the folder
    assert (card["root"], card["max_model_len"]) == (str(folder), MAX_SEQ_LEN)
    assert {**listed, "lineage": card["lineage"], "certificate": card["certificate"]} == card


def test_a_model_without_records_says_so(server: LocalServer) -> None:
    card = server.get("/v1/models/tiny").json()
    assert (card["lineage"], card["certificate"]) == (None, None)
