"""`guidellm`: a short load of random prompts; all must succeed and be as long as asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

URL = os.environ["LLMSERVE_URL"]
FOLDER = os.environ["LLMSERVE_MODEL_FOLDER"]
MODEL = os.environ["LLMSERVE_MODEL"]
NUM_REQUESTS, NUM_TOKENS = 40, 24


def run(report: Path) -> None:
    """One load of four streams."""
    command = [
        str(Path(sys.executable).parent / "guidellm"), "run", "--disable-console",
        "--backend", f"kind=openai_http,target={URL},model={MODEL},request_format=/v1/completions",
        "--profile", "kind=concurrent,streams=4",
        "--constraint", f"kind=max_requests,count={NUM_REQUESTS}",
        "--tokenizer", f"kind=huggingface_auto,model={FOLDER}",
        "--data", f"kind=synthetic_text,prompt_tokens=32,output_tokens={NUM_TOKENS}",
        "--output", f"kind=json,path={report}",
    ]  # fmt: skip
    subprocess.run(command, check=True)


def main() -> None:
    """Load, and read what it found."""
    with tempfile.TemporaryDirectory() as temporary:
        report = Path(temporary) / "report.json"
        run(report)
        (benchmark,) = json.loads(report.read_text())["benchmarks"]
    requests = benchmark["requests"]
    assert not requests["errored"], requests["errored"][0]
    lengths = [request["output_metrics"]["text_tokens"] for request in requests["successful"]]
    assert lengths == [NUM_TOKENS] * NUM_REQUESTS, lengths
    print(f"guidellm {version('guidellm')}: {NUM_REQUESTS} requests of {NUM_TOKENS} tokens ok")


main()
