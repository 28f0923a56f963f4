"""Embeddings, scores and ranks over HTTP: the offline engine's vectors, and plain arithmetic."""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmserve.config import Head
from llmserve.limits import Limits
from llmserve.llm import LLM
from llmserve.server.embeddings import as_base64, cosine, normalized
from support.models import make_model_folder
from support.servers import LocalServer, Reply, local_server

TEXTS = ["The little dog was big", "a little girl named Lily", "the dog said hello"]
TOLERANCE = 1e-5  # float32 sums of the same numbers, chunked otherwise


@pytest.fixture(scope="module")
def real(model_folder: Path) -> Iterator[LocalServer]:
    """A server that computes."""
    with local_server(model_folder, engine={"runner": "torch", "max_batched_tokens": 32}) as server:
        yield server


def embed(server: LocalServer, given: Any, **body: Any) -> Reply:
    return server.post("/v1/embeddings", {"input": given, **body})


def vectors(reply: Reply) -> list[list[float]]:
    assert reply.status == 200, reply.body
    data = reply.json()["data"]
    assert [item["index"] for item in data] == list(range(len(data)))
    return [item["embedding"] for item in data]


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("normalize", [True, False])
def test_vectors_are_those_of_the_offline_engine(
    real: LocalServer, model_folder: Path, pooling: str, normalize: bool
) -> None:
    with LLM(model_folder, runner="torch") as llm:
        wanted = llm.embed(TEXTS, pooling=pooling, normalize=normalize)
    found = vectors(embed(real, TEXTS, pooling=pooling, normalize=normalize))
    for one, other in zip(found, wanted, strict=True):
        assert one == pytest.approx(list(other), abs=TOLERANCE)
    real.wait_idle()


def test_every_kind_of_input_and_its_usage(server: LocalServer) -> None:
    ids = server.post("/tokenize", {"prompt": TEXTS[0]}).json()["tokens"]
    reply = embed(server, TEXTS[0])
    assert reply.json()["usage"] == {"prompt_tokens": len(ids), "total_tokens": len(ids)}
    assert reply.json()["object"] == "list"
    assert reply.json()["model"] == "tiny"
    assert vectors(reply) == vectors(embed(server, ids)) == vectors(embed(server, [ids]))
    assert len(vectors(embed(server, [TEXTS[0], TEXTS[1]]))) == 2


def test_base64_holds_the_same_numbers(server: LocalServer) -> None:
    (plain,) = vectors(embed(server, TEXTS[0]))
    text = embed(server, TEXTS[0], encoding_format="base64").json()["data"][0]["embedding"]
    values = struct.unpack(f"<{len(plain)}f", base64.b64decode(text))
    assert list(values) == pytest.approx(plain, abs=1e-6)


def test_more_texts_than_the_queue_holds_go_in_turn(model_folder: Path) -> None:
    limits = Limits(max_prompts=4, max_waiting_requests=4, max_inputs=50)
    with local_server(model_folder, limits=limits, engine={"max_num_seqs": 2}) as server:
        assert len(vectors(embed(server, TEXTS * 16))) == 48
        reply = embed(server, TEXTS * 17)
        assert reply.status == 400
        assert reply.json()["error"]["param"] == "input"
        server.wait_idle()


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": [320]}, "prompt"),
        ({"input": [5] * 257}, "prompt"),
        ({"input": "x", "dimensions": 8}, "dimensions"),
        ({"input": "x", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "x", "pooling": "max"}, "pooling"),
        ({}, "input"),
    ],
)
def test_what_is_refused(server: LocalServer, body: dict[str, Any], param: str) -> None:
    reply = server.post("/v1/embeddings", body)
    assert reply.status == 400
    assert reply.json()["error"]["param"] == param


def test_fields_without_effect_are_named(server: LocalServer) -> None:
    reply = embed(server, "x", user="me", dimensions=None)
    assert reply.headers["x-llmserve-ignored"] == "user"


def test_scores_are_cosines_of_the_vectors(real: LocalServer) -> None:
    found = vectors(embed(real, TEXTS))
    reply = real.post("/v1/score", {"text_1": TEXTS[0], "text_2": TEXTS})
    scores = [item["score"] for item in reply.json()["data"]]
    wanted = [sum(a * b for a, b in zip(found[0], other, strict=True)) for other in found]
    assert scores == pytest.approx(wanted, abs=TOLERANCE)
    assert scores[0] == pytest.approx(1, abs=TOLERANCE)
    pairs = real.post("/v1/score", {"text_1": TEXTS[:2], "text_2": TEXTS[1:]}).json()["data"]
    assert pairs[0]["score"] == pytest.approx(scores[1], abs=TOLERANCE)
    apart = real.post("/v1/score", {"text_1": TEXTS[:2], "text_2": TEXTS})
    assert (apart.status, apart.json()["error"]["param"]) == (400, "text_1")


def test_documents_come_best_first(real: LocalServer) -> None:
    body = {"query": TEXTS[0], "documents": TEXTS}
    results = real.post("/v1/rerank", body).json()["results"]
    assert results[0]["index"] == 0
    assert [item["document"]["text"] for item in results] == [TEXTS[r["index"]] for r in results]
    scores = [item["relevance_score"] for item in results]
    assert scores == sorted(scores, reverse=True)
    short = real.post("/v1/rerank", {**body, "top_n": 1, "return_documents": False}).json()
    assert short["results"] == [{"index": 0, "relevance_score": scores[0]}]
    bad = real.post("/v1/rerank", {**body, "top_n": 0})
    assert (bad.status, bad.json()["error"]["param"]) == (400, "top_n")


def test_a_classifier_of_one_label_reads_both_texts(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "m", head=Head(kind="sequence", labels=("fits",)))
    with local_server(folder) as server:
        pair = f"{TEXTS[0]}\n{TEXTS[1]}"
        alone = server.post("/v1/classify", {"input": pair}).json()["data"][0]["probs"][0]
        reply = server.post("/v1/score", {"text_1": TEXTS[0], "text_2": TEXTS[1]})
        assert reply.json()["data"][0]["score"] == pytest.approx(alone)


def test_arithmetic() -> None:
    assert normalized([3.0, 4.0]) == [0.6, 0.8]
    assert normalized([0.0, 0.0]) == [0.0, 0.0]
    assert cosine([1.0, 1.0], [2.0, 2.0]) == pytest.approx(1)
    assert cosine([1.0, 0.0], [0.0, 5.0]) == 0
    assert cosine([0.0], [1.0]) == 0
    assert math.isclose(cosine([1.0, 0.0], [-1.0, 0.0]), -1)
    assert base64.b64decode(as_base64([1.0, -0.5])) == struct.pack("<2f", 1.0, -0.5)
