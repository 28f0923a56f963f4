"""Memory that was freed stays in the process: seen by the pages it has to ask for again."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import numpy as np
from llmserve.runners.freed_memory import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

if sys.argv[1] == "keep":
    assert keep_freed_memory()
    assert keep_freed_memory()
first = faults()
for _ in range(20):
    np.empty(16 << 20, dtype=np.uint8).fill(1)
    np.empty(2 << 20, dtype=np.uint8).fill(1)
print(faults() - first)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library has no such setting")
def test_freed_arrays_are_used_again() -> None:
    counts = {}
    for mode in ("keep", "default"):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True
        )
        counts[mode] = int(done.stdout)
    pages = (18 << 20) // 4096
    # Once each, huge pages or not, against again and again.
    assert counts["keep"] < 2 * pages
    assert counts["default"] > counts["keep"]
