"""A token's logits do not know what is beside it, how its prompt was cut, nor who computed it.

The engine's side of this is tests/property/test_exactness.py; here are long contexts, windows,
every type of cache, and every token of a prompt, bit for bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmserve.checkpoint import Checkpoint
from llmserve.native.kernels import available_paths
from llmserve.runners.native_options import NativeOptions
from llmserve.runners.native_runner import NativeRunner
from support.native_models import FORMS, LONG, Chunk, make_forms, run_chunks

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(not available_paths(), reason="the kernels are not built here"),
]

PATHS = available_paths()
CACHES = ("float32", "bfloat16", "int8")
LENGTH = 600  # three partitions of attention, the last of them cut by the window
NEIGHBOURS = (1, 40, 90)


def random_sequences() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, LONG.vocab_size, length).tolist() for length in (LENGTH, *NEIGHBOURS)]


SEQUENCES = random_sequences()


def make_runner(checkpoint: Checkpoint, cache: str, path: str, threads: int) -> NativeRunner:
    options: dict[str, Any] = {"cache_dtype": cache, "instruction_set": path}
    return NativeRunner(checkpoint, NativeOptions(**options), threads=threads)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    return make_forms(tmp_path_factory.mktemp("forms"), LONG)


@pytest.fixture(scope="module")
def alone(checkpoints: dict[str, Checkpoint]) -> dict[tuple[str, str, str], np.ndarray]:
    """Each form's logits of the long prompt, by itself in one piece on one thread; on each path
    that rounds its own way."""
    return {
        (form, cache, path): run_chunks(
            make_runner(checkpoints[form], cache, path, 1),
            LONG,
            SEQUENCES[:1],
            [[Chunk(0, 0, LENGTH)]],
        )[0]
        for form in FORMS
        for cache in CACHES
        for path in {rounding_path(form, path) for path in PATHS}
    }


def rounding_path(form: str, path: str) -> str:
    """The first path that gives the bits of `path`: the matrix unit rounds bfloat16 its own way."""
    is_own = form == "bfloat16" and path == "amx"
    return path if is_own else next(one for one in PATHS if form != "bfloat16" or one != "amx")


def cuts(length: int) -> st.SearchStrategy[list[int]]:
    """Ends of a prompt's chunks, the last of them its own."""
    inner = st.lists(st.integers(1, length - 1), max_size=4, unique=True)
    return inner.map(lambda places: [*sorted(places), length])


@st.composite
def timetables(draw: st.DrawFn) -> list[list[Chunk]]:
    """Steps of the long prompt, its last tokens one by one, with pieces of others between."""
    singles = draw(st.integers(0, 3))
    ends = [*draw(cuts(LENGTH - singles)), *range(LENGTH - singles + 1, LENGTH + 1)]
    steps, first, done = [], 0, [0] * (len(NEIGHBOURS) + 1)
    for end in ends:
        chunks = [Chunk(0, first, end)]
        first = end
        for other in draw(st.sets(st.integers(1, len(NEIGHBOURS)))):
            left = len(SEQUENCES[other]) - done[other]
            if left:
                count = draw(st.integers(1, left))
                chunks.append(Chunk(other, done[other], done[other] + count))
                done[other] += count
        steps.append(draw(st.permutations(chunks)))
    return steps


@settings(max_examples=40, deadline=None)
@given(
    form=st.sampled_from(FORMS),
    cache=st.sampled_from(CACHES),
    path=st.sampled_from(PATHS),
    threads=st.integers(1, 3),
    steps=timetables(),
)
def test_every_token_has_the_same_bits_in_every_timetable(
    checkpoints: dict[str, Checkpoint],
    alone: dict[tuple[str, str, str], np.ndarray],
    form: str,
    cache: str,
    path: str,
    threads: int,
    steps: list[list[Chunk]],
) -> None:
    runner = make_runner(checkpoints[form], cache, path, threads)
    found = run_chunks(runner, LONG, SEQUENCES, steps)[0]
    np.testing.assert_array_equal(found, alone[form, cache, rounding_path(form, path)])


def test_forms_and_caches_differ(alone: dict[tuple[str, str, str], np.ndarray]) -> None:
    """The comparison above would prove little if all were executed alike."""
    kinds = list(alone.values())
    assert all(np.isfinite(one).all() for one in kinds)
    assert not any(
        np.array_equal(one, two) for i, one in enumerate(kinds) for two in kinds[i + 1 :]
    )


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("form", ["int4", "int8"])
def test_integer_weights_times_floats_are_independent_too(
    checkpoints: dict[str, Checkpoint], form: str, path: str
) -> None:
    ids = [SEQUENCES[3][:30], SEQUENCES[2]]
    options: dict[str, Any] = {"activations": "float32", "head_weights": "float"}
    found = []
    for name, steps in [
        (PATHS[0], [[Chunk(0, 0, 30)]]),
        (path, [[Chunk(1, 0, 40), Chunk(0, 0, 11)], [Chunk(0, 11, 29)], [Chunk(0, 29, 30)]]),
    ]:
        chosen = NativeOptions(instruction_set=name, **options)  # type: ignore[arg-type]
        runner = NativeRunner(checkpoints[form], chosen, threads=2)
        found.append(run_chunks(runner, LONG, ids, steps)[0])
    np.testing.assert_array_equal(found[1], found[0])
