"""The team of threads: every item is done once, phases do not overlap, whoever does them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from llmserve.native.kernels import available_paths, load_kernels
from llmserve.native.program import Epilogue, Program, WeightKind
from support.native_matrices import Layout, random_matrix
from support.native_programs import Part, Run, inject, new_program, run_program

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(not available_paths(), reason="the kernels are not built here"),
]

PATH = available_paths()[0] if available_paths() else ""
NUM_PHASES = 40


class Chain:
    """A program of many small products, each of the one before: a phase begun too early, an item
    done twice or not at all, changes the end."""

    def __init__(self, num_rows: int) -> None:
        rng = np.random.default_rng(num_rows)
        self._rows = rng.normal(size=(num_rows, 64)).astype(np.float32)
        layout = Layout(out=64, width=64, kind=WeightKind.FLOAT32)
        self._matrices = [random_matrix(layout, rng).packed for _ in range(NUM_PHASES)]

    def program(self) -> tuple[Program, int]:
        """The program, and the buffer of its end: what stood there before is added to."""
        program = new_program()
        buffers = [inject(program, self._rows), inject(program, self._rows)]
        for index, packed in enumerate(self._matrices):
            source, target = buffers[index % 2], buffers[1 - index % 2]
            slot = program.prepare(source, 64, None, packed)
            program.linear(slot, packed, Epilogue.ADD, target)
            program.gate(target, target, target, Epilogue.GELU_TANH)
        return program, buffers[NUM_PHASES % 2]

    def start(self, threads: int) -> tuple[Run, int]:
        """After one step."""
        program, end = self.program()
        part = Part(length=len(self._rows))
        return run_program(program, [part], path=PATH, threads=threads), end

    def step(self, run: Run) -> None:
        """Once more with the same executor."""
        kernels = load_kernels()
        assert kernels is not None
        arrays: Any = run.kept[2]
        kernels.step(run.handle, *arrays[:5], (arrays[5:8],), arrays[8], 1, None, 1, b"")


@pytest.mark.parametrize("threads", [2, 3, 5])
@pytest.mark.parametrize("num_rows", [1, 7, 200])
def test_any_number_of_threads_gives_the_same_bits_step_after_step(
    num_rows: int, threads: int
) -> None:
    chain = Chain(num_rows)
    run, end = chain.start(1)
    wanted = run.buffer(end, 64)
    assert np.isfinite(wanted).all()
    run, end = chain.start(threads)
    for index in range(60):
        np.testing.assert_array_equal(run.buffer(end, 64), wanted)
        if index % 10 == 9:
            np.sort(np.random.default_rng(0).normal(size=20_000))  # long enough for all to sleep
        chain.step(run)


def test_executors_of_several_callers_do_not_disturb_each_other() -> None:
    chains = [Chain(num_rows) for num_rows in (1, 5, 33)]
    wanted = []
    for chain in chains:
        run, end = chain.start(1)
        wanted.append(run.buffer(end, 64))

    def work(index: int) -> bool:
        run, end = chains[index].start(2)
        for _ in range(20):
            chains[index].step(run)
        return np.array_equal(run.buffer(end, 64), wanted[index])

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(work, range(3)))


def test_a_team_ends_whether_or_not_it_worked() -> None:
    kernels = load_kernels()
    assert kernels is not None
    program, _ = Chain(2).program()
    for _ in range(20):
        kernels.new(PATH, 4, *program.tables())
    for _ in range(20):
        Chain(2).start(4)
