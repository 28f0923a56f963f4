"""The work whose cost is guarded; runs by itself, over whichever tree is on the path.

    python cases.py FOLDER             every case once, a line of JSON for each
    python cases.py FOLDER --prepare   write the model that the cases use

Only what is stable is used of a tree: its public interface, and its own tests' support. A case that
a tree does not know is told on stderr and left out.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import llmserve

Work = Callable[[], object]
VOCAB_SIZE = 4096
INSTRUCTION_SET = "avx2"


def prepare(folder: Path) -> None:
    """A small model in int4, whose matrices dwarf what is around them."""
    from llmserve.benchmarks.shapes import make_model
    from llmserve.config import ModelConfig
    from support.quantized_folders import write_quantized

    config = ModelConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        intermediate_size=768,
        max_seq_len=512,
        bos_token_id=0,
        eos_token_ids=(0,),
        dtype="bfloat16",
    )
    make_model(config, folder / "float")
    write_quantized(folder / "float", folder / "int4", "int4")


def prefill(folder: Path) -> Work:
    """Four prompts of 64 tokens."""
    return _generation(folder, num_prompts=4, prompt_len=64, max_tokens=1)


def decode(folder: Path) -> Work:
    """Eight rows, 16 steps."""
    return _generation(folder, num_prompts=8, prompt_len=2, max_tokens=16)


def _generation(folder: Path, *, num_prompts: int, prompt_len: int, max_tokens: int) -> Work:
    from llmserve.llm import LLM
    from llmserve.sampling import SamplingParams

    llm = LLM(folder / "int4", runner="native", threads=1, cache_bytes=32 << 20, verify=False)
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    prompts = np.random.default_rng(0).integers(1, VOCAB_SIZE, (num_prompts, prompt_len)).tolist()
    llm.generate([[1, 2, 3]], params)
    return lambda: llm.generate(prompts, params)


def sampler(_folder: Path) -> Work:
    """Rows of 32,000 logits, drawn in four ways, 20 times."""
    from llmserve.native.kernels import load_kernels
    from llmserve.runners.protocol import SamplingRow
    from llmserve.sampling import SamplingParams
    from support.native_sampler import native_sample

    ways = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.8),
        SamplingParams(temperature=0.8, top_p=0.9, top_k=50),
        SamplingParams(temperature=0.8, repetition_penalty=1.1, logprobs=5),
    ]
    rows = [
        SamplingRow(params=params, seed=7, choice_index=0, token_ids=[1, 2, 3], num_prompt_tokens=2)
        for params in ways
    ]
    kernels = load_kernels()
    assert kernels is not None, "the tree has no compiled kernels"
    logits = np.random.default_rng(0).normal(0, 3, (len(rows), 32_000)).astype(np.float32)
    return lambda: [native_sample(kernels, INSTRUCTION_SET, logits, rows) for _ in range(20)]


def scheduler(_folder: Path) -> Work:
    """32 sequences over a runner that answers at once: prompts and 50 steps."""
    from llmserve.benchmarks.engine_cost import measure_step

    measure_step(2, 2)
    return lambda: measure_step(32, 50)


def encode(folder: Path) -> Work:
    """A text of 5,000 tokens, in ten parts."""
    from llmserve.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(folder / "int4")
    texts = [tokenizer.decode(part) for part in _token_ids(10, 500)]
    tokenizer.encode(texts[0])
    return lambda: [tokenizer.encode(text) for text in texts]


def detokenize(folder: Path) -> Work:
    """Ten answers of 500 tokens, one token at a time."""
    from llmserve.text.detokenizer import Detokenizer
    from llmserve.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(folder / "int4")

    def answer(ids: list[int]) -> None:
        detokenizer = Detokenizer(tokenizer)
        for token_id in ids:
            detokenizer.push(token_id)

    def work() -> None:
        for ids in _token_ids(10, 500):
            answer(ids)

    answer([1, 2, 3])
    return work


def stream(folder: Path) -> Work:
    """Three answers of 100 tokens over a socket, from an engine that computes nothing."""
    from contextlib import ExitStack
    from http.client import HTTPConnection

    from support.servers import local_server

    stack = ExitStack()
    server = stack.enter_context(local_server(folder / "int4"))
    host, port = stack.enter_context(server.listening())
    _open.append(stack)

    def ask(max_tokens: int) -> None:
        connection = HTTPConnection(host, port, timeout=120)
        body = {"prompt": [1, 2, 3], "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
        connection.request("POST", "/v1/completions", json.dumps(body), _JSON)
        text = connection.getresponse().read()
        connection.close()
        if text.count(b"data: ") < max_tokens // 2:
            raise SystemExit(f"the stream is too short: {text[-300:]!r}")

    def work() -> None:
        for _ in range(3):
            ask(100)

    ask(4)
    return work


CASES = (prefill, decode, sampler, scheduler, encode, detokenize, stream)
_JSON = {"Content-Type": "application/json"}
_open: list[object] = []  # what must live until the process ends


def _token_ids(num_texts: int, length: int) -> list[list[int]]:
    ids: list[list[int]] = np.random.default_rng(0).integers(
        300, VOCAB_SIZE, (num_texts, length)
    ).tolist()  # fmt: skip
    return ids


def measure(case: str, work: Work) -> dict[str, object]:
    """Do the work between the marks of the counter, if there is one."""
    shim = ctypes.CDLL(os.environ["GUARD_SHIM"]) if os.environ["GUARD_SHIM"] else None
    start_s = time.perf_counter()
    if shim is not None:
        shim.guard_begin()
    work()
    if shim is not None:
        shim.guard_end(case.encode())
    return {"case": case, "ms": 1e3 * (time.perf_counter() - start_s)}


def main() -> None:
    """Prepare, or run the cases."""
    folder = Path(sys.argv[1])
    tree = Path(os.environ["GUARD_TREE"])
    if tree not in Path(llmserve.__file__).parents:
        raise SystemExit(f"llmserve comes from {llmserve.__file__}, not from {tree}")
    if "--prepare" in sys.argv:
        return prepare(folder)
    for case in CASES:
        try:
            work = case(folder)
        except (ImportError, AttributeError, TypeError) as error:
            print(f"{tree.name} does not know the case {case.__name__}: {error}", file=sys.stderr)
            continue
        print(json.dumps(measure(case.__name__, work)), flush=True)
    sys.stdout.flush()
    os._exit(0)  # servers and threads end with the process


if __name__ == "__main__":
    main()
