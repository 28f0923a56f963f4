"""The operations that `bench kernels` times: which there are, at which sizes, and what each needs.

Linear layers, attention of decoding sequences and of a prompt, preparing, sampling. Attention is
without windows: they are mostly longer than the contexts here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from llmserve.config import ModelConfig

from .kernels_floors import Need, attention_need, linear_need, prepare_need, sampling_need
from .kernels_matrices import Matrix, Pool, cache_size
from .kernels_steps import (
    Machine,
    Runnable,
    attention,
    linears,
    prepares,
    sampling,
    sampling_rows,
)

__all__ = ["Operation", "least_pool_bytes", "operations_of"]

_CONTEXT_LEN = 192  # that a decoding sequence sees
_PROMPT_LEN = 512
_NUM_SEQS = (1, 8, 32)  # that decode; rows that are drawn
_NUM_PREPARES = 65
_NUM_DRAWS = 8
_MOST_OPERATIONS = 20_000_000_000
"""Multiply-adds of one timing, which take some tenths of a second. Where one copy takes so many
that they bind it, the time does not follow from whether the weights are in the cache."""
_LEAST_COPIES = 8
_CACHE_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One line of the table."""

    name: str
    num_rows: int
    """Rows, which for attention are queries."""
    copies: int
    """Weights or caches that take turns; 1: what it reads is not the model's."""
    need: Need
    time_s: Callable[[], float]
    """Runs it and says how many seconds it takes."""


def operations_of(
    machine: Machine, config: ModelConfig, matrices: Sequence[Matrix], pool: Pool,
    *, num_rows: Sequence[int], cache_dtype: str,
) -> list[Operation]:  # fmt: skip
    """All of a model's operations; `num_rows` are those of linear layers and preparing."""
    operations: list[Operation] = []
    for matrix in matrices:
        operations += _linears(machine, matrix, pool, num_rows)
    operations += _attentions(machine, config, pool, cache_dtype)
    for matrix in _prepared_apart(matrices):
        operations += _prepares(machine, config, matrix, pool, num_rows)
    operations += _samplings(machine, config.vocab_size)
    return operations


def least_pool_bytes(config: ModelConfig, matrices: Sequence[Matrix], cache_dtype: str) -> int:
    """Bytes that one copy of each matrix and cache needs."""
    tokens = max(_CONTEXT_LEN * _NUM_SEQS[-1], _PROMPT_LEN)
    # Kernels may read a little behind a cache: a second one lies there.
    cache = 2 * tokens * _token_bytes(config, cache_dtype)
    return max(cache, *(Pool.room_of(matrix.spec) for matrix in matrices))


def _linears(
    machine: Machine, matrix: Matrix, pool: Pool, num_rows: Sequence[int]
) -> Iterator[Operation]:
    copies = pool.copies(matrix.spec)
    runnables: dict[int, Runnable] = {}
    for count in num_rows:
        need = linear_need(copies[0], count)
        num_copies = _num_copies(len(copies), need)
        if num_copies not in runnables:
            runnables[num_copies] = linears(machine, matrix, copies[:num_copies])
        yield Operation(
            name=matrix.name,
            num_rows=count,
            copies=num_copies,
            need=need,
            time_s=partial(runnables[num_copies].seconds, [count]),
        )


def _num_copies(most: int, need: Need) -> int:
    """How many of the copies that there is room for are worked through in one timing."""
    return min(most, max(_LEAST_COPIES, _MOST_OPERATIONS // need.operations))


def _attentions(
    machine: Machine, config: ModelConfig, pool: Pool, cache_dtype: str
) -> Iterator[Operation]:
    token_bytes = _token_bytes(config, cache_dtype)
    context_len = min(_CONTEXT_LEN, config.max_seq_len)
    prompt_len = min(_PROMPT_LEN, config.max_seq_len)
    cases = [(f"attention, context {context_len}", n, 1, context_len) for n in _NUM_SEQS]
    cases.append((f"attention, prompt of {prompt_len}", 1, prompt_len, prompt_len))
    for name, num_seqs, num_queries, length in cases:
        need = attention_need(
            config, token_bytes, num_seqs=num_seqs, num_queries=num_queries, context_len=length
        )
        runnable = attention(
            machine, config, pool, cache_dtype=cache_dtype, token_bytes=token_bytes,
            context_len=length, num_seqs=num_seqs, most_layers=_num_copies(sys.maxsize, need),
        )  # fmt: skip
        yield Operation(
            name=name,
            num_rows=num_seqs * num_queries,
            copies=runnable.count,
            need=need,
            time_s=partial(runnable.seconds, [num_queries] * num_seqs, length),
        )


def _prepared_apart(matrices: Sequence[Matrix]) -> list[Matrix]:
    """The first matrix with a norm before it, if there is one, and the widest without."""
    with_norm = [matrix for matrix in matrices if matrix.has_norm]
    plain = [matrix for matrix in matrices if not matrix.has_norm]
    return [*with_norm[:1], max(plain, key=lambda matrix: matrix.spec.width)]


def _prepares(
    machine: Machine, config: ModelConfig, matrix: Matrix, pool: Pool, num_rows: Sequence[int]
) -> Iterator[Operation]:
    many, one = prepares(machine, config, matrix, pool, _NUM_PREPARES)
    linear = pool.copies(matrix.spec)[0]
    for count in num_rows:
        yield Operation(
            name=f"prepare for {matrix.name}",
            num_rows=count,
            copies=1,
            need=prepare_need(linear, count, has_norm=matrix.has_norm),
            time_s=partial(_difference, many, one, [count]),
        )


def _difference(many: Runnable, one: Runnable, lengths: list[int]) -> float:
    return many.seconds(lengths) - one.seconds(lengths)


def _samplings(machine: Machine, vocab_size: int) -> Iterator[Operation]:
    runnable = sampling(machine, vocab_size, _NUM_DRAWS)
    for name, temperature in (("sampling, greedy", 0.0), ("sampling, temperature 1", 1.0)):
        for count in _NUM_SEQS:
            need = sampling_need(
                vocab_size, count, is_greedy=temperature == 0.0, cache_bytes=cache_size()
            )
            rows = sampling_rows(count, temperature)
            yield Operation(
                name=name,
                num_rows=count,
                copies=1,
                need=need,
                time_s=partial(runnable.seconds, [1] * count, rows=rows),
            )


def _token_bytes(config: ModelConfig, cache_dtype: str) -> int:
    """Bytes of one token's keys and values in one layer."""
    scales = 2 * 4 * config.num_kv_heads if cache_dtype == "int8" else 0
    return 2 * config.kv_size * _CACHE_BYTES[cache_dtype] + scales
