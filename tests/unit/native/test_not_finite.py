"""NaN and infinities reach their own sequence's logits, wherever they arise, and nobody else's."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from llmserve.checkpoint import Checkpoint
from llmserve.native.kernels import available_paths
from llmserve.runners.native_options import NativeOptions
from llmserve.runners.native_runner import NativeRunner
from support.native_models import FORMS, Chunk, make_forms, run_chunks
from support.variants import LLAMA, random_tensors

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(not available_paths(), reason="the kernels are not built here"),
]

CONFIG = dataclasses.replace(LLAMA, tie_word_embeddings=False, hidden_size=48, intermediate_size=80)
BAD = {11: np.nan, 12: np.inf, 13: -np.inf}
"""Token whose embedding holds the value in one place."""
SICK = [20, 21, 22, 23, 0, 24, 25]  # the 0 becomes the bad token
HEALTHY = [30, 31, 32, 33, 34]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    tensors = random_tensors(CONFIG)
    for token, value in BAD.items():
        tensors["model.embed_tokens.weight"][token, token] = value
    return make_forms(tmp_path_factory.mktemp("forms"), CONFIG, tensors)


@pytest.mark.parametrize("path", available_paths())
@pytest.mark.parametrize("cache", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("form", FORMS)
def test_what_is_not_finite_stays_in_its_sequence(
    checkpoints: dict[str, Checkpoint], form: str, cache: str, path: str
) -> None:
    options: dict[str, Any] = {"cache_dtype": cache, "instruction_set": path}
    runner = NativeRunner(checkpoints[form], NativeOptions(**options), threads=2)

    def run(ids: list[int], steps: list[list[Chunk]]) -> list[np.ndarray]:
        return run_chunks(runner, CONFIG, [ids, HEALTHY], steps)

    (alone,) = run(HEALTHY, [[Chunk(1, 0, 5)]])[1:]
    assert np.isfinite(alone).all()
    for token in BAD:
        ids = [token if one == 0 else one for one in SICK]
        together = [Chunk(0, 0, 5), Chunk(1, 0, 3)], [Chunk(1, 3, 5), Chunk(0, 5, 7)]
        sick, healthy = run(ids, [list(step) for step in together])
        np.testing.assert_array_equal(healthy, alone)
        assert np.isnan(sick[4:]).all()
        before = run(ids, [[Chunk(0, 0, 4)]])[0]
        np.testing.assert_array_equal(sick[:4], before)
        assert np.isfinite(before).all()


@pytest.mark.parametrize("path", available_paths())
def test_a_block_that_held_nan_serves_the_next_sequence(
    checkpoints: dict[str, Checkpoint], path: str
) -> None:
    """What is left behind in a block beyond a sequence's end does not count."""
    for form in FORMS:
        options = NativeOptions(instruction_set=path)  # type: ignore[arg-type]
        runner = NativeRunner(checkpoints[form], options, threads=1)
        (alone,) = run_chunks(runner, CONFIG, [HEALTHY], [[Chunk(0, 0, 5)]])
        bad = [11] * 16
        steps = [[Chunk(0, 0, 16)], [Chunk(1, 0, 5)]]
        found = run_chunks(runner, CONFIG, [bad, HEALTHY], steps, first_blocks=[0, 0])[1]
        np.testing.assert_array_equal(found, alone)
