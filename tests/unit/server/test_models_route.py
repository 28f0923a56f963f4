"""`/v1/models`, and the model that a request names."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from support.models import MAX_SEQ_LEN, make_model_folder
from support.servers import LocalServer, local_server
from support.spelling import chat_of


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
        assert {**listed[1], "lineage": None, "training": None, "certificate": None} == one
        assert one["root"] == str(model_folder)
        assert one["max_model_len"] == MAX_SEQ_LEN
        assert {"executed_form", "cache_dtype", "quantization", "runner"} <= one.keys()
        assert server.complete(prompt="x", model="org/b", max_tokens=1).json()["model"] == "a"


def test_a_model_tells_of_its_lineage_training_and_certificate(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "m")
    (folder / "lineage.json").write_text('{"run": {"sha256": "abc"}}')
    (folder / "training_log.jsonl").write_text('{"step": 10, "loss": 4.5}\n')
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
    assert card["training"] == {"loss": [[10, 4.5]]}
    records = ("lineage", "training", "certificate")
    assert {**listed, **{name: card[name] for name in records}} == card


def test_a_model_without_records_says_so(server: LocalServer) -> None:
    card = server.get("/v1/models/tiny").json()
    assert [card[name] for name in ("lineage", "training", "certificate")] == [None] * 3
