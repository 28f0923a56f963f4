"""How a process of a shared run joins and leaves it."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist

from llmserve.errors import ConfigError
from llmserve.training.distributed import ALONE, Processes, join_processes
from support.training_runs import run_as_processes


def test_one_of_several_ends_at_once_with_its_status() -> None:
    def leave(processes: Processes) -> None:
        processes.wait()  # else one may be gone while the other still connects to it
        processes.leave(7)

    statuses = run_as_processes(2, leave)
    assert [os.waitstatus_to_exitcode(status) for status in statuses] == [7, 7]


def test_it_knows_when_its_parent_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    with_parent = Processes(parent=os.getppid())
    assert not with_parent.is_left_alone
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert with_parent.is_left_alone
    assert not ALONE.is_left_alone  # nohup's business


@pytest.mark.parametrize("status", [0, 3])
def test_alone_it_goes_on(status: int) -> None:
    assert ALONE.leave(status) == status


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_tensors_go_over_gloo_and_those_of_gpus_over_nccl(
    monkeypatch: pytest.MonkeyPatch, device: Any
) -> None:
    asked: list[Any] = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", asked.append)
    monkeypatch.setattr(dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(dist, "init_process_group", lambda *a, **named: asked.append((a, named)))
    monkeypatch.setattr(dist, "get_rank", lambda: 3)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: asked.append("left"))
    with join_processes(device) as processes:
        assert processes == Processes(rank=3, count=4, local_rank=1, parent=os.getppid())
    own = torch.device("cuda", 1)
    on_gpus = [own, (("cpu:gloo,cuda:nccl",), {"device_id": own}), "left"]
    assert asked == (on_gpus if device == "cuda" else [(("gloo",), {}), "left"])


def test_more_processes_than_gpus_are_refused_before_they_meet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(dist, "is_torchelastic_launched", lambda: True)
    with pytest.raises(ConfigError, match="finds 1 GPUs"), join_processes("cuda"):
        pass
