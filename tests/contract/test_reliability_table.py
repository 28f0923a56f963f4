"""docs/reliability.md names a test for every check, and each test that it names is there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "reliability.md"
CHECKS = [f"R{number:02}" for number in range(1, 31)]
NAMED = re.compile(r"(✱?)`([\w/]+\.py)::(\w+)`")

ROWS = {
    cells[0]: NAMED.findall(cells[-1])
    for line in PAGE.read_text(encoding="utf-8").splitlines()
    if (cells := [cell.strip() for cell in line.strip("|").split("|")])[0] in CHECKS
}


@cache
def named_tests(path: Path) -> dict[str, bool]:
    """The tests of a file, and whether each is left to `make soak`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    marks = [
        ast.unparse(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"
    ]
    is_all_soak = any("mark.soak" in mark for mark in marks)
    return {
        node.name: is_all_soak
        or any("mark.soak" in ast.unparse(one) for one in node.decorator_list)
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_every_check_has_a_row() -> None:
    assert list(ROWS) == CHECKS


@pytest.mark.parametrize("check", CHECKS)
def test_the_tests_named_are_there_and_run_when_the_page_says(check: str) -> None:
    assert ROWS[check], "no test is named"
    for star, path, name in ROWS[check]:
        found = named_tests(TESTS / path)
        assert name in found, f"{path} has no {name}"
        assert found[name] == bool(star), f"{path}::{name}"
