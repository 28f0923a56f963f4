"""A real checkpoint end to end: HTTP, the official client, the engine's process, the torch runner.

The model tells, from its first token and without chance, a text that others have published."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from llmserve.text.tokenizer import Tokenizer
from support.serving import serving

pytestmark = [pytest.mark.http, pytest.mark.shared]

NUM_TOKENS = 200
NUM_CHARACTERS = 464
# Prompts of mixed length beside the one under test; ids of the vocabulary, no meaning intended.
NEIGHBOURS = [[1, *((7 * i + j) % 500 + 3 for j in range(17 * i % 290))] for i in range(1, 16)]
OPTIONS = {
    "model": "stories260K",
    "temperature": 0,
    "max_tokens": NUM_TOKENS,
    "extra_body": {"ignore_eos": True},
}


@pytest.fixture(scope="module")
def expected(stories260k: Path) -> str:
    text = (stories260k / "expected-greedy-200.txt").read_text(encoding="utf-8")
    assert len(text) == NUM_CHARACTERS
    return text


@pytest.fixture(scope="module")
def url(stories260k: Path) -> Iterator[str]:
    with serving(stories260k) as server:
        yield server.wait_until_ready() + "/v1"


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as opened:
        yield opened


def test_alone_whole_and_streamed(client: openai.OpenAI, expected: str) -> None:
    whole = client.completions.create(prompt=[1], **OPTIONS)
    assert whole.choices[0].text == expected
    assert whole.usage is not None
    assert whole.usage.completion_tokens == NUM_TOKENS
    chunks = list(client.completions.create(prompt=[1], stream=True, **OPTIONS))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "length"


def test_as_one_of_sixteen_prompts_of_one_request(client: openai.OpenAI, expected: str) -> None:
    prompts = [*NEIGHBOURS[:7], [1], *NEIGHBOURS[7:]]
    whole = client.completions.create(prompt=prompts, **OPTIONS)
    assert len(whole.choices) == 16
    assert whole.choices[7].text == expected
    texts = [""] * 16
    for chunk in client.completions.create(prompt=prompts, stream=True, **OPTIONS):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]


def test_among_fifteen_requests_of_others(url: str, expected: str) -> None:
    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:

            async def ask(prompt: list[int], stream: bool) -> str:
                if not stream:
                    reply = await client.completions.create(prompt=prompt, **OPTIONS)
                    return reply.choices[0].text
                events = await client.completions.create(prompt=prompt, stream=True, **OPTIONS)
                return "".join([event.choices[0].text async for event in events])

            others = [ask(prompt, index % 2 == 0) for index, prompt in enumerate(NEIGHBOURS)]
            return list(await asyncio.gather(ask([1], stream=True), *others))

    assert asyncio.run(ask_all())[0] == expected


def test_tokens_are_the_published_ids(client: openai.OpenAI, stories260k: Path) -> None:
    published = json.loads((stories260k / "expected-greedy-200.json").read_text())
    tokenizer = Tokenizer.load(stories260k)
    reply = client.completions.create(prompt=[1], logprobs=1, **OPTIONS)
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == [tokenizer.token_text(token_id) for token_id in published]
    assert all(value <= 0 for value in logprobs.token_logprobs or [1])
