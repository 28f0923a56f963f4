from __future__ import annotations

from pathlib import Path

from llmserve.server.available_memory import available_bytes

MIB = 1 << 20


def test_the_narrower_of_machine_and_control_group_counts(tmp_path: Path) -> None:
    meminfo, cgroup = tmp_path / "meminfo", tmp_path / "cgroup"
    assert available_bytes(meminfo=meminfo, cgroup=cgroup) is None
    meminfo.write_text("MemTotal:       9 kB\nMemAvailable:   4096 kB\n")
    assert available_bytes(meminfo=meminfo, cgroup=cgroup) == 4 * MIB
    cgroup.mkdir()
    (cgroup / "memory.current").write_text(f"{MIB}\n")
    (cgroup / "memory.stat").write_text("anon 1\nactive_file 0\ninactive_file 0\n")
    (cgroup / "memory.max").write_text("max\n")
    assert available_bytes(meminfo=meminfo, cgroup=cgroup) == 4 * MIB
    (cgroup / "memory.max").write_text(f"{3 * MIB}\n")
    assert available_bytes(meminfo=meminfo, cgroup=cgroup) == 2 * MIB
    (cgroup / "memory.current").write_text(f"{5 * MIB}\n")
    assert available_bytes(meminfo=meminfo, cgroup=cgroup) == 0
    (cgroup / "memory.stat").write_text(f"active_file {MIB}\ninactive_file {2 * MIB}\n")
    assert available_bytes(meminfo=meminfo, cgroup=cgroup) == MIB, "files that were read give way"
