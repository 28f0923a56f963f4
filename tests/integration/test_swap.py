"""R20: another model takes the place of the served one under load; nothing fails, nothing mixes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

from llmserve.config import Head
from support.models import TEXT, make_model_folder
from support.serving import assert_clean_end, get, in_threads, load_model, metric, post, serving

pytestmark = pytest.mark.http

SIZE = ("--max-num-batched-tokens", "64")
BODY: dict[str, object] = {"prompt": [5, 6, 7], "max_tokens": 100, "temperature": 0}
NUM_CLIENTS = 3


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, and one that is damaged."""
    root = tmp_path_factory.mktemp("models")
    make_model_folder(root / "first", seed=0)
    make_model_folder(root / "second", seed=1)
    shutil.copytree(root / "second", root / "broken")
    weights = root / "broken" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    (root / "probe.txt").write_text(TEXT)
    return root


def load(url: str, folder: str) -> tuple[int, dict[str, object]]:
    """POST /admin/models/load."""
    return load_model(url, model=folder)


def answer(url: str) -> tuple[str, str]:
    """The fingerprint of the model that answered, and its text."""
    status, data = post(url, {**BODY, "ignore_eos": True})
    assert status == 200, data
    value = json.loads(data)
    return value["system_fingerprint"], value["choices"][0]["text"]


def test_swaps_under_load_lose_and_mix_nothing(models: Path) -> None:
    with serving(models / "first", *SIZE) as server:
        url = server.wait_until_ready()
        server.engine().kill()  # it is replaced, which a swap must not make undone in the counters
        first = answer(url)
        answers: list[tuple[str, str]] = []
        is_over = threading.Event()

        def ask(_: int) -> None:
            while not is_over.is_set():
                answers.append(answer(url))

        threads = in_threads(NUM_CLIENTS, ask)
        status, report = load(url, "second")
        assert (status, report["model"]) == (200, "first"), "the name stays"
        assert report["fingerprint"] != report["previous_fingerprint"]
        status, report = load(url, "broken")
        assert status == 400
        assert "model.safetensors" in str(report["error"])
        second = answer(url)
        assert load(url, "first")[0] == 200
        assert answer(url) == first
        assert metric(url, "llmserve_engine_restarts_total") == 1
        is_over.set()
        for thread in threads:
            thread.join(20)
        assert set(answers) == {first, second}
        assert first[0] != second[0]
        assert first[1] != second[1]
        while len(server.process_tree()) > 2:  # loader and engine; those of earlier models end
            time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        assert_clean_end(server, url)


def test_what_may_not_be_loaded_is_refused_and_the_old_model_serves_on(
    models: Path, tmp_path: Path
) -> None:
    outside = make_model_folder(tmp_path / "outside")
    link = models / "link"
    link.symlink_to(outside)
    gates = ("--swap-probe", str(models / "probe.txt"), "--swap-max-kl", "1e-6")
    with serving(models / "first", *SIZE, *gates, "--swap-max-perplexity", "9") as server:
        url = server.wait_until_ready()
        before = answer(url)
        for folder, message in (
            ("../outside", "outside the one"),
            (str(outside), "outside the one"),
            ("link", "outside the one"),
            ("a\0b", "cannot be used"),
            ("none", "no such model folder"),
            ("second", "--swap-max-kl allows 1e-06"),
        ):
            status, report = load(url, folder)
            assert status == 400, folder
            assert message in str(report["error"]), folder
        assert answer(url) == before
        status, report = load(url, "first")
        assert status == 200
        verdict = report["verdict"]
        assert isinstance(verdict, dict)
        assert verdict["perplexity_ratio"] == 1.0, "a model is as good as itself"
        assert verdict["mean_kl"] == 0.0
        server.process.send_signal(signal.SIGTERM)
        assert_clean_end(server, url)


def test_a_classifier_takes_the_place_of_one_and_is_asked_for_scores(tmp_path: Path) -> None:
    for seed, name in enumerate(("first", "second")):
        make_model_folder(tmp_path / name, seed=seed, head=Head(kind="sequence", labels=("a", "b")))
    with serving(tmp_path / "first", "--runner", "fake", *SIZE) as server:
        url = server.wait_until_ready()
        assert load(url, "second")[0] == 200
        status, body = post(url, {"input": ["x"]}, route="classify")
        assert status == 200, body
        server.process.send_signal(signal.SIGTERM)
        assert_clean_end(server, url)


def test_sighup_loads_what_was_put_into_the_folder(models: Path, tmp_path: Path) -> None:
    served = tmp_path / "served"
    shutil.copytree(models / "first", served)
    with serving(served, *SIZE) as server:
        url = server.wait_until_ready()
        before = answer(url)
        old = tmp_path / "old"
        os.rename(served, old)
        shutil.copytree(models / "second", served)
        server.process.send_signal(signal.SIGHUP)
        while answer(url) == before:
            time.sleep(0.01)
        assert get(url, "/health") == 200
        server.process.send_signal(signal.SIGTERM)
        assert_clean_end(server, url)


def test_a_swap_that_drains_lets_the_old_one_end_and_takes_it_back_when_the_new_one_fails(
    models: Path,
) -> None:
    gates = ("--swap-probe", str(models / "probe.txt"), "--swap-max-kl", "1e-6")
    with serving(models / "first", *SIZE, "--swap", "drain", *gates) as server:
        url = server.wait_until_ready()
        before = answer(url)
        engine = server.engine()
        status, report = load(url, "second")
        assert status == 400
        assert "--swap-max-kl" in str(report["error"])
        assert server.engine().pid != engine.pid
        assert answer(url) == before, "the old one is back"
        assert load(url, "broken")[0] == 400
        assert load(url, "first")[0] == 200
        assert answer(url) == before
        server.process.send_signal(signal.SIGTERM)
        assert_clean_end(server, url)
