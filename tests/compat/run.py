"""Other people's clients against a server of ours, each in a virtual environment of its own.

`make compat` runs all of them, `make compat ARGS=openai` one. A client is a package to install and
either a script beside this file or a command; both find the server in `LLMSERVE_URL`.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ENVIRONMENTS = ROOT / ".compat"
START_TIMEOUT_S = 60.0
MODEL = "compat"


@dataclass(frozen=True)
class Client:
    """Someone else's program."""

    packages: tuple[str, ...]
    command: tuple[str, ...]
    """After the interpreter of its environment; `{url}` is the server's."""


CLIENTS = {
    "openai": Client(("openai>=1.60",), (str(HERE / "openai_client.py"),)),
    "langchain": Client(("langchain-openai>=0.3",), (str(HERE / "langchain_client.py"),)),
    "schemathesis": Client(
        ("schemathesis>=4",),
        (
            "-m", "schemathesis.cli", "run", "{url}/openapi.json", "--checks",
            "not_a_server_error", "--max-examples", "40", "--seed", "1", "--no-color",
        ),
    ),
}  # fmt: skip


def environment_of(name: str, client: Client) -> Path:
    """The interpreter of the client's environment, which is made where it is missing."""
    folder = ENVIRONMENTS / name
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    command = [python, "-m", "pip", "install", "--quiet", *client.packages]
    subprocess.run(command, check=True)
    return python


@contextmanager
def server() -> Iterator[str]:
    """A server of a small model with random weights; gives its URL."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from support.models import make_model_folder

    with tempfile.TemporaryDirectory() as temporary:
        folder = make_model_folder(Path(temporary) / MODEL, max_seq_len=2048)
        command = [sys.executable, "-m", "llmserve", "serve", str(folder), "--port", "0"]
        log = Path(temporary) / "log"
        with log.open("w") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=_environment()
            )
        try:
            yield _url_of(process, log)
        finally:
            process.terminate()
            process.wait(30)


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


def _url_of(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        found = re.search(r"^API +(http\S+)/v1$", log.read_text(), re.MULTILINE)
        if found:
            return found[1]
        time.sleep(0.1)
    raise SystemExit(f"the server did not start:\n{log.read_text()}")


def run_client(name: str, url: str) -> bool:
    """Whether the client was content."""
    client = CLIENTS[name]
    python = environment_of(name, client)
    command = [str(python), *(word.replace("{url}", url) for word in client.command)]
    given = {**os.environ, "LLMSERVE_URL": url, "LLMSERVE_MODEL": MODEL, "OPENAI_API_KEY": "none"}
    given.pop("PYTHONPATH", None)
    return subprocess.run(command, env=given, cwd=ENVIRONMENTS, check=False).returncode == 0


def main() -> int:
    """Run the clients that were named, or all."""
    parser = argparse.ArgumentParser(description="Run other people's clients against a server.")
    parser.add_argument("clients", nargs="*", metavar="CLIENT", help=f"of {', '.join(CLIENTS)}")
    names = parser.parse_args().clients or list(CLIENTS)
    if unknown := set(names) - CLIENTS.keys():
        parser.error(f"no client {min(unknown)!r}; known: {', '.join(CLIENTS)}")
    ENVIRONMENTS.mkdir(exist_ok=True)
    with server() as url:
        outcomes = {name: run_client(name, url) for name in names}
    for name, is_content in outcomes.items():
        print(f"{name:<14}{'ok' if is_content else 'FAILED'}")
    return 0 if all(outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
