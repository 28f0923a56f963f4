"""Models that score texts or make vectors of them: what torch makes of the same hidden states."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from llmserve.checkpoint import Checkpoint, save_model
from llmserve.config import Head
from llmserve.native.kernels import available_paths
from llmserve.runners.native_options import NativeOptions
from llmserve.runners.native_runner import NativeRunner
from llmserve.runners.protocol import HeadRows, Runner
from llmserve.runners.torch_runner import TorchRunner
from support.batches import Share, make_batch
from support.variants import LLAMA, random_tensors

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(not available_paths(), reason="the kernels are not built here"),
]

HEADS = [
    Head(kind="sequence", labels=("ham", "spam", "other")),
    Head(kind="token", labels=("a", "b")),
    Head(kind="span", labels=("start", "end")),
    Head(kind="embedding"),
]


def scores(runner: Runner) -> list[np.ndarray]:
    """Of two texts in one step: of all tokens of the first, of the last of the second."""
    runner.allocate_cache((8,) * len(runner.info.cache_groups), 16)
    texts = [[3, 1, 4, 1, 5, 9], [2, 6, 5]]
    groups = len(runner.info.cache_groups)
    shares = [Share(token_ids=ids, tables=[[index]] * groups) for index, ids in enumerate(texts)]
    batch = make_batch(shares, block_size=16)
    batch.head_rows = [HeadRows(start=0, stop=6), HeadRows(start=8, stop=9)]
    runner.submit(batch)
    return [np.array(rows, np.float32) for rows in runner.collect().head_scores]


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.kind)
def test_scores_are_those_of_torch_on_every_path(head: Head, tmp_path: Path) -> None:
    config = dataclasses.replace(LLAMA, head=head)
    save_model(tmp_path / "model", config, random_tensors(config))
    checkpoint = Checkpoint.open(tmp_path / "model")
    wanted = scores(TorchRunner(checkpoint))
    width = len(head.labels) or LLAMA.hidden_size
    assert [rows.shape for rows in wanted] == [(6, width), (1, width)]
    found = {}
    for path in available_paths():
        runner = NativeRunner(checkpoint, NativeOptions(instruction_set=path), threads=2)
        assert (runner.info.head, runner.info.labels) == (head.kind, head.labels)
        found[path] = scores(runner)
        for one, other in zip(found[path], wanted, strict=True):
            np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-5)
    for rows in found.values():
        for one, other in zip(rows, found[available_paths()[0]], strict=True):
            np.testing.assert_array_equal(one, other)
