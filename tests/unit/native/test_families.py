"""Every variant of the model on the native runner: as torch computes it, with adapters too, and the
same bits on every instruction set and with any number of threads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from llmserve.adapters import Adapter
from llmserve.checkpoint import Checkpoint, save_model
from llmserve.native.kernels import available_paths
from llmserve.runners.cache_groups import group_layers
from llmserve.runners.native_options import NativeOptions
from llmserve.runners.native_runner import NativeRunner
from llmserve.runners.protocol import Runner
from support.adapters import random_adapter
from support.batches import Share, make_batch, make_row
from support.variants import VARIANTS, random_tensors

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(not available_paths(), reason="the kernels are not built here"),
]

NAMES = [name for name, config in VARIANTS.items() if config.head is None]
CLOSE = 1e-4
"""Largest difference of a log-probability: float32 sums in another order."""
LENGTHS = (40, 7)

Floats = npt.NDArray[np.float64]


def logprobs(runner: Runner, config: Any, *, has_adapter: bool) -> Floats:
    """Log-probabilities after two prompts and one more token of the first, [3, V]."""
    num_groups = len(group_layers(config))
    runner.allocate_cache((8,) * num_groups, 16)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, config.vocab_size, length).tolist() for length in LENGTHS]
    tables = [[1, 2, 3], [5]]
    steps = [
        [
            Share(
                token_ids=ids,
                tables=[table] * num_groups,
                rows=[make_row(ids, logprobs=config.vocab_size)],
                adapter_id=int(has_adapter and index == 0),
            )
            for index, (ids, table) in enumerate(zip(prompts, tables, strict=True))
        ],
        [
            Share(
                token_ids=[7],
                first=LENGTHS[0],
                tables=[tables[0]] * num_groups,
                rows=[make_row([*prompts[0], 7], logprobs=config.vocab_size)],
                adapter_id=int(has_adapter),
            )
        ],
    ]
    rows: list[list[float]] = []
    for shares in steps:
        runner.submit(make_batch(shares, block_size=16))
        found = runner.collect().logprobs
        assert found is not None
        rows += [[value for _, value in sorted(entry.top)] for entry in found if entry]
    return np.array(rows)


@pytest.fixture(params=NAMES)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Checkpoint:
    config = VARIANTS[request.param]
    save_model(tmp_path / "model", config, random_tensors(config))
    return Checkpoint.open(tmp_path / "model")


def adapters_for(checkpoint: Checkpoint) -> list[list[Adapter]]:
    """Without, and with one where the model takes one."""
    config = checkpoint.config
    return [[]] if config.experts else [[], [random_adapter(config)]]


def test_logprobs_are_those_of_torch_on_every_path(checkpoint: Checkpoint) -> None:
    from llmserve.runners.torch_runner import TorchRunner

    for adapters in adapters_for(checkpoint):
        has_adapter = bool(adapters)
        torch = TorchRunner(checkpoint, dtype="float32", adapters=adapters)
        wanted = logprobs(torch, checkpoint.config, has_adapter=has_adapter)
        found = [
            logprobs(
                NativeRunner(
                    checkpoint,
                    NativeOptions(instruction_set=path),  # type: ignore[arg-type]
                    dtype="float32",
                    threads=threads,
                    adapters=adapters,
                ),
                checkpoint.config,
                has_adapter=has_adapter,
            )
            for path in available_paths()
            for threads in (1, 3)
        ]
        np.testing.assert_allclose(found[0], wanted, atol=CLOSE)
        for other in found[1:]:
            np.testing.assert_array_equal(other, found[0])


@pytest.mark.parametrize("cache_dtype", ["bfloat16", "int8"])
def test_cache_types_stay_near_and_paths_agree(checkpoint: Checkpoint, cache_dtype: str) -> None:
    exact = logprobs(
        NativeRunner(checkpoint, dtype="float32"), checkpoint.config, has_adapter=False
    )
    found = [
        logprobs(
            NativeRunner(
                checkpoint,
                NativeOptions(instruction_set=path, cache_dtype=cache_dtype),  # type: ignore[arg-type]
                dtype="float32",
            ),
            checkpoint.config,
            has_adapter=False,
        )
        for path in available_paths()
    ]
    # Keys and values are of some units here: 1 part in 127 of them moves scores by tenths.
    assert 0 < np.abs(found[0] - exact).max() < 1.5
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])
