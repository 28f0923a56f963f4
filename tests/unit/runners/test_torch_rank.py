"""A rank beside rank 0, from its end of the connection."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch

from llmserve.checkpoint import Checkpoint, save_model
from llmserve.runners.model_facts import fingerprint_of
from llmserve.runners.rank_messages import (
    Allocate,
    Command,
    Failed,
    Load,
    Loaded,
    Logits,
    Meet,
    encode,
    receive_event,
    step_of,
)
from llmserve.runners.rank_processes import RankProcess
from llmserve.runners.tensor_parallel import Rank
from llmserve.runners.torch_collectives import Collectives
from llmserve.runners.torch_rank import serve_rank
from support.batches import Share, make_batch
from support.ranks import in_threads
from support.variants import LLAMA, random_tensors


@pytest.fixture
def load(tmp_path: Path) -> Load:
    save_model(tmp_path / "model", LLAMA, random_tensors(LLAMA))
    return Load(
        folder=str(tmp_path / "model"), rank=1, count=2, dtype=None,
        cache_dtype="auto", device="cpu", threads=1,
        adapters={},
    )  # fmt: skip


def test_it_ends_when_rank_0_leaves_before_saying_anything() -> None:
    rank = in_threads(serve_rank)(1)
    rank.connection.close()
    assert rank.process.wait(5) == 0


def test_what_cannot_be_obeyed_ends_it_with_a_word(load: Load) -> None:
    assert last_words([Logits(3)]) == "a Load is due, not a Logits"
    assert last_words([load, load]) == "a second Load came"
    assert last_words([load, Allocate((-5,), 16)]).startswith("RuntimeError: ")


def last_words(commands: list[Command]) -> str:
    rank = in_threads(serve_rank)(1)
    with rank.connection as connection:
        connection.settimeout(10)
        connection.sendall(b"".join(map(encode, commands)))
        event = receive_event(connection)
        while not isinstance(event, Failed):
            event = receive_event(connection)
        assert rank.process.wait(5) == 1
    return event.message


def test_a_process_ends_with_its_leader_in_the_midst_of_a_collective(
    load: Load, tmp_path: Path
) -> None:
    """As when rank 0 is killed: its connection closes. Here the collective alone would wait on."""
    rank = RankProcess.start(1)
    rank.connection.settimeout(40)
    rank.connection.sendall(encode(load))
    loaded = receive_event(rank.connection)
    assert loaded == Loaded(fingerprint_of(Checkpoint.open(load.folder), []), loaded_bytes())
    rank.connection.sendall(encode(Meet(str(tmp_path / "ranks"), 40.0)))
    group = Collectives(Rank(0, 2), torch.device("cpu"), meeting=tmp_path / "ranks", timeout_s=40.0)
    batch = make_batch([Share(token_ids=[1, 2], tables=[[0]])], block_size=16)
    rank.connection.sendall(encode(Allocate((1,), 16)) + encode(step_of(batch)))
    group.sum(torch.zeros(2, 24))  # the embedding's; the first layer's is not taken part in
    rank.connection.shutdown(socket.SHUT_RDWR)
    assert rank.process.wait(5) == 0
    rank.connection.close()


def loaded_bytes() -> int:
    """Of a rank's part of `LLAMA`, in float32: half of all, but the vocabulary and the norms."""
    matrices = sum(
        tensor.size
        for name, tensor in random_tensors(LLAMA).items()
        if name.endswith("_proj.weight")
    )
    return 4 * (matrices // 2 + 34 * 24 + 5 * 24)
