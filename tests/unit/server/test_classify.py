"""Classes and answers over HTTP: the scores of the offline model, and the best span of all."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from llmserve.checkpoint import Checkpoint
from llmserve.config import Head
from llmserve.model.attention import CausalAttention
from llmserve.model.weights import load_model
from llmserve.server.answers import best_spans, spelled
from llmserve.text.tokenizer import Tokenizer
from support.models import make_model_folder
from support.servers import LocalServer, local_server

CLASSIFIER = Head(kind="sequence", labels=("no", "yes", "maybe"))
TAGGER = Head(kind="token", labels=("other", "name"))
SPAN = Head(kind="span", labels=("start", "end"))
TEXT = "Once upon a time there was a girl"
CONTEXT = "One day Lily saw a big dog 🙂 in the park."


def offline_scores(folder: Path, ids: list[int]) -> torch.Tensor:
    model = load_model(Checkpoint.open(folder), dtype=torch.float32, device="cpu")
    with torch.inference_mode():
        attend = CausalAttention(model.config)
        return model.scores(model.hidden(torch.tensor([ids]), torch.arange(len(ids)), attend))[0]


def torch_server(folder: Path) -> Any:
    return local_server(folder, engine={"runner": "torch", "max_batched_tokens": 16})


def test_classes_of_texts(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "m", head=CLASSIFIER)
    ids = Tokenizer.load(folder).encode(TEXT)
    wanted = offline_scores(folder, ids)[-1].softmax(-1)
    with torch_server(folder) as server:
        reply = server.post("/v1/classify", {"input": [TEXT, TEXT]}).json()
        server.wait_idle()
    first = reply["data"][0]
    assert first["probs"] == pytest.approx(wanted.tolist(), abs=1e-5)
    assert first["label"] == CLASSIFIER.labels[int(wanted.argmax())]
    assert first["num_classes"] == 3
    assert len(reply["data"]) == 2
    assert reply["usage"]["prompt_tokens"] == 2 * len(ids)


def test_classes_of_tokens(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "m", head=TAGGER)
    tokenizer = Tokenizer.load(folder)
    ids = tokenizer.encode(TEXT)
    wanted = offline_scores(folder, ids).softmax(-1)
    with torch_server(folder) as server:
        (found,) = server.post("/v1/classify", {"input": TEXT}).json()["data"]
    assert [token["token"] for token in found["tokens"]] == [tokenizer.token_text(i) for i in ids]
    for token, probabilities in zip(found["tokens"], wanted.tolist(), strict=True):
        assert token["probs"] == pytest.approx(probabilities, abs=1e-5)


def test_answers(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "m", head=SPAN)
    tokenizer = Tokenizer.load(folder)
    question = tokenizer.encode("Who saw a dog?\n")
    context = tokenizer.encode(CONTEXT, add_special_tokens=False)
    scores = offline_scores(folder, question + context)[len(question) :]
    starts, ends = scores.softmax(0).unbind(-1)
    spans = {
        (first, last): float(starts[first] * ends[last])
        for first in range(len(context))
        for last in range(first, min(first + 30, len(context)))
    }
    best = sorted(spans.values(), reverse=True)[:3]
    with torch_server(folder) as server:
        body = {"question": "Who saw a dog?", "context": CONTEXT, "top_n": 3}
        found = server.post("/v1/answers", body).json()["answers"]
    assert [answer["score"] for answer in found] == pytest.approx(best, rel=1e-3)
    for answer in found:
        assert answer["text"] == CONTEXT[answer["start"] : answer["end"]]


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        ("classify", {"input": "x"}, "model"),
        ("answers", {"question": "x", "context": "y"}, "model"),
        ("answers", {"question": "", "context": "y"}, "question"),
        ("answers", {"question": "x", "context": "y", "top_n": 21}, "top_n"),
        ("classify", {"input": ""}, "model"),
    ],
)
def test_what_is_refused(server: LocalServer, route: str, body: dict[str, Any], param: str) -> None:
    reply = server.post(f"/v1/{route}", body)
    assert reply.status == 400
    assert reply.json()["error"]["param"] == param


def test_a_model_with_a_head_writes_nothing(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "m", head=CLASSIFIER)
    with local_server(folder) as server:
        reply = server.post("/v1/completions", {"prompt": "x"})
    assert reply.status == 400
    assert "scores, not text" in reply.json()["error"]["message"]


@pytest.mark.parametrize("seed", range(5))
def test_best_spans_are_the_best_of_all(seed: int) -> None:
    generator = random.Random(seed)
    scores = [[generator.gauss(0, 2), generator.gauss(0, 2)] for _ in range(12)]
    found = best_spans(scores, count=4, max_tokens=5)
    totals = [math.fsum(math.exp(row[place]) for row in scores) for place in range(2)]
    wanted = sorted(
        (
            (math.exp(scores[first][0]) / totals[0] * math.exp(scores[last][1]) / totals[1])
            for first, last in itertools.combinations_with_replacement(range(12), 2)
            if last - first < 5
        ),
        reverse=True,
    )
    assert [span.probability for span in found] == pytest.approx(wanted[:4])


def test_places_in_a_text_of_many_bytes(model_folder: Path) -> None:
    tokenizer = Tokenizer.load(model_folder)
    ids = tokenizer.encode("ü 🙂 日本", add_special_tokens=False)
    text, ends = spelled(tokenizer, ids)
    assert text == "ü 🙂 日本"
    assert ends[0] == 0
    assert ends[-1] == len(text)
    assert ends == sorted(ends)
