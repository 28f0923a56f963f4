"""llama.cpp as a peer: its own benchmark programs, one call for each measurement.

`llama-bench` times the prompt, `llama-batched-bench` the decoding of N sequences after prompts of
their own; both warm up first. What the file's weights are is read from the file, since its name
does not say what the head is. Source of the format: docs/gguf.md in github.com/ggml-org/ggml.
"""

from __future__ import annotations

import json
import mmap
import struct
import subprocess
from pathlib import Path
from typing import Any

from llmserve.errors import ConfigError, EngineError

from .peer_process import peer_environment

__all__ = ["LlamaCpp", "program_version", "tensor_types"]

BENCH = "llama-bench"
BATCHED_BENCH = "llama-batched-bench"
_TYPES = {0: "f32", 1: "f16", 2: "q4_0", 8: "q8_0", 12: "q4_K", 14: "q6_K", 30: "bf16"}
_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9


class LlamaCpp:
    """The programs of one build, on one GGUF file."""

    def __init__(self, programs: Path, gguf: Path, threads: int) -> None:
        """Raises `ConfigError` if a program or the file is missing."""
        for program in (BENCH, BATCHED_BENCH):
            if not (programs / program).is_file():
                raise ConfigError(f"{programs} has no {program}; give the folder of the programs")
        self._programs, self._gguf, self._threads = programs, gguf, threads
        self.description: dict[str, Any] = {
            "engine": "llama.cpp",
            "weights": self.weights_of(gguf),
            "cache": "f16",
            "versions": {"llama.cpp": program_version(programs / BENCH)},
        }

    @staticmethod
    def weights_of(gguf: Path) -> str:
        """Scheme and head of a file. Raises `ConfigError` as `tensor_types`."""
        types = tensor_types(gguf)
        head = types.get("output.weight", types["token_embd.weight"])
        return f"{types['blk.0.ffn_up.weight']}, {head} head"

    def prefill(self, prompt: list[int]) -> float:
        """Prompt tokens per second for a prompt of that length; the program draws its own."""
        options = ("-p", len(prompt), "-n", 0, "-r", 1, "-o", "json")
        [row] = json.loads(self._run(BENCH, *options))
        rate: float = row["avg_ts"]
        return rate

    def decode(self, prompts: list[list[int]], num_tokens: int) -> float:
        """Tokens per second of that many sequences together, after prompts of that length."""
        count, length = len(prompts), len(prompts[0])
        context = count * (length + num_tokens)
        lengths = ("-npp", length, "-ntg", num_tokens, "-npl", count, "-c", context)
        lines = self._run(BATCHED_BENCH, *lengths, "--output-format", "jsonl").splitlines()
        rows = [json.loads(line) for line in lines if line.startswith("{")]
        if len(rows) != 1:
            raise EngineError(f"{BATCHED_BENCH} printed {len(rows)} rows for {count} sequences")
        rate: float = rows[0]["speed_tg"]
        return rate

    def close(self) -> None:
        """Nothing runs between two measurements."""

    def _run(self, program: str, *options: object) -> str:
        done = _start(self._programs / program, "-m", self._gguf, "-t", self._threads, *options)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or ["no message"]
            raise EngineError(f"{program} ended with code {done.returncode}: {last[0]}")
        return done.stdout


def program_version(program: Path) -> str:
    """What one of llama.cpp's programs says of its version."""
    done = _start(program, "--version")
    lines = (done.stdout + done.stderr).splitlines()
    version = next((line for line in lines if line.startswith("version: ")), "version: unknown")
    return version.removeprefix("version: ")


def _start(program: Path, *options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603 - the programs are the user's choice
        [str(program), *map(str, options)],
        env=peer_environment(),
        capture_output=True,
        text=True,
        check=False,
    )


def tensor_types(path: Path) -> dict[str, str]:
    """Tensor → type, from the directory of a GGUF file.

    Raises `ConfigError` if there is no such file, or it is none.
    """
    try:
        with open(path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            return _Directory(data).read()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, struct.error) as error:
        raise ConfigError(f"{path} is no GGUF file of version 2 or 3: {error}") from error


class _Directory:
    """Walks over a file's header, whose values have to be passed to reach the tensors."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0

    def read(self) -> dict[str, str]:
        magic, version = self._take("4sI")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"it begins with {magic!r}")
        num_tensors, num_values = self._take("QQ")
        for _ in range(num_values):
            self._string()
            self._pass_value(*self._take("I"))
        return dict(self._entry() for _ in range(num_tensors))

    def _entry(self) -> tuple[str, str]:
        name = self._string()
        (rank,) = self._take("I")
        *_, kind, _ = self._take(f"{rank}QIQ")
        return name, _TYPES.get(kind, f"type {kind}")

    def _take(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{form}", self._data, self._at)
        self._at += struct.calcsize(f"<{form}")
        return values

    def _string(self) -> str:
        (length,) = self._take("Q")
        self._at += length
        return bytes(self._data[self._at - length : self._at]).decode()

    def _pass_value(self, kind: int) -> None:
        if kind == _STRING:
            self._string()
        elif kind == _ARRAY:
            item, count = self._take("IQ")
            if item in (_STRING, _ARRAY):
                for _ in range(count):
                    self._pass_value(item)
            else:
                self._at += count * _SCALAR_BYTES[item]
        else:
            self._at += _SCALAR_BYTES[kind]
