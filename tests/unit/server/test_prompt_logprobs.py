"""What a completion tells of its prompt: `echo` with `logprobs`, and `prompt_logprobs`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmserve.engine.request import FinishReason, Request, RequestOutput
from llmserve.limits import Limits
from llmserve.runners.fake import next_token
from llmserve.runners.protocol import TokenLogprobs
from llmserve.sampling import SamplingParams
from llmserve.server.generation import Generation, Update
from llmserve.text.tokenizer import Tokenizer
from support.servers import LocalServer, local_server

VOCAB = 320
PROMPT = "Once upon a time, 日本"


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> Tokenizer:
    return Tokenizer.load(model_folder)


@pytest.fixture(scope="module")
def small_steps(model_folder: Path) -> Iterator[LocalServer]:
    """A server that takes several steps for one prompt."""
    with local_server(model_folder, engine={"max_batched_tokens": 16}) as server:
        yield server
        server.wait_idle()


def logprobs_of(ids: list[int]) -> list[float]:
    """The scripted runner's, from the second token on: half as likely for each id further away."""
    return [
        math.log(0.5) * (1 + (ids[place] - next_token(ids[:place], VOCAB)) % VOCAB)
        for place in range(1, len(ids))
    ]


def choices(server: LocalServer, **body: Any) -> list[dict[str, Any]]:
    reply = server.complete(**body)
    assert reply.status == 200, reply.body
    return reply.json()["choices"]


def test_echo_with_logprobs_begins_with_the_prompts(
    server: LocalServer, tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode(PROMPT)
    (choice,) = choices(server, prompt=PROMPT, max_tokens=3, echo=True, logprobs=2)
    lists = choice["logprobs"]
    (bare,) = choices(server, prompt=PROMPT, max_tokens=3, logprobs=2)
    assert choice["text"] == PROMPT + bare["text"]
    assert lists["token_logprobs"][0] is None
    assert lists["top_logprobs"][0] is None
    assert lists["token_logprobs"][1 : len(ids)] == pytest.approx(logprobs_of(ids))
    assert lists["token_logprobs"][len(ids) :] == bare["logprobs"]["token_logprobs"]
    assert (
        lists["tokens"]
        == [tokenizer.token_text(token_id) for token_id in ids] + (bare["logprobs"]["tokens"])
    )
    best = [tokenizer.token_text(next_token(ids[:place], VOCAB)) for place in range(1, len(ids))]
    assert [max(top, key=top.get) for top in lists["top_logprobs"][1 : len(ids)]] == best
    lengths = [len(text) for text in lists["tokens"]]
    assert lists["text_offset"] == [sum(lengths[:place]) for place in range(len(lengths))]


@pytest.mark.parametrize("stream", [False, True])
def test_no_token_needs_to_be_generated(
    server: LocalServer, tokenizer: Tokenizer, stream: bool
) -> None:
    ids = tokenizer.encode(PROMPT)
    body = {"prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 1, "stream": stream}
    reply = server.complete(**body)
    (choice,) = (reply.events()[0] if stream else reply.json())["choices"]
    assert choice["text"] == tokenizer.decode(ids)
    assert choice["finish_reason"] == "length"
    assert len(choice["logprobs"]["tokens"]) == len(ids)
    assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(logprobs_of(ids))
    if not stream:
        assert reply.json()["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize("field", [{"echo": True}, {"prompt_logprobs": 0}])
def test_nothing_at_all_is_generated_only_where_the_prompt_is_told(
    server: LocalServer, field: dict[str, object]
) -> None:
    assert server.complete(prompt="x", max_tokens=0, **field).status == 200
    refused = server.complete(prompt="x", max_tokens=0)
    assert refused.status == 400
    assert refused.json()["error"]["param"] == "max_tokens"


def test_prompt_logprobs_are_tables_by_id(small_steps: LocalServer, tokenizer: Tokenizer) -> None:
    ids = [5, 6, 7] * 12  # more than one step takes
    (choice,) = choices(small_steps, prompt=ids, max_tokens=1, prompt_logprobs=2)
    first, *tables = choice["prompt_logprobs"]
    assert first is None
    assert len(tables) == len(ids) - 1
    for place, (table, logprob) in enumerate(zip(tables, logprobs_of(ids), strict=True), start=1):
        best = next_token(ids[:place], VOCAB)
        assert table[str(ids[place])]["logprob"] == pytest.approx(logprob)
        assert table[str(best)] == {
            "logprob": pytest.approx(math.log(0.5)),
            "rank": 1,
            "decoded_token": tokenizer.token_text(best),
        }
        # The rank of a token that is not among the likeliest is not known.
        is_likely = ids[place] in (best, (best + 1) % VOCAB)
        assert ("rank" in table[str(ids[place])]) == is_likely
        assert len(table) == (2 if is_likely else 3)


def test_each_list_is_as_long_as_it_was_asked_to_be(
    server: LocalServer, tokenizer: Tokenizer
) -> None:
    best = next_token([5], VOCAB)
    # Different ids may have one text: parts of characters.
    texts = {tokenizer.token_text((best + rank) % VOCAB) for rank in range(4)}
    body = {"prompt": [5, 6, 7], "max_tokens": 1, "echo": True}
    (few,) = choices(server, **body, logprobs=1, prompt_logprobs=4)
    assert len(few["logprobs"]["top_logprobs"][1]) == 1
    assert len(few["prompt_logprobs"][1]) in (4, 5)
    (many,) = choices(server, **body, logprobs=4, prompt_logprobs=1)
    assert many["logprobs"]["top_logprobs"][1].keys() == texts
    assert len(many["prompt_logprobs"][1]) in (1, 2)
    assert "prompt_logprobs" not in choices(server, **body, logprobs=4)[0]


def test_a_prompt_of_one_token_has_nothing_to_tell(server: LocalServer) -> None:
    body = {"prompt": [5], "max_tokens": 1, "echo": True, "logprobs": 1, "prompt_logprobs": 1}
    (choice,) = choices(server, **body)
    assert choice["prompt_logprobs"] == [None]
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert len(choice["logprobs"]["tokens"]) == 2


def test_every_choice_of_every_prompt_begins_with_its_prompts(small_steps: LocalServer) -> None:
    prompts = [[5, 6, 7] * 8, [9] * 30]
    body = {
        "prompt": prompts, "n": 3, "max_tokens": 4, "seed": 3, "temperature": 1, "echo": True,
        "logprobs": 1, "prompt_logprobs": 1,
    }  # fmt: skip
    whole = choices(small_steps, **body)
    for index, choice in enumerate(whole):
        ids = prompts[index // 3]
        found = choice["logprobs"]["token_logprobs"]
        assert found[1 : len(ids)] == pytest.approx(logprobs_of(ids))
        assert len(found) == len(ids) + 4
        assert len(choice["prompt_logprobs"]) == len(ids)
    joined: list[dict[str, Any]] = [{} for _ in whole]
    for event in small_steps.complete(**body, stream=True).events():
        (choice,) = event["choices"]
        seen = joined[choice["index"]]
        assert ("prompt_logprobs" in choice) == (not seen), "not in the first event, or in two"
        if not seen:
            seen.update(choice)
            continue
        seen["text"] += choice["text"]
        for name, values in choice["logprobs"].items():
            seen["logprobs"][name] += values
        seen["finish_reason"] = choice["finish_reason"]
    assert joined == whole


def test_logprobs_of_the_prompt_are_bounded(server: LocalServer) -> None:
    most = Limits().max_logprobs
    assert server.complete(prompt="x", max_tokens=1, prompt_logprobs=most).status == 200
    for value in (-1, most + 1):
        reply = server.complete(prompt="x", max_tokens=1, prompt_logprobs=value)
        assert reply.status == 400
        assert reply.json()["error"]["param"] == "prompt_logprobs"
    chat = {"messages": [{"role": "user", "content": "x"}], "prompt_logprobs": 1}
    assert server.post("/v1/chat/completions", chat).status == 400


class _Feed:
    """A generation whose outputs are made by hand."""

    def __init__(self, server: LocalServer, n: int) -> None:
        params = SamplingParams(n=n, prompt_logprobs=0, max_tokens=4)
        self.request = Request(
            request_id="r", prompt_token_ids=[5, 6], sampling_params=params, seed=0
        )
        service = server.service
        self.generation = Generation(
            server.engine,
            service.tokenizer,
            service.metrics,
            requests=[self.request],
            limits=service.limits,
        )

    def take(self, **output: Any) -> list[Update]:
        values = {"token_ids": [7], **output}
        updates: list[Update] = []
        self.generation._advance(RequestOutput("r", **values), 0.0, updates)
        return updates


def test_siblings_wait_for_the_first_choice(server: LocalServer) -> None:
    feed = _Feed(server, n=2)
    told = [TokenLogprobs(-1.0, ())]
    assert feed.take(choice_index=1) == []
    assert feed.take(choice_index=1, finish_reason=FinishReason.LENGTH) == []
    released = feed.take(choice_index=0, prompt_logprobs=told)
    assert [(update.index, update.prompt_logprobs) for update in released] == [
        (1, told),
        (1, None),
        (0, told),
    ]
    assert [update.prompt_logprobs for update in feed.take(choice_index=0)] == [None]


def test_siblings_do_not_wait_for_one_that_never_began(server: LocalServer) -> None:
    feed = _Feed(server, n=2)
    assert feed.take(choice_index=1) == []
    ended = feed.take(choice_index=0, token_ids=[], finish_reason=FinishReason.TIMEOUT)
    assert [(update.index, update.prompt_logprobs) for update in ended] == [(1, None), (0, None)]


def test_prompts_are_computed_anew_but_may_be_found_by_others(server: LocalServer) -> None:
    ids = [5, 6, 7, 8] * 20
    for _ in range(2):
        reply = server.complete(prompt=ids, max_tokens=1, prompt_logprobs=0).json()
        assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    plain = server.complete(prompt=ids, max_tokens=1).json()
    assert plain["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
