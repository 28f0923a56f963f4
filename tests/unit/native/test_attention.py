"""Attention over a paged cache: near the reference's, the same bits however the work is shared."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmserve.native.kernels import available_paths
from llmserve.native.program import Number
from llmserve.native.reference.attention import Attention, attend
from llmserve.native.reference.cache import layer_bytes, stored
from support.native_programs import Cache, Part, inject, new_program, run_program

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(not available_paths(), reason="the kernels are not built here"),
]

PATHS = available_paths()
TYPICAL = 5e-6
"""Values are of some units; the bound is of the worst case, and rounding errors mostly cancel."""
KINDS = (Number.FLOAT32, Number.BFLOAT16, Number.INT8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One layer's attention; each sequence is (queries, tokens of context)."""

    heads: int
    kv_heads: int
    width: int
    sequences: tuple[tuple[int, int], ...]
    block_size: int = 16
    window: int = 0
    cap: float = 0.0


CASES = [
    Case(heads=4, kv_heads=2, width=8, sequences=((1, 1), (1, 17), (5, 5))),
    Case(heads=3, kv_heads=1, width=6, sequences=((7, 70), (1, 64), (1, 65))),
    Case(heads=2, kv_heads=2, width=48, sequences=((40, 40),), block_size=32),
    Case(heads=8, kv_heads=1, width=64, sequences=((1, 700), (1, 255)), cap=5.0),
    Case(heads=4, kv_heads=2, width=80, sequences=((33, 300),), window=100),
    Case(heads=6, kv_heads=3, width=128, sequences=((3, 520), (1, 257)), window=256),
    Case(heads=2, kv_heads=1, width=256, sequences=((9, 90), (1, 400)), block_size=48),
    Case(heads=64, kv_heads=1, width=16, sequences=((2, 60),), window=3, cap=2.0),
]


class Setting:
    """Random keys, values and queries of a case, in a cache of scattered blocks."""

    def __init__(self, case: Case, kind: Number) -> None:
        rng = np.random.default_rng(case.width)
        self.case, self.kind = case, kind
        size, shape = case.block_size, (case.kv_heads, case.width)
        needs = [-(-length // size) for _, length in case.sequences]
        order = rng.permutation(sum(needs) + 1).tolist()
        # What no sequence wrote, the end of its last block included, must not count.
        held = np.full((2, len(order), size, *shape), 1e30, np.float32)
        self.tables, self.keys, self.values = [], [], []
        for (_, length), need in zip(case.sequences, needs, strict=True):
            self.tables.append([order.pop() for _ in range(need)])
            pair = rng.normal(size=(2, length, *shape)).astype(np.float32)
            places = np.arange(length)
            blocks = np.array(self.tables[-1])[places // size]
            held[:, blocks, places % size] = pair
            self.keys.append(pair[0])
            self.values.append(pair[1])
        self.memory = np.append(layer_bytes(held[0], held[1], kind), np.zeros(256, np.uint8))
        self.queries = [
            rng.normal(size=(count, case.heads, case.width)).astype(np.float32)
            for count, _ in case.sequences
        ]

    def run(
        self, shares: list[tuple[int, int, int]], path: str, threads: int = 1
    ) -> list[np.ndarray]:
        """Attention of parts (sequence, first query, last query) in one step, [T, H, D] each."""
        case = self.case
        program = new_program(
            num_heads=case.heads, num_kv_heads=case.kv_heads, head_dim=case.width,
            windows=[case.window],
        )  # fmt: skip
        rows = np.concatenate([self.queries[s][a:b].reshape(b - a, -1) for s, a, b in shares])
        out = program.buffer(rows.shape[1])
        program.attend(inject(program, rows), 0, out, scale=case.width**-0.5, cap=case.cap)
        parts = []
        for s, a, b in shares:
            count, length = case.sequences[s]
            first = length - count + a
            parts.append(Part(length=b - a, first=first, table=self.tables[s]))
        cache = Cache(layers=[self.memory], kind=self.kind, block_size=case.block_size)
        run = run_program(program, parts, path=path, threads=threads, cache=cache)
        found = run.buffer(out, rows.shape[1]).reshape(-1, case.heads, case.width)
        return np.split(found, np.cumsum([b - a for _, a, b in shares])[:-1])

    def everything(self) -> list[tuple[int, int, int]]:
        """All queries of all sequences at once."""
        return [(s, 0, count) for s, (count, _) in enumerate(self.case.sequences)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name.lower())
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.heads}x{case.width}")
def test_outputs_are_near_the_reference_and_equal_on_every_path(case: Case, kind: Number) -> None:
    setting = Setting(case, kind)
    rules = Attention(scale=case.width**-0.5, cap=case.cap, window=case.window)
    found = setting.run(setting.everything(), PATHS[0])
    for sequence, one in enumerate(found):
        keys, values = stored(setting.keys[sequence], kind), stored(setting.values[sequence], kind)
        wanted, bound = attend(setting.queries[sequence], keys, values, rules)
        assert (abs(one - wanted) <= np.minimum(bound, TYPICAL)).all()
    for path in PATHS:
        for threads in (1, 2, 3):
            again = setting.run(setting.everything(), path, threads)
            np.testing.assert_array_equal(np.concatenate(again), np.concatenate(found))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_query_has_the_same_bits_alone_in_any_chunk_and_among_others(data: st.DataObject) -> None:
    case = data.draw(st.sampled_from(CASES))
    setting = Setting(case, data.draw(st.sampled_from(KINDS)))
    path = data.draw(st.sampled_from(PATHS))
    whole = setting.run(setting.everything(), path)
    shares = data.draw(st.permutations(setting.everything()))
    cut = []
    for sequence, first, last in shares:
        a = data.draw(st.integers(first, last - 1))
        b = data.draw(st.integers(a + 1, last))
        cut.append((sequence, a, b))
    cut = cut[: data.draw(st.integers(1, len(cut)))]
    found = setting.run(cut, path, data.draw(st.integers(1, 3)))
    for (sequence, a, b), one in zip(cut, found, strict=True):
        np.testing.assert_array_equal(one, whole[sequence][a:b])
