"""What callgrind counts between a program's marks; skipped where valgrind is not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from guard.counting import can_count_instructions, count_instructions, time_cases
from guard.trees import GuardError

# A loop as long as a file of the tree says.
PROGRAM = """
import ctypes, json, os, time
from pathlib import Path
tree, shim = Path(os.environ["GUARD_TREE"]), os.environ["GUARD_SHIM"]
count = int((tree / "count").read_text())
marks = ctypes.CDLL(shim) if shim else None
start = time.perf_counter()
def work():
    for _ in range(count): pass
if marks: marks.guard_begin()
work()
if marks: marks.guard_end(b"loop")
print(json.dumps({"case": "loop", "ms": 1e3 * (time.perf_counter() - start)}))
"""


@pytest.fixture
def program(tmp_path: Path) -> list[str]:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return ["-S", str(path)]


def make_tree(path: Path, count: int) -> Path:
    path.mkdir()
    (path / "count").write_text(str(count))
    return path


@pytest.mark.skipif(not can_count_instructions(), reason="needs valgrind and a compiler")
def test_instructions_follow_the_work_and_nothing_else(tmp_path: Path, program: list[str]) -> None:
    trees = [make_tree(tmp_path / "base", 100_000), make_tree(tmp_path / "tree", 110_000)]
    work = tmp_path / "work"
    work.mkdir()
    base, tree = count_instructions(program, trees, work, rounds=1)
    # Start-up, which is far dearer, is not in it.
    assert tree["loop"][0] / base["loop"][0] == pytest.approx(1.1, rel=0.01)


def test_times_come_in_rounds(tmp_path: Path, program: list[str]) -> None:
    trees = [make_tree(tmp_path / name, 1000) for name in ("base", "tree")]
    base, tree = time_cases(program, trees, rounds=3)
    assert len(base["loop"]) == len(tree["loop"]) == 3
    assert min(base["loop"] + tree["loop"]) > 0


def test_a_program_that_fails_is_told(tmp_path: Path, program: list[str]) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(GuardError, match=r"failed in .*empty[^$]*count"):
        time_cases(program, [tmp_path / "empty"], rounds=2)
