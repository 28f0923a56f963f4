from __future__ import annotations

import os

from llmserve import __version__
from llmserve.benchmarks.machine import command_line, machine, versions


def test_machine_names_processor_cores_and_memory() -> None:
    found = machine()
    assert found["cpu"]
    assert found["cores_total"] == os.cpu_count()
    assert isinstance(found["memory_bytes"], int)
    assert found["memory_bytes"] > 1 << 20


def test_versions_of_what_is_installed_and_what_is_not() -> None:
    found = versions(["numpy", "no-such-package-here"])
    assert found["llmserve"] == __version__
    assert found["numpy"]
    assert found["no-such-package-here"] is None


def test_command_hides_header_values_only() -> None:
    words = ["/opt/bin/llmserve", "bench", "serve", "--header", "a=key1", "b=key2", "--seed", "1"]
    assert command_line(words) == "llmserve bench serve --header a=... b=... --seed 1"
    assert command_line(["llmserve", "--header=a=key"]) == "llmserve --header=a=..."


def test_command_can_be_pasted_into_a_shell() -> None:
    assert command_line(["llmserve", "--extra-body", '{"a": 1}']) == (
        "llmserve --extra-body '{\"a\": 1}'"
    )
