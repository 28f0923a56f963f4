"""The official `openai` client: every method that a server like ours should answer."""

from __future__ import annotations

import base64
import json
import os
import struct

import openai

MODEL = os.environ["LLMSERVE_MODEL"]
client = openai.OpenAI(base_url=os.environ["LLMSERVE_URL"] + "/v1", api_key="none", max_retries=0)
TURNS = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Bern", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def models() -> None:
    (model,) = client.models.list().data
    assert model.id == MODEL
    assert client.models.retrieve(MODEL).id == MODEL


def completions() -> None:
    whole = client.completions.create(
        model=MODEL, prompt=["Once", "upon"], max_tokens=6, n=2, logprobs=2, seed=1, echo=True
    )
    assert len(whole.choices) == 4
    assert whole.choices[0].text.startswith("Once")
    assert whole.choices[0].logprobs.token_logprobs[0] is None
    stream = client.completions.create(
        model=MODEL, prompt="Once", max_tokens=6, seed=1, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    assert chunks[-1].usage.completion_tokens == 6
    assert chunks[-2].choices[0].finish_reason == "length"


def chat() -> None:
    options = {"model": MODEL, "messages": TURNS, "max_completion_tokens": 6, "seed": 1}
    whole = client.chat.completions.create(**options, logprobs=True, top_logprobs=2)
    assert len(whole.choices[0].logprobs.content) == 6
    stream = client.chat.completions.create(**options, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == whole.choices[0].message.content


def structured() -> None:
    schema = WEATHER["function"]["parameters"]
    wanted = {"type": "json_schema", "json_schema": {"name": "w", "schema": schema}}
    reply = client.chat.completions.create(
        model=MODEL, messages=TURNS, response_format=wanted, max_tokens=200
    )
    assert json.loads(reply.choices[0].message.content)["city"] in ("Bern", "Rome")


def tools() -> None:
    reply = client.chat.completions.create(
        model=MODEL, messages=TURNS, tools=[WEATHER], tool_choice="required", max_tokens=200
    )
    assert reply.choices[0].finish_reason == "tool_calls"
    (call,) = reply.choices[0].message.tool_calls
    assert json.loads(call.function.arguments)["city"] in ("Bern", "Rome")
    answer = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    turns = [*TURNS, reply.choices[0].message, answer]
    client.chat.completions.create(model=MODEL, messages=turns, tools=[WEATHER], max_tokens=3)


def embeddings() -> None:
    reply = client.embeddings.create(model=MODEL, input=["Once", "upon a time"])
    assert abs(sum(value * value for value in reply.data[0].embedding) - 1) < 1e-3
    raw = client.embeddings.create(model=MODEL, input="Once", encoding_format="base64")
    values = base64.b64decode(raw.data[0].embedding)
    assert len(struct.unpack(f"<{len(values) // 4}f", values)) == len(reply.data[0].embedding)


def responses() -> None:
    options = {"model": MODEL, "input": "hello", "max_output_tokens": 5, "temperature": 0}
    whole = client.responses.create(**options)
    with client.responses.stream(**options) as stream:
        text = "".join(part.delta for part in stream if part.type == "response.output_text.delta")
    assert text == whole.output_text


def errors() -> None:
    for expected, options in (
        (openai.BadRequestError, {"max_tokens": -1}),
        (openai.NotFoundError, {"model": "nobody"}),
    ):
        try:
            client.completions.create(**{"model": MODEL, "prompt": "x", **options})
        except expected:
            continue
        raise AssertionError(f"{options} was accepted")


for check in (models, completions, chat, structured, tools, embeddings, responses, errors):
    check()
    print(f"openai {openai.__version__}: {check.__name__} ok")
