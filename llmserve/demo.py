"""The stages of `llmserve demo`, each a run of the command line as a user would type it.

What a stage made is kept, and a stage whose product is there is passed over; training resumes from
its last checkpoint.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib import import_module
from pathlib import Path
from typing import Any

from .console import console
from .errors import ConfigError, LLMServeError

__all__ = ["Demo"]

_PROMPTS = (
    "The method returns",
    "A class definition",
    "If the argument is",
    "This module provides",
    "Raises an exception",
    "The following example",
    "An iterator is",
    "When a function is called",
    "The statement",
    "Strings are",
)
_SAMPLE_TOKENS = 96
_READY_TIMEOUT_S = 60.0


class Demo:
    """One demonstration in one folder."""

    def __init__(self, *, folder: Path, scheme: str, port: int) -> None:
        """Nothing is done before `run`."""
        self.folder = folder
        self.scheme = scheme
        self.port = port or _free_port()
        self.text = folder / "manual.txt"
        self.model = folder / "train" / "model"
        self.url = f"http://127.0.0.1:{self.port}"

    def run(self, *, once: bool) -> int:
        """Do all stages; stay up afterwards unless `once`. Returns the exit code."""
        _check_port(self.port)
        self.folder.mkdir(parents=True, exist_ok=True)
        _headline(1, "a text: the interpreter's own manual and the standard library's docstrings")
        if not self.text.exists():
            _run_verb("data", "python-manual", "--out", str(self.text))
        _headline(2, "training a tokenizer and a model on it")
        training = ("--recipe", "python-manual", "--text", str(self.text))
        _run_verb("train", *training, "--out", str(self.folder / "train"))
        for scheme in ("int8", "int4"):
            _headline(3, f"quantizing to {scheme}, measured on held-out text")
            self._quantize(scheme)
        _headline(4, f"serving the {self.scheme} model")
        server = self._start_server()
        try:
            self._show_samples()
            _headline(6, "a load test")
            for concurrency in (1, 16):
                self._load_test(concurrency)
            self._say_how_to_call()
            if not once:
                server.wait()
        finally:
            _stop(server)
        return 0

    def _quantized(self, scheme: str) -> Path:
        return self.folder / f"model-{scheme}"

    def _quantize(self, scheme: str) -> None:
        target = self._quantized(scheme)
        if not target.exists():
            _run_verb("quantize", str(self.model), "--scheme", scheme, "--out", str(target))
            return
        report = json.loads((target / "quantization_report.json").read_text(encoding="utf-8"))
        print(f"kept from the last run: {target} ({report['scheme']})", flush=True)

    def _start_server(self) -> subprocess.Popen[bytes]:
        log = self.folder / "server.log"
        command = _command(
            "serve", str(self._quantized(self.scheme)), "--port", str(self.port),
            "--served-model-name", "demo",
        )  # fmt: skip
        with log.open("wb") as output:
            server = subprocess.Popen(command, stdout=output, stderr=output)  # noqa: S603
        deadline = time.monotonic() + _READY_TIMEOUT_S
        while not self._is_ready():
            if server.poll() is not None or time.monotonic() > deadline:
                _stop(server)
                tail = log.read_text(encoding="utf-8", errors="replace").strip()[-1000:]
                raise LLMServeError(f"the server did not start; {log} ends with:\n{tail}")
            time.sleep(0.05)
        print(f"{self.url} is up; its log is {log}", flush=True)
        return server

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/ready", timeout=1) as reply:  # noqa: S310
                return bool(reply.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _show_samples(self) -> None:
        _headline(5, "what it writes, and how much of that is its own")
        check = import_module("llmserve.training.sample_check")
        texts = [self._complete(prompt, seed) for seed, prompt in enumerate(_PROMPTS)]
        for prompt, text in list(zip(_PROMPTS, texts, strict=True))[:2]:
            print(f"  {prompt}{text}".replace("\n", "\n  ") + "\n")
        result = check.check_samples(texts, self.text.read_text(encoding="utf-8"))
        print(check.describe(result), flush=True)

    def _complete(self, prompt: str, seed: int) -> str:
        body = {
            "model": "demo",
            "prompt": prompt,
            "max_tokens": _SAMPLE_TOKENS,
            "temperature": 0.8,
            "top_p": 0.95,
            "seed": seed,
        }
        request = urllib.request.Request(  # noqa: S310
            f"{self.url}/v1/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as reply:  # noqa: S310
            answer: dict[str, Any] = json.load(reply)
        return str(answer["choices"][0]["text"])

    def _load_test(self, concurrency: int) -> None:
        output = _run_verb(
            "bench", "serve", "--base-url", self.url, "--max-concurrency", str(concurrency),
            "--num-prompts", str(max(4, 2 * concurrency)), "--random-input-len", "32",
            "--random-output-len", "64", "--ignore-eos", "--num-warmups", "1",
            capture=True,
        )  # fmt: skip
        table = output.rstrip().rsplit("\n", 1)[0]  # the last line is for programs
        print(table, flush=True)

    def _say_how_to_call(self) -> None:
        console().print(
            f"""
[bold]the page[/]     {self.url}/
[bold]curl[/]         curl {self.url}/v1/completions -H 'Content-Type: application/json' \\
                -d '{{"model": "demo", "prompt": "A list is", "max_tokens": 40}}'
[bold]python[/]       from openai import OpenAI
             client = OpenAI(base_url="{self.url}/v1", api_key="none")
             print(client.completions.create(model="demo", prompt="A list is").choices[0].text)
[bold]again[/]        llmserve serve {self._quantized(self.scheme)}

Ctrl-C stops the server.""",
            highlight=False,
            soft_wrap=True,
        )


def _headline(number: int, title: str) -> None:
    console().print(f"\n[bold cyan]{number}  {title}[/]")


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "llmserve", *arguments]


def _run_verb(*arguments: str, capture: bool = False) -> str:
    """Run one verb to its end; an interrupt is the verb's to handle, then ours."""
    with subprocess.Popen(  # noqa: S603
        _command(*arguments), stdout=subprocess.PIPE if capture else None, text=True
    ) as process:
        try:
            output, _ = process.communicate()
        except KeyboardInterrupt:
            # The terminal interrupted the verb too: let it save what it has.
            process.wait()
            raise
    if process.returncode in (130, -signal.SIGINT):
        raise KeyboardInterrupt
    if process.returncode:
        verb = " ".join(arguments[:2])
        raise LLMServeError(f"`llmserve {verb}` ended with exit code {process.returncode}")
    return output or ""


def _stop(server: subprocess.Popen[bytes]) -> None:
    if server.poll() is None:
        server.terminate()
    try:
        server.wait(timeout=40)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _check_port(port: int) -> None:
    """Say now, not after minutes of training, that the port cannot be had."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ConfigError(
                f"port {port} cannot be used ({error.strerror}): choose another with --port"
            ) from error
