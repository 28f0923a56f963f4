"""What ranks say to each other, between threads of this process."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import psutil
import pytest
import torch

from llmserve.errors import EngineError
from llmserve.runners.tensor_parallel import Rank
from llmserve.runners.torch_collectives import Collectives

CPU = torch.device("cpu")
T = TypeVar("T")


def together(folder: Path, count: int, work: Callable[[Collectives], T]) -> list[T]:
    """What `work` gives on each of `count` ranks."""

    def join(index: int) -> T:
        group = Collectives(Rank(index, count), CPU, meeting=folder / "ranks", timeout_s=10.0)
        return work(group)

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(join, range(count)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_and_copies_are_the_same_on_all(tmp_path: Path, dtype: torch.dtype) -> None:
    def work(group: Collectives) -> tuple[torch.Tensor, torch.Tensor]:
        own = torch.arange(6, dtype=dtype).view(2, 3) * (group.rank.index + 1)
        return group.sum(own.clone()), group.from_first(own.t())

    for total, copy in together(tmp_path, 3, work):
        assert torch.equal(total, 6 * torch.arange(6, dtype=dtype).view(2, 3))
        assert torch.equal(copy, torch.arange(6, dtype=dtype).view(2, 3).t())


def test_parts_are_joined_on_rank_0_in_the_order_of_ranks(tmp_path: Path) -> None:
    def work(group: Collectives) -> torch.Tensor:
        return group.joined(torch.full((2, 1), float(group.rank.index)))

    first, *others = together(tmp_path, 3, work)
    assert first.tolist() == [[0.0, 1.0, 2.0]] * 2
    assert [other.tolist() for other in others] == [[[1.0]] * 2, [[2.0]] * 2]


def test_nothing_outside_the_machine_can_connect(tmp_path: Path) -> None:
    def work(group: Collectives) -> list[str]:
        group.sum(torch.zeros(1))  # both are there, and nobody has left
        found = [one for one in psutil.Process().net_connections("tcp") if one.status == "LISTEN"]
        group.sum(torch.zeros(1))
        return [one.laddr.ip for one in found]

    addresses = together(tmp_path, 2, work)[0]
    assert addresses
    assert set(addresses) == {"127.0.0.1"}


def test_who_does_not_come_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="another rank of the model is gone or hangs"):
        Collectives(Rank(0, 2), CPU, meeting=tmp_path / "ranks", timeout_s=0.2)
