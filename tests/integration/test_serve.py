"""`llmserve serve` as a process: its start, its refusals and its end (R16); `test_restarts.py` has
what happens when engines die."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import time
from itertools import product
from pathlib import Path
from urllib.parse import urlsplit

import openai
import psutil
import pytest

from llmserve.checkpoint import Checkpoint
from llmserve.cli import main
from llmserve.server import lifecycle
from support.adapter_folders import make_adapter_folder
from support.models import make_model_folder
from support.serving import assert_clean_end, get, in_threads, metric, post, serving

pytestmark = pytest.mark.http


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("model") / "tiny")


STREAM = {"prompt": "x", "stream": True, "ignore_eos": True, "max_tokens": 120}


def test_the_official_client_works_and_ctrl_c_ends_it_cleanly(folder: Path) -> None:
    secret = "a-long-enough-secret"
    environment = {"LLMSERVE_API_KEY": secret}
    with serving(folder, "--runner", "fake", environment=environment) as server:
        url = server.wait_until_ready()
        with openai.OpenAI(base_url=url + "/v1", api_key=secret, max_retries=0) as client:
            assert [model.id for model in client.models.list()] == ["tiny"]
            assert client.models.retrieve("tiny").id == "tiny"
            options = {"model": "tiny", "temperature": 0, "max_tokens": 20}
            whole = client.completions.create(prompt="Once", **options)
            stream = client.completions.create(prompt="Once", stream=True, **options)
            assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text
            messages = [{"role": "user", "content": "hello"}]
            chat = client.chat.completions.create(
                messages=messages, logprobs=True, top_logprobs=2, **options
            )
            chunks = list(
                client.chat.completions.create(
                    messages=messages,
                    stream=True,
                    stream_options={"include_usage": True},
                    **options,
                )
            )
            text = "".join(chunk.choices[0].delta.content for chunk in chunks[:-1])
            assert text == chat.choices[0].message.content
            usage = chunks[-1].usage
            assert usage.completion_tokens == chat.usage.completion_tokens
            assert chat.usage.prompt_tokens_details.cached_tokens == 0
            assert usage.prompt_tokens_details.cached_tokens > 0, "asked for the second time"
            with pytest.raises(openai.BadRequestError, match="temperature"):
                client.completions.create(prompt="x", model="tiny", temperature=-1)
            with pytest.raises(openai.NotFoundError):
                client.completions.create(prompt="x", model="none")
        with (
            openai.OpenAI(base_url=url + "/v1", api_key="wrong-secret", max_retries=0) as stranger,
            pytest.raises(openai.AuthenticationError),
        ):
            stranger.models.list()
        for process in (psutil.Process(server.process.pid), server.engine()):
            assert secret not in " ".join(process.cmdline())
        assert secret not in str(server.engine().environ())
        assert secret not in server.output
        server.process.send_signal(signal.SIGINT)
        assert_clean_end(server, url)


def test_every_option_of_the_engine_is_honoured_and_the_run_plays_again(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys, log = tmp_path / "keys", tmp_path / "steps.log"
    keys.write_text("a-key-of-ann name=ann\na-key-of-bob\n")
    adapter = make_adapter_folder(tmp_path / "tuned", Checkpoint.open(folder).config)
    with serving(
        folder, "--runner", "fake", "--api-key-file", str(keys), "--lora-modules",
        f"tuned={adapter}", "--scheduling-policy", "fair", "--tenant-weight", "ann=3",
        "--block-size", "8", "--max-step-ms", "40", "--max-num-seqs", "4", "--record", str(log),
        "--speculative-config", '{"method": "ngram", "num_speculative_tokens": 3, "always": true}',
    ) as server:  # fmt: skip
        url = server.wait_until_ready()
        for line in (
            "adapter    tuned, from ",
            "blocks of 8 tokens",
            "prefixes   computed once, each API key's apart",
            "ms measured, 40 ms asked",
            "policy     fair among API keys, weights 3, others 1",
            "guesses    up to 3 tokens ahead always",
            "recording  to ",
        ):
            assert line in server.output
        texts = set()
        for key, model in product(("a-key-of-ann", "a-key-of-bob"), ("tiny", "tuned")):
            with openai.OpenAI(base_url=url + "/v1", api_key=key, max_retries=0) as client:
                reply = client.completions.create(
                    model=model, prompt=[5, 5] * 20, max_tokens=30, temperature=0
                )
                assert reply.model == model
                assert reply.usage.prompt_tokens_details.cached_tokens == 0
                texts.add(reply.choices[0].text)
        assert len(texts) == 2, "the adapter changes the text, the key does not"
        server.process.send_signal(signal.SIGTERM)
        assert_clean_end(server, url)
    assert "a-key-of" not in log.read_text()
    assert main(["replay", str(log)]) == 0
    assert capsys.readouterr().out.startswith("4 requests, ")


def test_drain_lets_streams_end_and_waits_for_nobody_else(folder: Path) -> None:
    """R16."""
    with serving(folder, "--runner", "fake:0.01", "--limit", "drain_s=15") as server:
        url = server.wait_until_ready()
        replies: dict[int, tuple[int, bytes]] = {}
        threads = in_threads(32, lambda index: replies.__setitem__(index, post(url, STREAM)))
        host, port = urlsplit(url).hostname, urlsplit(url).port
        held = [socket.create_connection((host, port), 5) for _ in range(50)]
        for index, connection in enumerate(held):
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\n")
            if index % 2:
                connection.sendall(b"content-type: application/json\r\ncontent-length: 9\r\n\r\n{")
        while get_running(url) < 32:
            time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        while get(url, "/ready") != 503:
            time.sleep(0.01)
        assert time.monotonic() - started < 1
        assert get(url, "/health") == 200
        assert post(url, {"prompt": "x"})[0] == 503
        for thread in threads:
            thread.join(20)
        assert [status for status, _ in replies.values()] == [200] * 32
        for _, body in replies.values():
            assert body.endswith(b"data: [DONE]\n\n")
            assert b'"finish_reason":"length"' in body
        ended = time.monotonic()
        assert_clean_end(server, url)
        assert time.monotonic() - ended < 2
        for connection in held:
            connection.close()


def get_running(url: str) -> int:
    return int(metric(url, "llmserve_num_requests_running"))


def test_engines_write_their_log_in_the_form_that_was_asked_for(folder: Path) -> None:
    options = ("--runner", "fake:0.01", "--max-step-ms", "1", "--log-format", "json")
    with serving(folder, *options) as server:
        server.wait_until_ready()
        (line,) = [line for line in server.lines if "the least there is" in line]
        assert json.loads(line)["logger"] == "llmserve.engine"


def test_what_is_not_done_by_the_drain_budget_is_told_so(folder: Path) -> None:
    with serving(folder, "--runner", "fake:0.05", "--limit", "drain_s=0.4") as server:
        url = server.wait_until_ready()
        replies: dict[int, tuple[int, bytes]] = {}
        (thread,) = in_threads(1, lambda index: replies.__setitem__(index, post(url, STREAM)))
        while get_running(url) < 1:
            time.sleep(0.01)
        started = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        thread.join(10)
        assert b"shutting down" in replies[0][1]
        assert replies[0][1].endswith(b"data: [DONE]\n\n")
        assert_clean_end(server, url)
        assert time.monotonic() - started < 0.4 + 1 + 1


def test_a_second_signal_ends_it_at_once(folder: Path) -> None:
    with serving(folder, "--runner", "fake:0.05") as server:
        url = server.wait_until_ready()
        replies: dict[int, tuple[int, bytes]] = {}
        (thread,) = in_threads(1, lambda index: replies.__setitem__(index, post(url, STREAM)))
        while get_running(url) < 1:
            time.sleep(0.01)
        started = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        while get(url, "/ready") != 503:
            time.sleep(0.01)
        server.process.send_signal(signal.SIGINT)
        assert_clean_end(server, url)
        assert time.monotonic() - started < 3
        thread.join(10)


def test_the_engine_ends_when_the_server_is_killed(folder: Path) -> None:
    with serving(folder, "--runner", "fake") as server:
        server.wait_until_ready()
        processes = [server.loader(), server.engine()]
        server.process.kill()
        assert not psutil.wait_procs(processes, timeout=10)[1]


@pytest.mark.parametrize("delay_s", [0.4, 0.9, 1.4])
def test_a_signal_during_the_start_ends_it_cleanly(folder: Path, delay_s: float) -> None:
    with serving(folder, "--runner", "fake") as server:
        time.sleep(delay_s)
        children = psutil.Process(server.process.pid).children()
        server.process.send_signal(signal.SIGINT)
        assert server.wait() in (0, 130, -signal.SIGINT)
        if children:  # the interpreter had begun to run our code
            assert "Traceback" not in server.output
            psutil.wait_procs(children, timeout=5)
            assert not any(child.is_running() for child in children)


def refuse_to_bind(*_: object) -> None:
    raise AssertionError("something was bound")


def damage(folder: Path, target: Path, how: str) -> str:
    """A damaged copy of a model folder; the file at fault."""
    shutil.copytree(folder, target)
    weights = target / "model.safetensors"
    if how == "missing":
        shutil.rmtree(target)
        return target.name
    if how == "truncated":
        os.truncate(weights, weights.stat().st_size // 2)
    elif how == "flipped":
        data = bytearray(weights.read_bytes())
        data[-5] ^= 1
        weights.write_bytes(data)
    elif how == "shape":
        (target / "manifest.json").unlink()
        config = json.loads((target / "config.json").read_text())
        config["num_hidden_layers"] = 3
        (target / "config.json").write_text(json.dumps(config))
    elif how == "tokenizer":
        (target / "manifest.json").unlink()
        (target / "tokenizer.json").write_text("{}")
        return "tokenizer.json"
    return "model.safetensors"


@pytest.mark.parametrize("how", ["missing", "truncated", "flipped", "shape", "tokenizer"])
def test_a_damaged_model_is_one_line_naming_the_file(
    folder: Path,
    tmp_path: Path,
    how: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(lifecycle, "bound_socket", refuse_to_bind)
    file = damage(folder, tmp_path / "model", how)
    started = time.process_time()
    assert main(["serve", str(tmp_path / "model"), "--runner", "fake"]) == 1
    assert time.process_time() - started < 2
    message = capsys.readouterr().err
    (line,) = [line for line in message.splitlines() if line.startswith("llmserve: error:")]
    assert file in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "--allow-unauthenticated"),  # noqa: S104
        (["--limit", "nothing=1"], "unknown limit"),
        (["--api-key-file", "/no/such/file"], "cannot be read"),
        (["--chat-template", "/no/such/file"], "cannot be read"),
        (["--port", "70000"], "port"),
        (["--replicas", "0"], "--replicas must be from 1"),
        (["--max-step-ms", "9", "--max-num-batched-tokens", "9"], "leave one out"),
        (["--speculative-config", '{"method": "ngram", "n": 3}'], "no key 'n'; known: method"),
        (["--tenant-weight", "ann=1"], "no effect under the scheduling policy fcfs"),
        (["--share-prefix-cache", "--no-enable-prefix-caching"], "needs the prefix cache"),
    ],
)
def test_settings_that_cannot_be_used_exit_with_2(
    folder: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(folder), *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--lora-modules", "tuned={none}", "adapter_config.json"),
        ("--speculative-config", '{{"method": "draft", "model": "{none}"}}', "none"),
    ],
)
def test_folders_beside_the_model_are_checked_before_anything_is_bound(
    folder: Path,
    tmp_path: Path,
    option: str,
    value: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(lifecycle, "bound_socket", refuse_to_bind)
    value = value.format(none=tmp_path / "none")
    assert main(["serve", str(folder), "--runner", "fake", option, value]) == 1
    assert message in capsys.readouterr().err


def test_a_taken_port_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(folder), "--port", str(port), "--runner", "fake"]) == 2
    assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err


def test_what_only_the_engine_can_refuse_is_relayed(folder: Path) -> None:
    with serving(folder, "--runner", "fake", "--kv-cache-memory", "10") as server:
        assert server.wait() == 1
        assert "does not hold one block" in server.lines[-1]
        assert "Traceback" not in server.output


def test_limits_are_shown_without_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--show-limits", "--limit", "max_choices=3"]) == 0
    shown = dict(line.split("=") for line in capsys.readouterr().out.split())
    assert shown["max_choices"] == "3"
    assert main(["serve"]) == 2
