"""How each server of the comparison is started: a command, what its weights and cache are.

Ours and the peers get the same requests from the same client, so all that an entry here holds is a
command, what the weights and the cache are, and the fields by which a server is told to answer
greedily and past the end token. OpenVINO GenAI and onnxruntime-genai are libraries without a server
of their own, so they appear in process only.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from llmserve.errors import ConfigError

from .offline_contenders import OfflineOptions, llama_cpp_file, our_folder
from .peer_llamacpp import LlamaCpp, program_version
from .peer_process import peer_environment
from .peers_recorded import VLLM
from .running_server import PeerServer

__all__ = ["llama_server", "our_server", "servers_of"]

LLAMA_SERVER = "llama-server"
SPARE_TOKENS = 16
"""Room in a slot beyond what is asked: a server may put its start token before a prompt."""
VLLM_PRELOADS = ("libtcmalloc_minimal.so.4", "libiomp5.so")
VLLM_READY_TIMEOUT_S = 600.0
"""It compiles kernels while it starts."""
VLLM_CACHE_GIB = 2


def servers_of(
    options: OfflineOptions, *, slots: int, request_len: int, vllm: Path | None = None
) -> Iterator[PeerServer]:
    """Ours for every scheme, then those of the peers that were named and have one.

    `vllm` is a Python that has it; None: without it.

    `slots` is the most requests at a time and `request_len` the tokens of one, prompt and answer:
    a peer whose cache has to be sized beforehand gets room for as many.

    Raises:
        ConfigError: a form of the model or a program is missing; the message says what to do.
    """
    for scheme in options.schemes:
        yield our_server(options, scheme)
    if options.llama_cpp is not None:
        for scheme in options.schemes:
            yield llama_server(
                options, options.llama_cpp, scheme, slots=slots, request_len=request_len
            )
    if options.transformers is not None:
        yield _transformers_serve(options, options.transformers)
    if vllm is not None:
        yield _vllm_server(options, vllm, slots=slots, request_len=request_len)


def our_server(options: OfflineOptions, scheme: str, *extra: str) -> PeerServer:
    """`llmserve serve` as it is, for every row of a table; `extra` are more options of it."""
    folder = our_folder(options.model, scheme)
    command = [sys.executable, "-m", "llmserve", "serve", str(folder), "--port", "{port}", *extra]
    if options.runner != "auto":
        command += ["--runner", options.runner]
    if options.threads is not None:
        command += ["--threads", str(options.threads)]
    return PeerServer(
        scheme=scheme,
        engine="llmserve",
        weights="",
        cache="",
        versions={},
        command=tuple(command),
        environment=dict(os.environ),
        is_ours=True,
    )


def llama_server(
    options: OfflineOptions, programs: Path, scheme: str, *, slots: int, request_len: int
) -> PeerServer:
    """llama.cpp's server with `slots` slots of equal room for a prompt and its answer."""
    program = programs / LLAMA_SERVER
    if not program.is_file():
        raise ConfigError(f"{programs} has no {LLAMA_SERVER}; give the folder of the programs")
    file = llama_cpp_file(options.model, scheme)
    room = slots * (request_len + SPARE_TOKENS)
    threads = str(_num_threads(options))
    command = [
        str(program),
        "-m",
        str(file),
        "--alias",
        file.name,
        "--host",
        "127.0.0.1",
        "--port",
        "{port}",
    ]
    command += ["-t", threads, "-np", str(slots), "-c", str(room), "--no-kv-unified"]
    command += ["--cache-ram", "0", "--no-ui"]
    return PeerServer(
        scheme=scheme,
        engine="llama.cpp",
        weights=LlamaCpp.weights_of(file),
        cache="f16",
        versions={"llama.cpp": program_version(program)},
        command=tuple(command),
        environment=peer_environment(),
    )


def _transformers_serve(options: OfflineOptions, python: Path) -> PeerServer:
    """`transformers serve` with continuous batching, in bfloat16."""
    program = python.absolute().parent / "transformers"
    if not program.is_file():
        raise ConfigError(f"{python} has no transformers beside it: install transformers[serving]")
    model = str(options.model.absolute())
    threads = str(_num_threads(options))
    return PeerServer(
        scheme="bf16",
        engine="transformers",
        weights="bf16, bf16 head",
        cache="bf16",
        versions=_installed(python, ("transformers", "torch")),
        command=(
            *(str(program), "serve", "--continuous-batching", "--device", "cpu"),
            *("--dtype", "bfloat16", "--host", "127.0.0.1", "--port", "{port}", model),
        ),
        environment={**peer_environment(), "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"},
        body={"temperature": 0.0, "generation_config": '{"eos_token_id": -1, "do_sample": false}'},
        model=model,
    )


def _vllm_server(
    options: OfflineOptions, python: Path, *, slots: int, request_len: int
) -> PeerServer:
    """vLLM's CPU build in bfloat16, with as many cores to compute as ours has.

    By default it would keep one core for its API process. Its own advice is tcmalloc and Intel's
    OpenMP, preloaded: each is where it lies in the environment's `lib`.
    """
    cores = sorted(os.sched_getaffinity(0))[: _num_threads(options)]
    environment = {
        **peer_environment(),
        "OMP_NUM_THREADS": str(len(cores)),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_KVCACHE_SPACE": str(VLLM_CACHE_GIB),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    libraries = [python.absolute().parents[1] / "lib" / name for name in VLLM_PRELOADS]
    if found := [str(library) for library in libraries if library.is_file()]:
        environment["LD_PRELOAD"] = ":".join(found)
    return PeerServer(
        scheme="bf16",
        engine=VLLM,
        weights="bf16, bf16 head",
        cache="bf16",
        versions=_installed(python, ("vllm-cpu", "torch")),
        command=(
            *(str(python), "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(options.model.absolute()), "--dtype", "bfloat16"),
            *("--max-num-seqs", str(slots), "--max-model-len", str(request_len + SPARE_TOKENS)),
            *("--host", "127.0.0.1", "--port", "{port}"),
        ),
        environment=environment,
        ready_timeout_s=VLLM_READY_TIMEOUT_S,
    )


def _num_threads(options: OfflineOptions) -> int:
    return options.threads or len(os.sched_getaffinity(0))


def _installed(python: Path, packages: Sequence[str]) -> dict[str, str]:
    """Versions that another interpreter has."""
    code = "import sys, importlib.metadata as m; print(*map(m.version, sys.argv[1:]), sep='\\n')"
    done = subprocess.run(  # noqa: S603 - the interpreter is the user's choice
        [str(python), "-c", code, *packages], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ConfigError(f"{python} lacks one of {', '.join(packages)}: install them there")
    return dict(zip(packages, done.stdout.split(), strict=True))
