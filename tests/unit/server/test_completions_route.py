"""`/v1/completions`, and what streams and choices have in common."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmserve.runners.protocol import SamplingRow
from llmserve.text.tokenizer import Tokenizer
from support.models import MAX_SEQ_LEN
from support.servers import LocalServer, local_server
from support.spelling import chat_of, greedy, spell

PROMPT = "Once upon a time"


def test_completion_is_the_models_text_with_its_usage(
    server: LocalServer, tokenizer: Tokenizer
) -> None:
    text = "What no other test of this server asks"  # so nothing of it is cached
    reply = server.complete(prompt=text, max_tokens=12)
    assert reply.status == 200
    body = reply.json()
    prompt = tokenizer.encode(text)
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert body["model"] == "tiny"
    assert body["system_fingerprint"].startswith("fp_")
    choice = body["choices"][0]
    assert choice["text"] == tokenizer.decode([*prompt, *greedy(prompt, 12)]).removeprefix(text)
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
