"""`guidellm`: a short load of random prompts, and the same figures as our own load generator's.

The figures are compared on a server that streams at a known pace, so that little but the two
clients is in them, by `llmserve bench compare` over interleaved rounds. guidellm calls the mean
time between a request's tokens ITL; by our names, which are vLLM's, that is TPOT.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

URL = os.environ["LLMSERVE_URL"]
FOLDER = os.environ["LLMSERVE_MODEL_FOLDER"]
MODEL = os.environ["LLMSERVE_MODEL"]
OURS = (os.environ["LLMSERVE_PYTHON"], "-m", "llmserve")
OUR_ENVIRONMENT = {**os.environ, "PYTHONPATH": os.environ["LLMSERVE_ROOT"]}
NUM_REQUESTS, NUM_TOKENS, NUM_STREAMS = 40, 24, 4
STEP_S = 0.02
"""From a request to its first token on the paced server, and from each token to the next."""
ROUNDS = 3
MOST_APART = 0.05
"""Figures whose difference is shown may still differ so much: what a client's own work takes."""
FIGURES = ("output_throughput", "mean_ttft_ms", "mean_tpot_ms")


def run(url: str, report: Path, *, check: str = "true") -> dict[str, Any]:
    """One load; what guidellm says of it."""
    backend = f"kind=openai_http,target={url},model={MODEL},request_format=/v1/completions"
    command = [
        str(Path(sys.executable).parent / "guidellm"), "run", "--disable-console",
        "--backend", f"{backend},validate_backend={check}",
        "--profile", f"kind=concurrent,streams={NUM_STREAMS}",
        "--constraint", f"kind=max_requests,count={NUM_REQUESTS}",
        "--tokenizer", f"kind=huggingface_auto,model={FOLDER}",
        "--data", f"kind=synthetic_text,prompt_tokens=32,output_tokens={NUM_TOKENS}",
        "--output", f"kind=json,path={report}",
    ]  # fmt: skip
    subprocess.run(command, check=True)
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    requests: dict[str, Any] = benchmark["requests"]
    assert not requests["errored"], requests["errored"][0]
    lengths = [request["output_metrics"]["text_tokens"] for request in requests["successful"]]
    assert lengths == [NUM_TOKENS] * NUM_REQUESTS, lengths
    return requests


def result_of(requests: dict[str, Any]) -> dict[str, float]:
    """guidellm's figures by the names that `bench compare` reads."""
    good = requests["successful"]
    start_s = min(request["request_start_time"] for request in good)
    duration_s = max(request["request_end_time"] for request in good) - start_s
    return {
        "request_throughput": len(good) / duration_s,
        "output_throughput": len(good) * NUM_TOKENS / duration_s,
        "mean_ttft_ms": fmean(request["time_to_first_token_ms"] for request in good),
        "mean_tpot_ms": fmean(request["inter_token_latency_ms"] for request in good),
    }


def run_ours(url: str, folder: Path, name: str) -> None:
    """The same load from our client."""
    command = [
        *OURS, "bench", "serve", "--base-url", url, "--model", MODEL, "--vocab-size", "300",
        "--num-prompts", str(NUM_REQUESTS), "--max-concurrency", str(NUM_STREAMS),
        "--random-input-len", "32", "--random-output-len", str(NUM_TOKENS),
        "--save-result", "--result-dir", str(folder), "--result-filename", name,
    ]  # fmt: skip
    subprocess.run(command, check=True, env=OUR_ENVIRONMENT, stdout=subprocess.DEVNULL)


class Paced(BaseHTTPRequestHandler):
    """Answers with tokens `STEP_S` apart, the first as long after the request: whenever a client
    asks, it waits equally long, so that how soon it asks again is not in its figures."""

    protocol_version = "HTTP/1.1"
    # Else a token waits until the client's system has acknowledged what came before, which it puts
    # off on connections that are used again.
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        """Stream one completion."""
        began_s = time.monotonic()
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-type", "text/event-stream; charset=utf-8")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for number in range(1, NUM_TOKENS + 1):
            time.sleep(max(0.0, began_s + number * STEP_S - time.monotonic()))
            reason = "length" if number == NUM_TOKENS else None
            self._send({"choices": [{"index": 0, "text": " a", "finish_reason": reason}]})
        usage = {"prompt_tokens": 32, "completion_tokens": NUM_TOKENS}
        self._send({"choices": [], "usage": {**usage, "total_tokens": 32 + NUM_TOKENS}})
        self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def do_GET(self) -> None:
        """There are no other pages."""
        self.send_response(404)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: stdout is the report's."""

    def _send(self, event: dict[str, Any]) -> None:
        whole = {"id": "cmpl-1", "object": "text_completion", "model": MODEL, **event}
        self._chunk(b"data: " + json.dumps(whole).encode() + b"\n\n")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n" % len(data) + data + b"\r\n")
        self.wfile.flush()


@contextmanager
def paced_server() -> Iterator[str]:
    """A server that answers as `Paced` does; gives its URL."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Paced) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()


def compare(folder: Path) -> None:
    """Both clients in turn on the paced server; their figures have to agree."""
    theirs, ours = folder / "guidellm", folder / "llmserve"
    theirs.mkdir()
    with paced_server() as url:
        for number in range(ROUNDS):
            found = result_of(run(url, folder / "report.json", check="false"))
            (theirs / f"{number}.json").write_text(json.dumps(found))
            run_ours(url, ours, f"{number}.json")
    command = [*OURS, "bench", "compare", str(theirs), str(ours)]
    done = subprocess.run(command, check=True, env=OUR_ENVIRONMENT, stdout=subprocess.PIPE)
    *table, document = done.stdout.decode().splitlines()
    print("\n".join(table))
    for name in FIGURES:
        figure = json.loads(document)["metrics"][name]
        is_near = abs(figure["speedup"] - 1) <= MOST_APART
        assert is_near or figure["verdict"] == "no difference shown", f"{name}: {figure}"


def main() -> None:
    """Load our server, then compare with our client."""
    with tempfile.TemporaryDirectory() as temporary:
        run(URL, Path(temporary) / "report.json")
        print(f"guidellm {version('guidellm')}: {NUM_REQUESTS} requests of {NUM_TOKENS} tokens ok")
        compare(Path(temporary))


main()
