"""Other people's clients against a server of ours, each in an environment of its own.

`make compat` runs all of them, `make compat ARGS=openai` one. A client is a package to install and
either a script beside this file or a command; both find the server in `LLMSERVE_URL`, and the
folder of its model in `LLMSERVE_MODEL_FOLDER`. What a client needs of the system, Node or
Prometheus, is not installed here: where it is missing the client fails, and says so.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
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
TORCH = "torch==2.13.0"


@dataclass(frozen=True)
class Client:
    """Someone else's program."""

    command: tuple[str, ...]
    """`{url}` is the server's, `{model}` the folder of its model, `{bin}` where the packages'
    programs are."""
    python: tuple[str, ...] = ()
    """Packages for a virtual environment."""
    node: tuple[str, ...] = ()
    """Packages for a folder of Node's."""
    system: tuple[str, ...] = ()
    """Programs that must be there."""


CLIENTS = {
    "openai": Client(
        ("{bin}/python", str(HERE / "openai_client.py")), python=("openai>=1.60",)
    ),
    "openai-node": Client(
        ("node", "{bin}/openai_client.mjs"), node=("openai@6",), system=("node", "npm")
    ),
    "langchain": Client(
        ("{bin}/python", str(HERE / "langchain_client.py")), python=("langchain-openai>=0.3",)
    ),
    "lm-eval": Client(
        ("{bin}/python", str(HERE / "lm_eval_client.py")),
        python=("lm_eval[api]>=0.4.9", "transformers", "accelerate", TORCH),
    ),
    "guidellm": Client(
        ("{bin}/python", str(HERE / "guidellm_client.py")),
        python=("guidellm>=0.8",),
    ),
    "schemathesis": Client(
        (
            "{bin}/python", "-m", "schemathesis.cli", "run", "{url}/openapi.json", "--checks",
            "not_a_server_error", "--request-timeout", "60", "--max-examples", "40", "--seed", "1",
            "--no-color",
        ),
        python=("schemathesis>=4",),
    ),
    "prometheus": Client(
        ("bash", str(HERE / "prometheus_client.sh")), system=("prometheus", "promtool", "curl")
    ),
}  # fmt: skip


def programs_of(name: str, client: Client) -> Path:
    """Where the client's programs are; what is missing of its packages is installed."""
    folder = ENVIRONMENTS / name
    if client.python:
        python = folder / "bin" / "python"
        if not python.exists():
            venv.create(folder, with_pip=True)
        command = [str(python), "-m", "pip", "install", "--quiet", *client.python]
        subprocess.run(command, check=True)
        return folder / "bin"
    if client.node:
        folder.mkdir(exist_ok=True)
        command = ["npm", "install", "--silent", "--no-audit", "--no-fund", *client.node]
        subprocess.run(command, check=True, cwd=folder)
        for script in HERE.glob("*.mjs"):  # Node looks for packages beside the script
            shutil.copy(script, folder)
    return folder


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """A server of the model in `folder`; gives its URL."""
    command = [sys.executable, "-m", "llmserve", "serve", str(folder), "--port", "0"]
    log = folder.parent / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=_environment()
        )
    try:
        yield _url_of(process, log)
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def model_folder() -> Iterator[Path]:
    """A small model with random weights."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from support.models import make_model_folder

    with tempfile.TemporaryDirectory() as temporary:
        yield make_model_folder(Path(temporary) / MODEL, max_seq_len=2048)


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


def run_client(name: str, url: str, folder: Path) -> bool:
    """Whether the client was content."""
    client = CLIENTS[name]
    if missing := [program for program in client.system if shutil.which(program) is None]:
        print(f"{name}: not found: {', '.join(missing)}; install what has them", file=sys.stderr)
        return False
    places = {"{bin}": str(programs_of(name, client)), "{url}": url, "{model}": str(folder)}
    command = [_put(word, places) for word in client.command]
    given = {
        **os.environ,
        "LLMSERVE_URL": url,
        "LLMSERVE_MODEL": MODEL,
        "LLMSERVE_MODEL_FOLDER": str(folder),
        "LLMSERVE_PYTHON": sys.executable,
        "LLMSERVE_ROOT": str(ROOT),
        "OPENAI_API_KEY": "none",
    }
    given.pop("PYTHONPATH", None)
    return subprocess.run(command, env=given, cwd=ENVIRONMENTS, check=False).returncode == 0


def _put(word: str, places: dict[str, str]) -> str:
    for mark, value in places.items():
        word = word.replace(mark, value)
    return word


def main() -> int:
    """Run the clients that were named, or all."""
    parser = argparse.ArgumentParser(description="Run other people's clients against a server.")
    parser.add_argument("clients", nargs="*", metavar="CLIENT", help=f"of {', '.join(CLIENTS)}")
    names = parser.parse_args().clients or list(CLIENTS)
    if unknown := set(names) - CLIENTS.keys():
        parser.error(f"no client {min(unknown)!r}; known: {', '.join(CLIENTS)}")
    ENVIRONMENTS.mkdir(exist_ok=True)
    with model_folder() as folder, server(folder) as url:
        outcomes = {name: run_client(name, url, folder) for name in names}
    for name, is_content in outcomes.items():
        print(f"{name:<14}{'ok' if is_content else 'FAILED'}")
    return 0 if all(outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
