"""No product code can run code that came in as data: no pickle in any form, no eval, no exec."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(
    path
    for folder in ("llmserve", "training", "export", "server", "benchmarks", "docs")
    for path in (ROOT / folder).rglob("*.py")
)

MODULES = {
    "_pickle",
    "cloudpickle",
    "code",
    "copyreg",
    "dill",
    "joblib",
    "marshal",
    "multiprocessing",  # its queues and pipes pickle
    "pickle",
    "pickletools",
    "runpy",
    "shelve",
}
CALLS = {
    "__import__",
    "builtins.compile",
    "builtins.eval",
    "builtins.exec",
    "compile",
    "eval",
    "exec",
    "numpy.save",
    "numpy.savez",
    "numpy.savez_compressed",
    "torch.hub.load",
    "torch.jit.load",
    "torch.load",
    "torch.package.PackageImporter",
    "torch.save",
    "torch.serialization.load",
    "torch.serialization.save",
}
"""Full names; `numpy.load` is harmless while `allow_pickle` is not given."""


def full_name(node: ast.expr, imported: dict[str, str]) -> str:
    """The dotted name that an expression stands for, its first part resolved; "" for others."""
    if isinstance(node, ast.Name):
        return imported.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        parent = full_name(node.value, imported)
        return f"{parent}.{node.attr}" if parent else ""
    return ""


def imported_names(tree: ast.AST) -> dict[str, str]:
    """Local name → full name of what it was imported from."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                local = alias.asname or alias.name.partition(".")[0]
                names[local] = alias.name if alias.asname else local
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def violations(tree: ast.AST) -> Iterator[str]:
    imported = imported_names(tree)
    for name in imported.values():
        if name.partition(".")[0] in MODULES:
            yield f"imports {name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            name = full_name(node, imported)
            if name in CALLS and isinstance(node.ctx, ast.Load):
                yield f"line {node.lineno} uses {name}"
        elif isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "weights_only"):
            yield f"line {node.value.lineno} passes {node.arg}"
        elif isinstance(node, ast.Call) and full_name(node.func, imported) in (
            "importlib.import_module",
            "getattr",
        ):
            texts = {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
            if texts & (MODULES | {"eval", "exec"}):
                yield f"line {node.lineno} reaches {sorted(map(str, texts))}"


def test_no_file_holds_what_runs_data() -> None:
    assert [
        f"{path.relative_to(ROOT)}: {wrong}"
        for path in FILES
        for wrong in violations(ast.parse(path.read_text(encoding="utf-8")))
    ] == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads as read",
        "import multiprocessing.pool",
        "import torch\ntorch.load('x')",
        "import torch as t\nt.save({}, 'x')",
        "from torch import load\nload('x')",
        "from torch import serialization\nserialization.load('x')",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "from numpy import save\nsave('x', [])",
        "eval('1')",
        "run = exec",
        "import builtins\nbuiltins.eval('1')",
        "__import__('pickle')",
        "import importlib\nimportlib.import_module('pickle')",
        "from importlib import import_module\nimport_module('marshal')",
    ],
)
def test_scan_finds(source: str) -> None:
    assert list(violations(ast.parse(source)))


def test_scan_lets_harmless_code_pass() -> None:
    source = "import re, torch\nre.compile('x')\nmodel.eval()\ntorch.tensor(1)\nsession.load('x')"
    assert list(violations(ast.parse(source))) == []
    assert len(FILES) > 50
