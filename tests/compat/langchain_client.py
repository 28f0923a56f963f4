"""LangChain's `ChatOpenAI` and `OpenAIEmbeddings`."""

from __future__ import annotations

import os
from typing import Literal

from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel

MODEL = os.environ["LLMSERVE_MODEL"]
BASE = {"base_url": os.environ["LLMSERVE_URL"] + "/v1", "api_key": "none", "model": MODEL}
TURNS = [SystemMessage("Be kind."), HumanMessage("hello")]


class Weather(BaseModel):
    """The weather in a city."""

    city: Literal["Bern", "Rome"]


chat = ChatOpenAI(**BASE, max_tokens=8, seed=1, temperature=0)
whole = chat.invoke(TURNS)
assert whole.usage_metadata["output_tokens"] == 8
assert "".join(chunk.content for chunk in chat.stream(TURNS)) == whole.content
print("langchain: chat and stream ok")

roomy = ChatOpenAI(**BASE, max_tokens=200, seed=1)
assert roomy.with_structured_output(Weather, method="json_schema").invoke(TURNS).city
(call,) = roomy.bind_tools([Weather], tool_choice="Weather", strict=True).invoke(TURNS).tool_calls
assert call["name"] == "Weather"
assert call["args"]["city"] in ("Bern", "Rome")
print("langchain: structured output and tools ok")

vectors = OpenAIEmbeddings(**BASE, check_embedding_ctx_length=False).embed_documents(["a", "b"])
assert len(vectors) == 2
print("langchain: embeddings ok")
