"""The parent's side of an offline comparison: one engine in a process of its own, asked for times.

Every engine, ours included, runs so: none shares threads, allocator or interpreter with another,
and a peer needs nothing of llmserve's environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from llmserve.errors import ConfigError, EngineError

__all__ = ["EngineProcess", "peer_command", "peer_environment"]

# Makes a package of this folder alone, so that a module in it runs in another interpreter without
# llmserve, and without the packages installed beside llmserve.
_BOOTSTRAP = """\
import runpy, sys, types
package = sys.modules["peers"] = types.ModuleType("peers")
package.__path__ = [sys.argv.pop(1)]
runpy.run_module("peers." + sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


def peer_environment() -> dict[str, str]:
    """This process's, without the waiting rule that llmserve's command line set for itself."""
    return {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}


def peer_command(python: Path, module: str, *arguments: str | Path) -> list[str]:
    """What runs the module `module` of this folder in another interpreter."""
    return [str(python), "-c", _BOOTSTRAP, str(Path(__file__).parent), module, *map(str, arguments)]


class EngineProcess:
    """A worker with a loaded engine. Close it, or use it as a context manager."""

    def __init__(
        self, command: Sequence[str | Path], *, environment: Mapping[str, str] = os.environ
    ) -> None:
        """Start `command`, which runs `run_worker`, and wait until its engine is loaded.

        Raises:
            ConfigError: there is no such program.
            EngineError: it ended instead of answering; its own message is on stderr.
        """
        try:
            self._process = subprocess.Popen(  # noqa: S603 - the programs are the user's choice
                list(map(str, command)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=dict(environment),
                text=True,
            )
        except OSError as error:
            raise ConfigError(f"{command[0]} cannot be run: {error.strerror}") from error
        self._name = " ".join(map(str, command[-3:]))
        try:
            self.description = self._read()
        except BaseException:
            self.close()
            raise

    @classmethod
    def of_peer(cls, python: Path, module: str, *arguments: str | Path) -> EngineProcess:
        """The module `module` of this folder, run by another interpreter."""
        # The safe path keeps our folders from standing in for a peer's modules of that name.
        environment = {**peer_environment(), "PYTHONSAFEPATH": "1"}
        return cls(peer_command(python, module, *arguments), environment=environment)

    @classmethod
    def of_ours(cls, module: str, *arguments: str | Path) -> EngineProcess:
        """The module `module` of this folder, run by this interpreter."""
        return cls([sys.executable, "-m", f"llmserve.benchmarks.{module}", *arguments])

    def prefill(self, prompt: list[int]) -> float:
        """Prompt tokens per second, up to the first token."""
        return len(prompt) / self._seconds({"task": "prefill", "prompts": [prompt]})

    def decode(self, prompts: list[list[int]], num_tokens: int) -> float:
        """Tokens per second of all prompts together, after their first tokens."""
        seconds = self._seconds({"task": "decode", "prompts": prompts, "num_tokens": num_tokens})
        return len(prompts) * num_tokens / seconds

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _seconds(self, request: dict[str, Any]) -> float:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # its end shows below
        reply = self._read()
        if "error" in reply:
            raise EngineError(f"{self._name}: {reply['error']}")
        seconds: float = reply["seconds"]
        return seconds

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise EngineError(f"{self._name}: the process ended with code {code}")
        reply: dict[str, Any] = json.loads(line)
        return reply
