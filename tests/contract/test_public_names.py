"""`__all__` and docstrings of every module (ruff keeps `__all__` sorted)."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted(
    path
    for folder in ("llmserve", "training", "export", "server", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
    if path.name not in ("__init__.py", "__main__.py")
)


def defined_names(tree: ast.Module) -> set[str]:
    """Names bound at the module's top level, by definition or import, private ones left out."""
    names = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return {name for name in names if not name.startswith("_")}


def declared_names(tree: ast.Module) -> list[str] | None:
    for node in tree.body:
        if isinstance(node, ast.Assign) and [getattr(t, "id", "") for t in node.targets] == [
            "__all__"
        ]:
            return list(ast.literal_eval(node.value))
    return None


def undocumented(tree: ast.Module) -> Iterator[str]:
    """The module itself, and what is public in it, without a docstring."""
    if not ast.get_docstring(tree):
        yield "the module"
    for node in tree.body:
        if (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            and not node.name.startswith("_")
            and not ast.get_docstring(node)
        ):
            yield node.name


def misdeclared(tree: ast.Module) -> Iterator[str]:
    """What is wrong with `__all__`."""
    declared = declared_names(tree)
    if declared is None:
        yield "no __all__"
        return
    if len(declared) != len(set(declared)):
        yield "a name twice in __all__"
    yield from (f"no {name}" for name in set(declared) - defined_names(tree))


def complaints(check: Callable[[ast.Module], Iterator[str]]) -> list[str]:
    """What a check says of every module."""
    return [
        f"{path.relative_to(ROOT)}: {what}"
        for path in MODULES
        for what in check(ast.parse(path.read_text(encoding="utf-8")))
    ]


def test_all_names_what_exists() -> None:
    assert complaints(misdeclared) == []


def test_public_functions_and_classes_have_docstrings() -> None:
    assert complaints(undocumented) == []


@pytest.mark.parametrize(
    "source", ["x = 1", "__all__ = ['f', 'f']\ndef f(): ...", "__all__ = ['f']"]
)
def test_the_checks_find(source: str) -> None:
    assert len(list(misdeclared(ast.parse(source)))) == 1
    assert "the module" in list(undocumented(ast.parse(source)))
