from __future__ import annotations

from pathlib import Path

import pytest

from llmserve.checkpoint import Checkpoint
from llmserve.server import swap_memory
from llmserve.server.messages import EngineSettings
from llmserve.server.settings import ServerSettings
from llmserve.server.swap_gate import SwapRefusedError
from llmserve.server.swap_memory import available_bytes, check_memory, needed_bytes

MIB = 1 << 20


def test_the_narrower_of_machine_and_control_group_counts(tmp_path: Path) -> None:
    meminfo, cgroup = tmp_path / "meminfo", tmp_path / "cgroup"
    assert available_bytes(meminfo=meminfo, cgroup=cgroup) is None
    meminfo.write_text("MemTotal:       9 kB\nMemAvailable:   4096 kB\n")
    assert available_bytes(meminfo=meminfo, cgroup=cgroup) == 4 * MIB
    cgroup.mkdir()
    (cgroup / "memory.current").write_text(f"{MIB}\n")
    (cgroup / "memory.max").write_text("max\n")
    assert available_bytes(meminfo=meminfo, cgroup=cgroup) == 4 * MIB
    (cgroup / "memory.max").write_text(f"{3 * MIB}\n")
    assert available_bytes(meminfo=meminfo, cgroup=cgroup) == 2 * MIB
    (cgroup / "memory.current").write_text(f"{5 * MIB}\n")
    assert available_bytes(meminfo=meminfo, cgroup=cgroup) == 0


def test_too_little_memory_is_refused_with_both_numbers(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(model_folder)
    engine = EngineSettings(model=str(model_folder), runner="fake", cache_bytes=300 * MIB)
    settings = ServerSettings(engine=engine, num_replicas=2)
    needed = needed_bytes(checkpoint, settings)
    assert needed > 600 * MIB + checkpoint.stored_bytes()
    monkeypatch.setattr(swap_memory, "available_bytes", lambda: needed)
    check_memory(checkpoint, settings)
    monkeypatch.setattr(swap_memory, "available_bytes", lambda: needed - 1)
    with pytest.raises(SwapRefusedError, match=r"about \d+ MiB beside .* \d+ MiB are available"):
        check_memory(checkpoint, settings)
