"""A million random operations on engines of every shape, each followed by `check()`.

`LLMSERVE_SOAK_SEED` begins elsewhere; a failure prints the life's seed, which repeats it alone:
`EngineLife.random(seed, num_operations=100).drain()`.
"""

from __future__ import annotations

import os

import pytest

from support.engine_life import EngineLife

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]

NUM_OPERATIONS = 1_000_000
PER_LIFE = 100


def test_a_million_operations() -> None:
    first = int(os.environ.get("LLMSERVE_SOAK_SEED", "0"))
    for seed in range(first, first + NUM_OPERATIONS // PER_LIFE):
        try:
            EngineLife.random(seed, num_operations=PER_LIFE).drain()
        except AssertionError as error:
            raise AssertionError(f"the life of seed {seed}: {error}") from error
