"""Products of every layout and shape: the bits of the reference, on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmserve.native.kernels import available_paths
from llmserve.native.program import Epilogue, Number, PackedLinear, Program, WeightKind
from llmserve.native.reference.activations import (
    activate,
    activation_error,
    soft_cap,
    soft_cap_error,
)
from llmserve.native.reference.quantize import quantize_rows
from support.native_matrices import Layout, Matrix, random_matrix, rounds_alike
from support.native_programs import run_rows

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(not available_paths(), reason="the kernels are not built here"),
]

U = 2.0**-24
WIDTHS = (8, 48, 172, 288, 300)
GROUPS = (None, 4, 16, 32, 43, 64, 96, 128)
"""43 does not divide all of the widths: the last group is shorter."""


def layouts(kind: WeightKind) -> list[Layout]:
    """Every width and group size, each with other outputs and other extras."""
    outs = iter([1, 7, 16, 17, 32, 33, 48, 67, 96] * 14)
    if kind in (WeightKind.FLOAT32, WeightKind.BFLOAT16):
        return [
            Layout(out=out, width=width, kind=kind, has_bias=out % 2 == 0)
            for width in (*WIDTHS, 1, 7)
            for out in (next(outs), next(outs))
        ]
    found = []
    for width in WIDTHS:
        for index, group in enumerate(size for size in GROUPS if (size or 0) <= width):
            out = next(outs)
            found.append(
                Layout(
                    out=out,
                    width=width,
                    kind=kind,
                    group_size=group,
                    scale_kind=Number.BFLOAT16 if (out + index) % 2 else Number.FLOAT32,
                    has_zeros=index % 3 == 1,
                    has_order=index % 4 == 2,
                    has_bias=index % 3 == 0,
                )
            )
    return found


def multiply(
    rows: np.ndarray, linear: PackedLinear, path: str, *, threads: int = 1,
    epilogue: Epilogue = Epilogue.STORE, cap: float = 0.0,
) -> np.ndarray:  # fmt: skip
    def write(program: Program, source: int) -> int:
        out = program.buffer(linear.out)
        slot = program.prepare(source, linear.width, None, linear)
        program.linear(slot, linear, epilogue, out, cap=cap)
        return out

    return run_rows(rows, write, linear.out, path=path, threads=threads)


def random_rows(rng: np.random.Generator, count: int, width: int) -> np.ndarray:
    """Rows of very different sizes, one of zeros."""
    rows = rng.normal(size=(count, width)) * 10.0 ** rng.integers(-3, 4, (count, 1))
    rows[count // 2] *= count % 2
    return rows.astype(np.float32)


@pytest.mark.parametrize("path", available_paths())
@pytest.mark.parametrize("kind", list(WeightKind), ids=lambda kind: kind.name.lower())
def test_products_are_those_of_the_reference(kind: WeightKind, path: str) -> None:
    rng = np.random.default_rng(0)
    counts = iter([1, 2, 3, 5, 6, 7, 12, 13, 31, 70] * 14)
    for layout in layouts(kind):
        matrix = random_matrix(layout, rng)
        rows = random_rows(rng, next(counts), layout.width)
        found = multiply(rows, matrix.packed, path)
        if rounds_alike(kind, path):
            np.testing.assert_array_equal(found, matrix.product(rows), err_msg=str(layout))
        else:
            assert_near_in_parts(found, matrix, rows)


def assert_near_in_parts(found: np.ndarray, matrix: Matrix, rows: np.ndarray) -> None:
    """The bound in linear_amx.h."""
    weight = matrix.values.astype(np.float64)
    exact, magnitude = rows @ weight.T, abs(rows) @ abs(weight).T
    if matrix.packed.bias is not None:
        bias = matrix.packed.bias[: matrix.layout.out]
        exact, magnitude = exact + bias, magnitude + abs(bias)
    bound = (2.0**-18 + (matrix.layout.width + 4) * U) * magnitude
    assert (abs(found - exact) <= bound).all(), matrix.layout


@pytest.mark.parametrize("path", available_paths())
@pytest.mark.parametrize("has_zeros", [False, True], ids=["middle", "zeros"])
@pytest.mark.parametrize("group", [32, 64, 96, 1024, None])
def test_long_rows_go_on_where_a_part_of_their_weights_ended(
    group: int | None, has_zeros: bool, path: str
) -> None:
    """More inputs than a kernel makes ready at a time, rows of more than one tile and of a rest."""
    rng = np.random.default_rng(6)
    layout = Layout(
        out=48, width=1120, kind=WeightKind.INT4, group_size=group, has_zeros=has_zeros,
        has_bias=True,
    )  # fmt: skip
    matrix = random_matrix(layout, rng)
    for count in (15, 16, 39):
        rows = random_rows(rng, count, layout.width)
        np.testing.assert_array_equal(multiply(rows, matrix.packed, path), matrix.product(rows))


@pytest.mark.parametrize("path", available_paths())
@pytest.mark.parametrize("kind", [WeightKind.INT4, WeightKind.INT8], ids=["int4", "int8"])
def test_products_with_float_rows_are_those_of_the_reference(kind: WeightKind, path: str) -> None:
    rng = np.random.default_rng(1)
    for width, group, out, count in [(8, 4, 17, 1), (48, None, 33, 7), (172, 43, 16, 3)]:
        layout = Layout(
            out=out, width=width, kind=kind, group_size=group, has_float_rows=True,
            has_zeros=group is not None, has_bias=True,
        )  # fmt: skip
        matrix = random_matrix(layout, rng)
        rows = random_rows(rng, count, width)
        found = multiply(rows, matrix.packed, path)
        np.testing.assert_array_equal(found, matrix.product(rows), err_msg=str(layout))


def exact_product(matrix: Matrix, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The product in float64 of the numbers as stored, and the sum of its magnitudes."""
    weight = matrix.values.astype(np.float64)
    if matrix.scales is not None:
        size = matrix.layout.size
        wide = np.repeat(matrix.scales, size, axis=1)[:, : matrix.layout.width]
        weight = weight * wide
        rows = quantize_rows(rows, size, matrix.layout.num_digits).dequantize(size)
    wide_rows = rows.astype(np.float64)
    return wide_rows @ weight.T, abs(wide_rows) @ abs(weight).T


@pytest.mark.parametrize("kind", list(WeightKind), ids=lambda kind: kind.name.lower())
def test_products_are_near_the_exact_ones(kind: WeightKind) -> None:
    """The bounds in the reference's docstrings; those of integers are far under `width * U`."""
    rng = np.random.default_rng(2)
    is_integer = kind in (WeightKind.INT4, WeightKind.INT8)
    for width in WIDTHS:
        group = 8 if is_integer else None
        matrix = random_matrix(Layout(out=20, width=width, kind=kind, group_size=group), rng)
        rows = random_rows(rng, 9, width)
        exact, magnitude = exact_product(matrix, rows)
        # Products of rounded scales, made float32 in `dequantize`: one rounding more.
        steps = -(-width // 8) + 3 if is_integer else 1.01 * width
        found = multiply(rows, matrix.packed, "portable")
        assert (abs(found - exact) <= steps * U * magnitude).all()


@pytest.mark.parametrize("path", available_paths())
@pytest.mark.parametrize("epilogue", [Epilogue.GELU, Epilogue.GELU_TANH])
def test_activation_of_a_product(path: str, epilogue: Epilogue) -> None:
    rng = np.random.default_rng(3)
    matrix = random_matrix(Layout(out=40, width=24, kind=WeightKind.FLOAT32, has_bias=True), rng)
    rows = random_rows(rng, 5, 24)
    product = matrix.product(rows)
    found = multiply(rows, matrix.packed, path, epilogue=epilogue)
    assert (abs(found - activate(product, epilogue)) <= activation_error(product, epilogue)).all()


@pytest.mark.parametrize("path", available_paths())
def test_soft_cap_of_a_product(path: str) -> None:
    rng = np.random.default_rng(4)
    matrix = random_matrix(Layout(out=19, width=24, kind=WeightKind.FLOAT32), rng)
    rows = random_rows(rng, 5, 24)
    found = multiply(rows, matrix.packed, path, cap=30.0)
    wanted = soft_cap(matrix.product(rows), 30.0)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=soft_cap_error(30.0))


@pytest.mark.parametrize("path", available_paths())
def test_product_is_added_from_a_column_on(path: str) -> None:
    rng = np.random.default_rng(5)
    matrix = random_matrix(Layout(out=32, width=48, kind=WeightKind.INT4, group_size=16), rng)
    rows = random_rows(rng, 4, 48)

    def write(program: Program, source: int) -> int:
        slot = program.prepare(source, 48, None, matrix.packed)
        program.linear(slot, matrix.packed, Epilogue.ADD, source, column=16)
        return source

    found = run_rows(rows, write, 48, path=path)
    wanted = rows.copy()
    wanted[:, 16:] += matrix.product(rows)
    np.testing.assert_array_equal(found, wanted)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(list(WeightKind)),
    width=st.integers(1, 320),
    out=st.integers(1, 100),
    count=st.integers(1, 70),
    group=st.integers(1, 80),
    threads=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_any_shape_gives_the_same_bits_on_every_path_and_number_of_threads(
    kind: WeightKind, width: int, out: int, count: int, group: int, threads: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    is_integer = kind in (WeightKind.INT4, WeightKind.INT8)
    size = min(group, width) if is_integer else None
    matrix = random_matrix(Layout(out=out, width=width, kind=kind, group_size=size), rng)
    rows = random_rows(rng, count, width)
    wanted = multiply(rows, matrix.packed, "portable")
    for path in available_paths():
        found = multiply(rows, matrix.packed, path, threads=threads)
        if rounds_alike(kind, path):
            np.testing.assert_array_equal(found, wanted)
        alone = multiply(rows[-1:], matrix.packed, path)
        np.testing.assert_array_equal(alone[0], found[-1])
