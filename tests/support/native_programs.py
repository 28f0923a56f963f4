"""Small programs for the C++ executor: rows go in through an embedding table, buffers come out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmserve.native.kernels import load_kernels
from llmserve.native.program import Number, Program, address_of

__all__ = ["Cache", "Part", "Run", "inject", "new_program", "run_program", "run_rows"]

Floats = np.ndarray[Any, np.dtype[np.float32]]


def new_program(**changes: Any) -> Program:
    """A program of one layer and no window, with heads of 16."""
    shape: dict[str, Any] = {
        "num_heads": 1, "num_kv_heads": 1, "head_dim": 16, "layer_groups": [0], "windows": [0],
        **changes,
    }  # fmt: skip
    return Program(**shape)


def inject(program: Program, rows: Floats) -> int:
    """A buffer that holds `rows`: token i is row i."""
    buffer = program.buffer(rows.shape[1])
    program.embed(
        buffer, np.ascontiguousarray(rows), Number.FLOAT32, rows.shape[1], scale=1.0,
        positions=None, position_kind=Number.FLOAT32,
    )  # fmt: skip
    return buffer


@dataclass(slots=True, kw_only=True)
class Part:
    """What one sequence has in the step."""

    length: int
    first: int = 0
    """Position of its first token."""
    table: list[int] = field(default_factory=lambda: [0])
    adapter_id: int = 0


@dataclass(slots=True, kw_only=True)
class Cache:
    """The memory of each layer; steps write into it."""

    layers: list[np.ndarray[Any, np.dtype[np.uint8]]]
    kind: Number
    block_size: int = 16


@dataclass(slots=True)
class Run:
    """An executor after its step."""

    handle: Any
    program: Program
    num_tokens: int
    num_rows: int
    kept: tuple[Any, ...]
    """Memory that it points to."""

    def buffer(self, index: int, width: int) -> Floats:
        """A copy of the first `width` numbers of a buffer's rows."""
        padded, domain = self.program.buffers[index]
        times = (1, None, self.program.num_experts_per_token)[domain]
        rows = self.num_rows if times is None else times * self.num_tokens
        view = _kernels().buffer(self.handle, index, rows)
        return np.frombuffer(view, np.float32).reshape(rows, padded)[:, :width].copy()


def run_program(
    program: Program,
    parts: Sequence[Part],
    *,
    path: str,
    threads: int = 1,
    cache: Cache | None = None,
    rotary: Floats | None = None,
    token_ids: Sequence[int] | None = None,
    rows: Sequence[int] = (),
) -> Run:
    """One step. Token ids are 0, 1, ... unless given; `rows` are those of the head."""
    kernels = _kernels()
    handle = kernels.new(path, threads, *program.tables())
    if cache is not None:
        kernels.set_cache(
            handle, _int64([address_of(layer) for layer in cache.layers]), cache.kind,
            cache.block_size, program.num_kv_heads, program.head_dim,
        )  # fmt: skip
    if rotary is not None:
        kernels.set_rope_table(handle, 0, address_of(rotary))
    arrays = _step_arrays(parts, cache.block_size if cache else 16, token_ids, rows)
    kernels.step(
        handle, *arrays[:5], (arrays[5:8],) * len(program.windows), arrays[8], 1, None, 1, b""
    )
    num_tokens = sum(part.length for part in parts)
    return Run(handle, program, num_tokens, len(rows), (cache, rotary, arrays))


def run_rows(
    rows: Floats, write: Callable[[Program, int], int], width: int, *, path: str, threads: int = 1
) -> Floats:
    """What a program of one input makes of `rows`: `write` adds operations, returns a buffer."""
    program = new_program()
    out = write(program, inject(program, rows))
    run = run_program(program, [Part(length=len(rows))], path=path, threads=threads)
    return run.buffer(out, width)


def _kernels() -> Any:
    kernels = load_kernels()
    assert kernels is not None, "the kernels are not built here"
    return kernels


def _step_arrays(
    parts: Sequence[Part], block_size: int, token_ids: Sequence[int] | None, rows: Sequence[int]
) -> tuple[Any, ...]:
    lengths = [part.length for part in parts]
    positions = [part.first + i for part in parts for i in range(part.length)]
    widest = max(len(part.table) for part in parts)
    tables = [part.table + [0] * (widest - len(part.table)) for part in parts]
    places = [(part, part.first + i) for part in parts for i in range(part.length)]
    slots = [
        part.table[p // block_size] * block_size + p % block_size
        if p // block_size < len(part.table)
        else 0
        for part, p in places
    ]
    adapters = [part.adapter_id for part in parts]
    ids = range(sum(lengths)) if token_ids is None else token_ids
    return (
        _int64(list(ids)), _int64(positions), _int64(np.cumsum([0, *lengths])),
        _int64([part.first + part.length for part in parts]), _int64(list(rows)),
        _int64(slots), _int64(tables), _int64(np.zeros((0, 2))),
        _int64(adapters) if any(adapters) else None,
    )  # fmt: skip


def _int64(values: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.ascontiguousarray(np.array(values, np.int64))
