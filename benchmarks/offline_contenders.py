"""Who takes part in `llmserve bench offline`: the options, and an engine for each row.

A model folder's other forms lie beside it under fixed names, so that one path names them all: for
`models/M` the quantized folders `M-int4` and `M-int8`, llama.cpp's files `M-q4_0.gguf`,
`M-q8_0.gguf` and `M-bf16.gguf`, the graphs `M-onnx-int8` and so on, which our ONNX runner and
onnxruntime-genai both run, and the folders that peers' own tools convert: `M-openvino-int4`,
`M-onnxruntime-genai-int8` and so on.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from llmserve.errors import ConfigError

from .peer_llamacpp import LlamaCpp
from .peer_process import EngineProcess

__all__ = [
    "SCHEMES",
    "Contender",
    "OfflineOptions",
    "contenders",
    "llama_cpp_file",
    "offline_options",
    "our_folder",
]

SCHEMES = ("int4", "int8", "bf16", "onnx-fp32", "onnx-int8", "onnx-int4")
"""Forms of the weights; `bf16` is the model folder itself, `onnx-...` a graph exported from it."""

_GGUF_TYPES = {"int4": "q4_0", "int8": "q8_0", "bf16": "bf16"}
_CONVERTED = ("int4", "int8")  # schemes that peers' own tools write
_GRAPH = "onnx-"


class Contender(Protocol):
    """An engine with a model, ready to be timed."""

    description: dict[str, Any]
    """`engine`, `weights`, `cache`, `versions`; where it is known what a step reads,
    `weight_bytes`, and `token_bytes` for each token in the cache."""

    def prefill(self, prompt: list[int]) -> float:
        """Prompt tokens per second."""

    def decode(self, prompts: list[list[int]], num_tokens: int) -> float:
        """Tokens per second of all prompts together."""

    def close(self) -> None:
        """End what runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineOptions:
    """One comparison."""

    model: Path
    """The float model folder."""
    schemes: tuple[str, ...] = ("int4", "int8")
    """Forms of the weights, of `SCHEMES`."""
    runner: str = "auto"
    """Our runner."""
    threads: int | None = None
    """Threads of every engine; None: our own choice for ours, one for each core for peers."""
    sequences: tuple[int, ...] = (1, 8, 32)
    """Sequences decoded together, ascending; one measurement each."""
    prefill_len: int = 512
    """Tokens of the prompt whose prefill is timed."""
    input_len: int = 128
    """Tokens of a prompt before decoding."""
    output_len: int = 64
    """Tokens of each sequence that are timed."""
    repeats: int = 3
    """Rounds."""
    busy: tuple[int, ...] = ()
    """Sequences of further measurements, while another process keeps a core busy."""
    seed: int = 0
    """Of the prompts."""
    llama_cpp: Path | None = None
    """Folder of llama.cpp's programs; None: without it."""
    transformers: Path | None = None
    """Python that has transformers and torch; None: without them."""
    openvino: Path | None = None
    """Python that has openvino-genai; None: without it."""
    onnxruntime_genai: Path | None = None
    """Python that has onnxruntime-genai; None: without it."""

    def __post_init__(self) -> None:
        counts = (self.prefill_len, self.input_len, self.output_len, self.repeats)
        if not self.sequences or min(*counts, *self.sequences) < 1 or self.seed < 0:
            raise ConfigError("lengths, sequences and repeats must be at least 1, the seed 0")
        if set(self.busy) - set(self.sequences):
            asked, known = (",".join(map(str, some)) for some in (self.busy, self.sequences))
            raise ConfigError(f"--busy takes some of --sequences ({known}), got {asked}")
        if not self.schemes or set(self.schemes) - set(SCHEMES):
            raise ConfigError(f"--schemes takes some of {', '.join(SCHEMES)}")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"--threads must be at least 1, got {self.threads}")


def offline_options(args: argparse.Namespace) -> OfflineOptions:
    """The options behind the arguments of the command line. Raises `ConfigError`."""
    return OfflineOptions(
        model=args.model,
        schemes=tuple(dict.fromkeys(args.schemes.split(","))),
        runner=args.runner,
        threads=args.threads,
        sequences=_counts("--sequences", args.sequences),
        prefill_len=args.prefill_len,
        input_len=args.input_len,
        output_len=args.output_len,
        repeats=args.repeats,
        busy=_counts("--busy", args.busy) if args.busy else (),
        seed=args.seed,
        llama_cpp=args.llama_cpp,
        transformers=args.transformers,
        openvino=args.openvino,
        onnxruntime_genai=args.onnxruntime_genai,
    )


def _counts(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise ConfigError(f"{option} takes whole numbers like 1,8,32, got {text!r}") from None


def contenders(options: OfflineOptions) -> Iterator[tuple[str, Callable[[], Contender]]]:
    """Every row's scheme and what loads it: ours first, then the peers that were named.

    Raises:
        ConfigError: a form of the model is missing; the message says how to make it.
    """
    for scheme in options.schemes:
        yield scheme, _ours(options, scheme)
    for scheme in options.schemes:
        if options.llama_cpp is not None and scheme in _GGUF_TYPES:
            yield scheme, _llama_cpp(options, options.llama_cpp, scheme)
        if options.openvino is not None and scheme in _CONVERTED:
            yield scheme, _converted(options, options.openvino, "openvino", scheme)
        if options.onnxruntime_genai is not None and scheme in _CONVERTED:
            python = options.onnxruntime_genai
            yield scheme, _converted(options, python, "onnxruntime-genai", scheme)
        if options.onnxruntime_genai is not None and scheme.startswith(_GRAPH):
            folder = _graph_folder(options, scheme)
            yield scheme, _peer(options, options.onnxruntime_genai, "peer_onnxruntime", folder)
    if options.transformers is not None:
        yield "bf16", _peer(options, options.transformers, "peer_transformers", options.model)


def our_folder(model: Path, scheme: str) -> Path:
    """Our form of `model`. Raises `ConfigError` if it is missing."""
    folder = model if scheme == "bf16" else _beside(model, f"-{scheme}")
    _need(folder, f"llmserve quantize {model} --scheme {scheme} --no-measure")
    return folder


def llama_cpp_file(model: Path, scheme: str) -> Path:
    """llama.cpp's form of `model`. Raises `ConfigError` if it is missing."""
    file = _beside(model, f"-{_GGUF_TYPES[scheme]}.gguf")
    _need(file, f"llmserve export gguf {model} --type {_GGUF_TYPES[scheme]}")
    return file


def _ours(options: OfflineOptions, scheme: str) -> Callable[[], Contender]:
    is_graph = scheme.startswith(_GRAPH)
    folder = _graph_folder(options, scheme) if is_graph else our_folder(options.model, scheme)
    arguments = [str(folder), "--runner", "onnx" if is_graph else options.runner]
    if options.threads is not None:
        arguments += ["--threads", str(options.threads)]
    return lambda: EngineProcess.of_ours("offline_engine", *arguments)


def _graph_folder(options: OfflineOptions, scheme: str) -> Path:
    folder, numbers = _beside(options.model, f"-{scheme}"), scheme.removeprefix(_GRAPH)
    _need(folder, f"llmserve export onnx {options.model} --scheme {numbers} --out {folder}")
    return folder


def _llama_cpp(options: OfflineOptions, programs: Path, scheme: str) -> Callable[[], Contender]:
    file = llama_cpp_file(options.model, scheme)
    return lambda: LlamaCpp(programs, file, _threads(options))


def _converted(
    options: OfflineOptions, python: Path, engine: str, scheme: str
) -> Callable[[], Contender]:
    folder = _beside(options.model, f"-{engine}-{scheme}")
    module = {"openvino": "peer_openvino", "onnxruntime-genai": "peer_onnxruntime"}[engine]
    _need(folder, f"the command in benchmarks/{module}.py")
    return _peer(options, python, module, folder)


def _peer(
    options: OfflineOptions, python: Path, module: str, folder: Path
) -> Callable[[], Contender]:
    return lambda: EngineProcess.of_peer(python, module, folder, str(_threads(options)))


def _threads(options: OfflineOptions) -> int:
    return options.threads or len(os.sched_getaffinity(0))


def _beside(model: Path, ending: str) -> Path:
    return model.absolute().with_name(f"{model.absolute().name}{ending}")


def _need(path: Path, command: str) -> None:
    if not path.exists():
        raise ConfigError(f"{path} is missing; make it with {command}")
