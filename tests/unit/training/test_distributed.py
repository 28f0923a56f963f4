"""How a process of a shared run leaves it."""

from __future__ import annotations

import os

import pytest

from llmserve.training.distributed import ALONE
from support.training_runs import run_as_processes


def test_one_of_several_ends_at_once_with_its_status() -> None:
    statuses = run_as_processes(2, lambda processes: processes.leave(7))
    assert [os.waitstatus_to_exitcode(status) for status in statuses] == [7, 7]


@pytest.mark.parametrize("status", [0, 3])
def test_alone_it_goes_on(status: int) -> None:
    assert ALONE.leave(status) == status
