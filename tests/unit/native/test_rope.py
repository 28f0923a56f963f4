"""Queries and keys turned, keys and values stored: the bits of the reference in rows and memory."""

from __future__ import annotations

import numpy as np
import pytest

from llmserve.native.kernels import available_paths
from llmserve.native.program import Norm, Number
from llmserve.native.reference.cache import layer_bytes
from llmserve.native.reference.norms import norm_error, norm_rows
from llmserve.native.reference.rotary import rotate
from llmserve.native.weights import pad_vector
from support.native_programs import Cache, Part, inject, new_program, run_program

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(not available_paths(), reason="the kernels are not built here"),
]

PATHS = available_paths()
KINDS = (Number.FLOAT32, Number.BFLOAT16, Number.INT8)
SHAPES = [  # query heads, key heads, head size, rotated, block size
    (4, 2, 8, 8, 16),
    (3, 1, 6, 4, 16),
    (2, 2, 16, 0, 32),
    (6, 2, 48, 48, 16),
    (2, 1, 80, 32, 48),
    (4, 4, 128, 128, 16),
    (1, 1, 256, 256, 16),
]
PARTS = [
    Part(length=5, first=14, table=[4, 1]),
    Part(length=1, table=[2]),
    Part(length=17, table=[0, 3]),
]
NUM_BLOCKS = 5


def turned(
    qkv: np.ndarray, shape: tuple[int, ...], rotary: np.ndarray, norms: tuple[Norm, Norm] | None,
    path: str, kind: Number, threads: int,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Rows and cache memory after the operation."""
    heads, kv_heads, width, rotary_dim, block_size = shape
    program = new_program(num_heads=heads, num_kv_heads=kv_heads, head_dim=width)
    buffer = inject(program, qkv)
    program.rope(
        buffer, 0, rotary_dim=rotary_dim, table=0, is_whole_norm=False,
        query_norm=norms[0] if norms else None, key_norm=norms[1] if norms else None,
    )  # fmt: skip
    empty = np.zeros((NUM_BLOCKS, block_size, kv_heads, width), np.float32)
    memory = layer_bytes(empty, empty, kind)
    cache = Cache(layers=[memory], kind=kind, block_size=block_size)
    run = run_program(program, PARTS, path=path, threads=threads, cache=cache, rotary=rotary)
    return run.buffer(buffer, qkv.shape[1]), memory


def split(rows: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """Queries, keys and values, [T, heads, head size]."""
    heads, kv_heads, width = shape[:3]
    places = np.cumsum([heads * width, kv_heads * width])
    return tuple(part.reshape(len(rows), -1, width) for part in np.split(rows, places, axis=1))


def random_case(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    heads, kv_heads, width, rotary_dim, _ = shape
    rng = np.random.default_rng(width)
    count = sum(part.length for part in PARTS)
    qkv = rng.normal(size=(count, (heads + 2 * kv_heads) * width)).astype(np.float32)
    angles = rng.uniform(0, 7, (40, rotary_dim // 2))
    rotary = np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    return qkv, rotary


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_and_cache_have_the_bits_of_the_reference(shape: tuple[int, ...], path: str) -> None:
    qkv, rotary = random_case(shape)
    positions = np.concatenate([np.arange(p.first, p.first + p.length) for p in PARTS])
    queries, keys, values = split(qkv, shape)
    if shape[3]:
        queries, keys = rotate(queries, rotary[positions]), rotate(keys, rotary[positions])
    blocks = [p.table[at // shape[4]] for p in PARTS for at in range(p.first, p.first + p.length)]
    held = np.zeros((2, NUM_BLOCKS, shape[4], *keys.shape[1:]), np.float32)
    held[0][blocks, positions % shape[4]] = keys
    held[1][blocks, positions % shape[4]] = values
    wanted = np.concatenate([x.reshape(len(x), -1) for x in (queries, keys, values)], axis=1)
    for kind in KINDS:
        for threads in (1, 3):
            rows, memory = turned(qkv, shape, rotary, None, path, kind, threads)
            np.testing.assert_array_equal(rows, wanted)
            np.testing.assert_array_equal(memory, layer_bytes(held[0], held[1], kind))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_of_each_head_comes_before_the_turn(shape: tuple[int, ...], path: str) -> None:
    qkv, _ = random_case(shape)
    heads, kv_heads, width, _, block_size = shape
    still = (heads, kv_heads, width, 0, block_size)
    rng = np.random.default_rng(1)
    weights = rng.normal(1, 0.2, (2, width)).astype(np.float32)
    norms = tuple(Norm(1, pad_vector(weight), None, 1e-6) for weight in weights)
    rows, _ = turned(qkv, still, np.zeros((40, 0), np.float32), norms, path, Number.FLOAT32, 1)
    for before, after, norm in zip(
        split(qkv, shape)[:2], split(rows, shape)[:2], norms, strict=True
    ):
        flat = before.reshape(-1, width)
        wrong = abs(after.reshape(-1, width) - norm_rows(flat, norm))
        assert (wrong <= norm_error(flat, norm)).all()
    np.testing.assert_array_equal(split(rows, shape)[2], split(qkv, shape)[2])
