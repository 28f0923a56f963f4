"""Operations on rows alone: norms, activations, embeddings."""

from __future__ import annotations

import numpy as np
import pytest

from llmserve.native.kernels import available_paths
from llmserve.native.program import Domain, Epilogue, Norm, Number, Program, WeightKind
from llmserve.native.reference.activations import activate, activation_error
from llmserve.native.reference.embed import embed
from llmserve.native.reference.norms import norm_error, norm_rows
from llmserve.native.weights import pad_vector
from llmserve.quant.dtypes import from_float32
from support.native_matrices import Layout, random_matrix
from support.native_programs import Part, inject, new_program, run_program, run_rows

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(not available_paths(), reason="the kernels are not built here"),
]

PATHS = available_paths()
WIDTHS = (8, 15, 48, 64, 172, 288, 300)


def random_norm(rng: np.random.Generator, width: int, kind: int, eps: float = 1e-5) -> Norm:
    weight = rng.normal(1.0, 0.3, width).astype(np.float32)
    bias = rng.normal(size=width).astype(np.float32) if kind == 2 else None
    return Norm(kind, pad_vector(weight), None if bias is None else pad_vector(bias), eps)


def random_rows(rng: np.random.Generator, width: int) -> np.ndarray:
    """Of several sizes, with a mean that is no zero; one of zeros, one of equal numbers."""
    rows = rng.normal(0.5, 1.0, (9, width)) * 10.0 ** np.arange(-4, 5)[:, None]
    rows[3], rows[5] = 0.0, 2.5
    return rows.astype(np.float32)


@pytest.mark.parametrize("kind", [1, 2], ids=["rms", "layer"])
@pytest.mark.parametrize("width", WIDTHS)
def test_norm_is_within_its_bound_and_the_same_on_every_path(width: int, kind: int) -> None:
    rng = np.random.default_rng(width)
    norm, rows = random_norm(rng, width, kind), random_rows(rng, width)

    def normalize(path: str) -> np.ndarray:
        program = new_program()
        asked = program.buffer(width, Domain.ROWS)
        program.gather(inject(program, rows), asked)
        program.norm(asked, width, norm)
        run = run_program(program, [Part(length=9)], path=path, rows=range(9))
        return run.buffer(asked, width)

    found = normalize(PATHS[0])
    assert (abs(found - norm_rows(rows, norm)) <= norm_error(rows, norm)).all()
    for path in PATHS[1:]:
        np.testing.assert_array_equal(normalize(path), found)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("width", WIDTHS)
def test_add_norm_adds_what_norm_gives(width: int, path: str) -> None:
    rng = np.random.default_rng(width)
    norm, rows, before = (
        random_norm(rng, width, 1),
        random_rows(rng, width),
        random_rows(rng, width),
    )
    program = new_program()
    source, out = inject(program, rows), inject(program, before)
    program.add_norm(source, out, width, norm)
    found = run_program(program, [Part(length=9)], path=path).buffer(out, width)
    wanted = before + norm_rows(rows, norm)
    bound = norm_error(rows, norm) + 2.0**-24 * abs(wanted)
    assert (abs(found - wanted) <= bound).all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("width", WIDTHS)
def test_product_of_a_norm_is_that_of_the_normalized_rows(width: int, path: str) -> None:
    """Norm, rounding to int8 and product in one go: the bits of one after another."""
    rng = np.random.default_rng(width)
    norm, rows = random_norm(rng, width, 1), random_rows(rng, width)
    layout = Layout(out=20, width=width, kind=WeightKind.INT8, group_size=min(32, width))
    matrix = random_matrix(layout, rng)

    def write(program: Program, source: int) -> int:
        slot = program.prepare(source, width, norm, matrix.packed)
        out = program.buffer(20)
        program.linear(slot, matrix.packed, Epilogue.STORE, out)
        return out

    program = new_program()
    asked = program.buffer(width, Domain.ROWS)
    program.gather(inject(program, rows), asked)
    program.norm(asked, width, norm)
    run = run_program(program, [Part(length=9)], path=path, rows=range(9))
    wanted = matrix.product(run.buffer(asked, width))
    np.testing.assert_array_equal(run_rows(rows, write, 20, path=path), wanted)


@pytest.mark.parametrize(
    "epilogue", [Epilogue.SWIGLU, Epilogue.GEGLU_TANH, Epilogue.GELU, Epilogue.GELU_TANH]
)
def test_activation_is_within_its_bound_and_the_same_on_every_path(epilogue: Epilogue) -> None:
    gates = np.concatenate([np.linspace(-100, 100, 4001), np.linspace(-8, 8, 4001), [0.0, -0.0]])
    gates = np.append(gates, [1e-20, -1e-20, 3e38, -3e37, 1e4, -1e4])[None].astype(np.float32)
    ups = np.random.default_rng(0).normal(size=gates.shape).astype(np.float32)
    width = gates.shape[1]

    def gate(path: str) -> np.ndarray:
        program = new_program()
        one, two, out = inject(program, gates), inject(program, ups), program.buffer(width)
        program.gate(one, two, out, epilogue)
        return run_program(program, [Part(length=1)], path=path).buffer(out, width)

    factors = ups if epilogue in (Epilogue.SWIGLU, Epilogue.GEGLU_TANH) else np.ones_like(ups)
    wanted = activate(gates, epilogue) * factors
    bound = activation_error(gates, epilogue) * abs(factors) + 2.0**-24 * abs(wanted)
    found = gate(PATHS[0])
    worst = (abs(found - wanted) - bound).argmax()
    assert (abs(found - wanted) <= bound).all(), (gates[0, worst], found[0, worst])
    for path in PATHS[1:]:
        np.testing.assert_array_equal(gate(path), found)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_embedding_has_the_bits_of_the_reference(dtype: str, path: str) -> None:
    rng = np.random.default_rng(0)
    numbers = rng.normal(size=(11, 24)).astype(np.float32) * 1e-4  # float16: some are subnormal
    numbers[3, :4] = [np.inf, -np.inf, np.nan, -0.0]
    table = from_float32(numbers, dtype)
    places = from_float32(rng.normal(size=(40, 24)).astype(np.float32), dtype)
    ids, first, count = [3, 0, 10, 3, 7, 7], 21, 6
    kind = {"float32": Number.FLOAT32, "bfloat16": Number.BFLOAT16, "float16": Number.FLOAT16}
    for position_table in (None, places):
        program = new_program()
        out = program.buffer(24)
        program.embed(
            out, table.data, kind[dtype], 24, scale=4.9,
            positions=None if position_table is None else position_table.data,
            position_kind=kind[dtype],
        )  # fmt: skip
        part = Part(length=count, first=first)
        found = run_program(program, [part], path=path, token_ids=ids).buffer(out, 24)
        positions = np.arange(first, first + count)
        wanted = embed(np.array(ids), table, 4.9, positions, position_table)
        np.testing.assert_array_equal(found, wanted)
