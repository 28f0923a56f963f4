"""Several models in one server: each with engines of its own, none of which another one's end
touches."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import psutil
import pytest

from llmserve.cli import main
from support.models import make_model_folder
from support.serving import (
    ServeProcess,
    assert_clean_end,
    get,
    in_threads,
    load_model,
    metrics,
    post,
    serving,
)

pytestmark = pytest.mark.http

SIZE = ("--max-num-batched-tokens", "64")
NAMES = ("one", "two")
NUM_CLIENTS = 4


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("first", "second", "third")):
        make_model_folder(root / name, seed=seed)
    return root


def answer(url: str, name: str) -> tuple[str, str]:
    """The fingerprint of the model that answered, and its text."""
    body: dict[str, object] = {"prompt": [5, 6], "max_tokens": 100, "temperature": 0}
    status, data = post(url, {"model": name, "ignore_eos": True, **body})
    assert status == 200, data
    value = json.loads(data)
    return value["system_fingerprint"], value["choices"][0]["text"]


def restarts(url: str) -> list[float]:
    """Engines that were replaced, by model."""
    counted = metrics(url)
    return [counted[f'llmserve_engine_restarts_total{{model_name="{name}"}}'] for name in NAMES]


def engines(server: ServeProcess) -> list[psutil.Process]:
    """One engine of each model, in the models' order."""
    loaders = psutil.Process(server.process.pid).children()
    return [child for loader in loaders for child in loader.children()]


def test_one_model_s_engine_is_killed_and_another_model_swapped_and_no_other_notices(
    models: Path,
) -> None:
    options = (f"{NAMES[1]}={models / 'second'}", *SIZE)
    with serving(f"{NAMES[0]}={models / 'first'}", *options) as server:
        url = server.wait_until_ready()
        wanted = {name: answer(url, name) for name in NAMES}
        assert len(set(wanted.values())) == len(NAMES)
        before = engines(server)
        answers: dict[str, set[tuple[str, str]]] = {name: set() for name in NAMES}

        def ask(index: int) -> None:
            name = NAMES[index % len(NAMES)]
            for _ in range(5):
                answers[name].add(answer(url, name))

        threads = in_threads(NUM_CLIENTS, ask)
        before[0].kill()
        for thread in threads:
            thread.join(30)
        assert answers == {name: {text} for name, text in wanted.items()}
        assert restarts(url) == [1, 0]
        assert engines(server)[1].pid == before[1].pid

        status, report = load_model(url, model="third")
        assert status == 400, "in whose place?"
        assert "one, two" in str(report["error"])
        assert load_model(url, model="third", name="two")[0] == 200
        assert answer(url, "two") not in wanted.values()
        assert answer(url, "one") == wanted["one"]
        server.process.send_signal(signal.SIGTERM)
        assert_clean_end(server, url)


def test_a_request_that_crashes_one_model_s_engines_leaves_both_models_serving(
    models: Path,
) -> None:
    environment = {"LLMSERVE_FAILPOINTS": "engine.poison=abort"}
    with serving(models / "first", str(models / "second"), "--runner", "fake", *SIZE,
                 environment=environment) as server:  # fmt: skip
        url = server.wait_until_ready()
        status, _ = post(url, {"model": "first", "prompt": [7, 8], "max_tokens": 2})
        assert status == 500
        for name in ("first", "second"):
            assert answer(url, name)
        assert get(url, "/health") == 200


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{first}", "{first}"], "two models go by the name 'first'"),
        (["{first}", "{second}", "--kv-cache-memory", "9999G"], "second about"),
        (["{first}", "--kv-cache-memory", "99999G"], "MiB are available"),
        (["{first}", "{second}", "--served-model-name", "x"], "NAME=FOLDER"),
        (["a={first}", "--served-model-name", "x"], "leave out --served-model-name"),
        (["={first}"], "neither a folder nor NAME=FOLDER"),
        (["{first}", "{second}", "--lora-modules", "a=b"], "--lora-modules is about one model"),
    ],
)
def test_what_does_not_go_together_is_refused(
    models: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [text.format(first=models / "first", second=models / "second") for text in arguments]
    assert main(["serve", *given, "--port", "0"]) != 0
    assert message in " ".join(capsys.readouterr().err.split())
