"""Programs of one kind of operation, for the executor of the native runner to be timed on.

An operation stands in its program several times, so that starting a step weighs little, and each
time with another copy of its weights or keys (`kernels_matrices.py`). What it works on stays: rows
of normal numbers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from llmserve.config import ModelConfig
from llmserve.native.kernels import load_kernels
from llmserve.native.program import (
    Domain,
    Epilogue,
    Norm,
    Number,
    PackedLinear,
    Program,
    address_of,
)
from llmserve.native.weights import pad_vector
from llmserve.runners.native_sampling import DrawnRows, pack_rows
from llmserve.runners.protocol import SamplingRow
from llmserve.sampling import SamplingParams

from .kernels_matrices import Matrix, Pool

__all__ = [
    "Machine",
    "Runnable",
    "attention",
    "linears",
    "prepares",
    "sampling",
    "sampling_rows",
]

BLOCK_SIZE = 16
_SLACK = 16  # floats that a product may write behind its last column
_CACHE_KINDS = {"float32": Number.FLOAT32, "bfloat16": Number.BFLOAT16, "int8": Number.INT8}


class Machine:
    """How programs are run: instruction set and threads."""

    def __init__(self, path: str, threads: int) -> None:
        kernels = load_kernels()
        assert kernels is not None, "programs without the kernels"
        self.kernels: Any = kernels
        self.path, self.threads = path, threads

    def start(self, program: Program) -> Any:
        """An executor of it."""
        return self.kernels.new(self.path, self.threads, *program.tables())


class Runnable:
    """A program with its executor; its first buffer is what the operations work on."""

    def __init__(
        self, machine: Machine, program: Program, count: int, *, vocab_size: int = 1
    ) -> None:
        """`count` is how often the operation stands in the program."""
        self.count = count
        self._machine, self._program, self._vocab_size = machine, program, vocab_size
        self.handle = machine.start(program)
        self._filled_rows = 0

    def seconds(
        self,
        lengths: Sequence[int],
        context_len: int | None = None,
        *,
        rows: Sequence[SamplingRow] = (),
    ) -> float:
        """Seconds of one operation: of a step, shared by how often it stands there.

        Args:
            lengths: Tokens of each sequence.
            context_len: Tokens in the cache of each, these included; None: no others.
            rows: How tokens are drawn, if they are.
        """
        arrays = _arrays(lengths, context_len, len(rows), len(self._program.windows))
        packed = pack_rows(list(rows)) if rows else None
        drawn = None if packed is None else DrawnRows(packed, self._vocab_size)
        sampling = packed and drawn and (
            packed.constants, packed.positions, packed.edits, drawn.token_ids, drawn.is_usable,
            drawn.logprobs.logprobs, drawn.logprobs.num_top, drawn.logprobs.top_ids,
            drawn.logprobs.top_logprobs,
        )  # fmt: skip
        step, handle = self._machine.kernels.step, self.handle
        if self._filled_rows < sum(lengths):
            step(handle, *arrays, self._vocab_size, sampling, 1, b"")  # makes the buffers
            self._fill(sum(lengths))
        start_s = time.perf_counter()
        step(handle, *arrays, self._vocab_size, sampling, 1, b"")
        return (time.perf_counter() - start_s) / self.count

    def _fill(self, num_rows: int) -> None:
        view = self._machine.kernels.buffer(self.handle, 0, num_rows)
        values = np.frombuffer(view, np.float32)
        values[:] = np.random.default_rng(0).standard_normal(len(values), np.float32)
        self._filled_rows = num_rows


def linears(machine: Machine, matrix: Matrix, copies: Sequence[PackedLinear]) -> Runnable:
    """A linear layer, over copies of it; its input is prepared once for all of them."""
    program, spec = _plain_program(), matrix.spec
    x = program.buffer(spec.width)
    out = program.buffer(spec.out + _SLACK)
    slot = program.prepare(x, spec.width, None, copies[0])
    for linear in copies:
        program.linear(slot, linear, matrix.epilogue, out, cap=matrix.cap)
    return Runnable(machine, program, len(copies))


def prepares(
    machine: Machine, config: ModelConfig, matrix: Matrix, pool: Pool, count: int
) -> tuple[Runnable, Runnable]:
    """Preparing, `count` times, and the same program with one preparing only.

    Few rows are prepared by the product that they are for: so each is followed by one of 16
    outputs, and the difference of the programs is what `count - 1` times take.
    """
    narrow = pool.copies(replace(matrix.spec, names=("",), rows=(16,), is_gated=False))[0]
    norm = _norm(config, matrix.spec.width) if matrix.has_norm else None
    programs = [_prepare_program(narrow, norm, times, count) for times in (count, 1)]
    full, single = (Runnable(machine, program, count - 1) for program in programs)
    return full, single


def attention(
    machine: Machine, config: ModelConfig, pool: Pool, *, cache_dtype: str, token_bytes: int,
    context_len: int, num_seqs: int, most_layers: int,
) -> Runnable:  # fmt: skip
    """Attention in as many layers as the memory holds caches, or fewer, without windows."""
    num_blocks = num_seqs * -(-context_len // BLOCK_SIZE)
    layer_bytes = num_blocks * BLOCK_SIZE * token_bytes
    # Kernels may read a little behind a cache.
    num_layers = min(most_layers, max(1, len(pool.memory) // layer_bytes - 1))
    program = Program(
        num_heads=config.num_heads, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim,
        layer_groups=[0] * num_layers, windows=[0],
    )  # fmt: skip
    qkv = program.buffer(config.q_size + 2 * config.kv_size + _SLACK)
    out = program.buffer(config.q_size)
    for layer in range(num_layers):
        program.attend(
            qkv, layer, out, scale=config.score_scale, cap=config.attention_softcap or 0.0
        )
    runnable = Runnable(machine, program, num_layers)
    start = address_of(pool.memory)
    machine.kernels.set_cache(
        runnable.handle, _int64([start + layer * layer_bytes for layer in range(num_layers)]),
        _CACHE_KINDS[cache_dtype], BLOCK_SIZE, config.num_kv_heads, config.head_dim,
    )  # fmt: skip
    return runnable


def sampling(machine: Machine, vocab_size: int, count: int) -> Runnable:
    """Drawing from the same logits, `count` times."""
    program = _plain_program()
    logits = program.buffer(vocab_size, Domain.ROWS)
    for _ in range(count):
        program.sample(logits, vocab_size)
    return Runnable(machine, program, count, vocab_size=vocab_size)


def sampling_rows(num_rows: int, temperature: float) -> list[SamplingRow]:
    """Rows of as many sequences without edits."""
    params = SamplingParams(temperature=temperature)
    return [
        SamplingRow(params=params, seed=index, choice_index=0, token_ids=[0], num_prompt_tokens=1)
        for index in range(num_rows)
    ]


def _plain_program() -> Program:
    return Program(num_heads=1, num_kv_heads=1, head_dim=16, layer_groups=[], windows=[])


def _prepare_program(
    narrow: PackedLinear, norm: Norm | None, num_prepares: int, count: int
) -> Program:
    program = _plain_program()
    x = program.buffer(narrow.width)
    out = program.buffer(narrow.out + _SLACK)
    slot = -1
    for index in range(count):
        if index < num_prepares:
            slot = program.prepare(x, narrow.width, norm, narrow)
        program.linear(slot, narrow, Epilogue.STORE, out)
    return program


def _norm(config: ModelConfig, width: int) -> Norm:
    ones, is_rms = np.ones(width, np.float32), config.norm == "rmsnorm"
    bias = None if is_rms else pad_vector(np.zeros(width, np.float32))
    return Norm(1 if is_rms else 2, pad_vector(ones), bias, config.norm_eps)


def _arrays(
    lengths: Sequence[int], context_len: int | None, num_rows: int, num_groups: int
) -> tuple[Any, ...]:
    """What `step` takes, from the token ids to the adapters. Sequences have blocks in order."""
    ends = [context_len or length for length in lengths]
    positions = [p for length, end in zip(lengths, ends, strict=True)
                 for p in range(end - length, end)]  # fmt: skip
    per_sequence = -(-max(ends) // BLOCK_SIZE)
    tables = np.arange(len(lengths) * per_sequence).reshape(len(lengths), per_sequence)
    group = (_int64(positions), _int64(tables), _int64(np.zeros((0, 2))))
    return (
        _int64(np.zeros(sum(lengths))), _int64(positions), _int64(np.cumsum([0, *lengths])),
        _int64(ends), _int64(range(num_rows)), (group,) * num_groups, None,
    )  # fmt: skip


def _int64(values: Any) -> npt.NDArray[np.int64]:
    return np.ascontiguousarray(np.array(values, np.int64))
