"""Mixtures of experts and adapters: tokens that go through different matrices in one step."""

from __future__ import annotations

import numpy as np
import pytest

from llmserve.native.kernels import available_paths
from llmserve.native.lora import pack_float32
from llmserve.native.program import Domain, Epilogue, WeightKind
from llmserve.native.reference.experts import combine, route
from llmserve.native.reference.linear import float_linear
from support.native_matrices import Layout, random_matrix
from support.native_programs import Part, inject, new_program, run_program

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(not available_paths(), reason="the kernels are not built here"),
]

PATHS = available_paths()


@pytest.mark.parametrize("is_normalized", [True, False])
@pytest.mark.parametrize(("num_experts", "num_chosen"), [(1, 1), (4, 2), (5, 5), (17, 3)])
@pytest.mark.parametrize("kind", [WeightKind.FLOAT32, WeightKind.INT4])
def test_experts_are_chosen_and_summed_as_in_the_reference(
    kind: WeightKind, num_experts: int, num_chosen: int, is_normalized: bool
) -> None:
    rng = np.random.default_rng(num_experts)
    rows = rng.normal(size=(23, 24)).astype(np.float32)
    logits = rng.normal(0, 2, (23, num_experts)).astype(np.float32)
    logits[4] = 0.5  # of equals the lowest
    layout = Layout(out=20, width=24, kind=kind, group_size=8 if kind is WeightKind.INT4 else None)
    matrices = [random_matrix(layout, rng) for _ in range(num_experts)]

    def run(path: str, threads: int) -> np.ndarray:
        program = new_program(num_experts_per_token=num_chosen)
        source, router = inject(program, rows), inject(program, logits)
        routed = program.buffer(24, Domain.ROUTED)
        made, out = program.buffer(20, Domain.ROUTED), program.buffer(20)
        program.route(router, num_experts, is_normalized=is_normalized)
        program.dispatch(source, routed)
        packed = [matrix.packed for matrix in matrices]
        slot = program.prepare(routed, 24, None, packed[0], Domain.ROUTED)
        program.experts(slot, packed, Epilogue.STORE, made)
        program.combine(made, out)
        run = run_program(program, [Part(length=23)], path=path, threads=threads)
        return run.buffer(out, 20)

    chosen, weights = route(logits, num_chosen, is_normalized=is_normalized)
    assert chosen[4].tolist() == list(range(num_chosen))
    each = np.stack([matrix.product(rows) for matrix in matrices]).astype(np.float64)
    outputs = each[chosen, np.arange(23)[:, None]]
    found = run(PATHS[0], 1)
    bound = 3e-6 * combine(abs(outputs), weights)  # weights, and a product and a sum each
    assert (abs(found - combine(outputs, weights)) <= bound).all()
    for path in PATHS:
        for threads in (1, 3):
            np.testing.assert_array_equal(run(path, threads), found)


@pytest.mark.parametrize("path", PATHS)
def test_each_sequence_has_its_own_adapter_or_none(path: str) -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(20, 24)).astype(np.float32)
    pairs = [
        (
            rng.normal(size=(rank, 24)).astype(np.float32),
            rng.normal(size=(33, rank)).astype(np.float32),
        )
        for rank in (1, 8, 17)
    ]
    before = rng.normal(size=(20, 40)).astype(np.float32)
    parts = [
        Part(length=length, adapter_id=adapter)
        for length, adapter in [(3, 2), (1, 0), (9, 3), (1, 1), (6, 2)]
    ]
    program = new_program(num_adapters=4)
    source, out = inject(program, rows), inject(program, before)
    packed = [(pack_float32(a), pack_float32(b)) for a, b in pairs]
    slot = program.prepare(source, 24, None, packed[0][0])
    program.lora(slot, [*packed, None], out, column=7)
    found = run_program(program, parts, path=path, threads=2).buffer(out, 40)
    wanted, start = before.copy(), 0
    for part in parts:
        place = slice(start, start + part.length)
        start += part.length
        if part.adapter_id:
            a, b = pairs[part.adapter_id - 1]
            wanted[place, 7:] += float_linear(float_linear(rows[place], a), b)
    np.testing.assert_array_equal(found, wanted)
