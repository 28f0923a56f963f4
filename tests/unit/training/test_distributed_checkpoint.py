"""Shards on disk: what is put together, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llmserve.errors import CheckpointError
from llmserve.model.weights import to_stored
from llmserve.tensor_file import write_tensors
from llmserve.training.distributed import ALONE
from llmserve.training.distributed_checkpoint import ShardedTensors, write_shards

WEIGHT = torch.arange(20.0).view(5, 4)
STEP = torch.tensor(7.0)


def write(folder: Path, *, rows: Any = ((0, 3), (3, 5)), **index: Any) -> Path:
    """Shards as two processes leave them: three rows and two, and what both have alike."""
    for rank, (first, last) in enumerate(((0, 3), (3, 5))):
        tensors = {"weight": WEIGHT[first:last]} | ({"step": STEP} if rank == 0 else {})
        write_tensors(folder / f"{rank}.safetensors", {n: to_stored(t) for n, t in tensors.items()})
    content = {
        "format": "llmserve-shards-1",
        "files": ["0.safetensors", "1.safetensors"],
        "tensors": {
            "weight": {"shape": [5, 4], "rows": rows},
            "step": {"shape": [], "rows": None},
        },
    }
    (folder / "shards.json").write_text(json.dumps(content | index))
    return folder


def test_rows_of_all_files_make_the_tensor(tmp_path: Path) -> None:
    shards = ShardedTensors(write(tmp_path))
    assert set(shards.names()) == {"weight", "step"}
    assert torch.equal(shards.whole("weight"), WEIGHT)
    assert torch.equal(shards.whole("step"), STEP)
    target = torch.empty(5, 4)
    shards.fill("weight", target, ALONE)
    assert torch.equal(target, WEIGHT)


def test_what_one_process_writes_is_read_back(tmp_path: Path) -> None:
    write_shards(tmp_path, {"weight": WEIGHT, "step": STEP}, ALONE)
    shards = ShardedTensors(tmp_path)
    assert torch.equal(shards.whole("weight"), WEIGHT)
    assert torch.equal(shards.whole("step"), STEP)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"format": "another"}, "not of the format"),
        ({"files": 3}, "no index of shards"),
        ({"tensors": {"weight": {"rows": None}}}, "no index of shards"),
        ({"tensors": {"weight": {"shape": [5, 4], "rows": [[0]]}}}, "no index of shards"),
        ({"files": ["0.safetensors", "2.safetensors"]}, r"2\.safetensors"),
    ],
)
def test_malformed_index_is_refused(tmp_path: Path, index: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        ShardedTensors(write(tmp_path, **index))


def test_files_are_looked_for_beside_the_index_alone(tmp_path: Path) -> None:
    write_tensors(tmp_path / "1.safetensors", {"weight": to_stored(WEIGHT)})
    (tmp_path / "inner").mkdir()
    index = {"files": ["0.safetensors", "../1.safetensors"]}
    assert torch.equal(ShardedTensors(write(tmp_path / "inner", **index)).whole("weight"), WEIGHT)


def test_rows_and_tensors_that_are_missing_are_named(tmp_path: Path) -> None:
    shards = ShardedTensors(write(tmp_path, rows=((0, 3), (3, 4))))
    with pytest.raises(CheckpointError, match="rows 0 to 5 of weight are missing"):
        shards.whole("weight")
    with pytest.raises(CheckpointError, match="no tensor bias"):
        shards.whole("bias")
    with pytest.raises(CheckpointError, match=r"not of the shape \[4, 4\]"):
        shards.fill("weight", torch.empty(4, 4), ALONE)
