"""What the cases cost in a tree: instructions where valgrind is there, else seconds.

Instructions are counted by callgrind, between marks that the program sets itself: start-up and
loading are not in them. Valgrind knows no AVX-512, so the kernels run on their AVX2 path; a loss on
another path shows in seconds only.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .trees import GuardError

__all__ = ["can_count_instructions", "count_instructions", "prepare", "time_cases"]

HERE = Path(__file__).parent
SHIM_SOURCE = HERE / "callgrind.c"
TIMEOUT_S = 600.0
MARK = re.compile(r"^desc: Trigger: Client Request: (\S+)$", re.MULTILINE)
TOTAL = re.compile(r"^totals: (\d+)$", re.MULTILINE)

Costs = dict[str, list[float]]


def can_count_instructions() -> bool:
    """Whether valgrind, its header and a compiler are there."""
    has_header = Path("/usr/include/valgrind/callgrind.h").exists()
    return has_header and all(map(shutil.which, ("valgrind", "cc")))


def prepare(program: Sequence[str], tree: Path) -> None:
    """Have `program` write what its cases need, with the code of `tree`."""
    _run([], [*program, "--prepare"], tree, None)


def count_instructions(
    program: Sequence[str], trees: Sequence[Path], work: Path, *, rounds: int
) -> list[Costs]:
    """Millions of instructions of each case of `program` in each tree, `rounds` times.

    The trees run at the same time: a count does not depend on who else computes. `work` is an
    empty folder to write to.
    """
    shim = work / "shim.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", shim, SHIM_SOURCE], check=True)

    def count(place: tuple[int, int]) -> dict[str, float]:
        index, number = place
        out = work / f"counts-{index}-{number}"
        before = ["valgrind", "--tool=callgrind", "--quiet", "--instr-atstart=no"]
        _run([*before, f"--callgrind-out-file={out}"], program, trees[index], shim)
        return _counts(work, out.name)

    places = [(index, number) for number in range(rounds) for index in range(len(trees))]
    with ThreadPoolExecutor(max(1, os.cpu_count() or 1)) as pool:
        found = list(pool.map(count, places))
    return [_merged(found[index :: len(trees)]) for index in range(len(trees))]


def time_cases(program: Sequence[str], trees: Sequence[Path], *, rounds: int) -> list[Costs]:
    """Milliseconds of each case of `program` in each tree, in turn, `rounds` times."""
    found = [_times(_run([], program, tree, None)) for _ in range(rounds) for tree in trees]
    return [_merged(found[index :: len(trees)]) for index in range(len(trees))]


def _run(before: Sequence[str], program: Sequence[str], tree: Path, shim: Path | None) -> str:
    command = [*before, sys.executable, *program]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tree), str(tree / "tests")]),
        "PYTHONHASHSEED": "0",
        "GUARD_TREE": str(tree),
        "GUARD_SHIM": str(shim or ""),
    }
    done = subprocess.run(
        command, cwd=tree, env=environment, capture_output=True, text=True, check=False,
        timeout=TIMEOUT_S,
    )  # fmt: skip
    if done.returncode:
        raise GuardError(f"the cases failed in {tree}:\n{(done.stderr or done.stdout)[-3000:]}")
    sys.stderr.write(done.stderr)
    return done.stdout


def _counts(work: Path, name: str) -> dict[str, float]:
    """The dumps, one for each mark, which callgrind appends or numbers as it likes."""
    counts: dict[str, float] = {}
    for path in work.glob(f"{name}*"):
        text = path.read_text(errors="replace")
        if (mark := MARK.search(text)) and (total := TOTAL.search(text)):
            counts[mark[1]] = int(total[1]) / 1e6
    return counts


def _times(output: str) -> dict[str, float]:
    lines = [json.loads(line) for line in output.splitlines()]
    return {line["case"]: line["ms"] for line in lines}


def _merged(rounds: Sequence[dict[str, float]]) -> Costs:
    return {case: [one[case] for one in rounds] for case in rounds[0]}
