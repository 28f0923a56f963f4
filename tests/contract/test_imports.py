"""Who may import whom: the arrows between our modules, and one door for each other package.

The rules are `docs/architecture.md`'s. They are read from the source, lazy imports and those for
types included, so that a forbidden dependency cannot hide inside a function.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("training", "export", "server", "benchmarks")
FILES = sorted(path for folder in ("llmserve", *FOLDERS) for path in (ROOT / folder).rglob("*.py"))

# A module of `llmserve` may import its own layer's unit and every layer above it in this list.
# One line may hold several units; they do not know each other.
LAYERS: tuple[tuple[frozenset[str], ...], ...] = (
    (frozenset({"errors"}),),
    (
        frozenset({"limits"}),
        frozenset({"failpoints"}),
        frozenset({"strict_json"}),
        frozenset({"console"}),
        frozenset({"assignments"}),
        frozenset({"event_loop"}),
    ),
    (
        frozenset({"sampling"}),
        frozenset({"config", "config_checks", "config_parts"}),
    ),
    (frozenset({"text"}), frozenset({"quant"})),
    (
        frozenset(
            {
                "adapter_config",
                "adapters",
                "checkpoint",
                "config_heads",
                "config_keys",
                "config_rope",
                "config_values",
                "config_windows",
                "durable",
                "families",
                "families_gemma",
                "families_gpt2",
                "families_llama",
                "families_moe",
                "layouts",
                "lineage",
                "manifest",
                "model_files",
                "model_folder",
                "stored_parts",
                "tensor_file",
                "weight_source",
            }
        ),
    ),
    (frozenset({"model"}), frozenset({"native"})),
    (frozenset({"runners"}),),
    (frozenset({"engine"}),),
    (frozenset({"output"}), frozenset({"speculative_config"})),
    (frozenset({"completion"}), frozenset({"startup"}), frozenset({"runner_arguments"})),
    (frozenset({"llm"}),),
    (frozenset({"__main__", "cli", "cli_*", "demo"}),),
)

# Package → where it may be imported. numpy is the language of arrays and has many doors.
DOORS: dict[str, tuple[str, ...]] = {
    "bitsandbytes": ("llmserve/quant/bnb.py",),
    "fastapi": ("server/*",),
    "jinja2": ("llmserve/text/*",),
    "llguidance": ("llmserve/engine/grammar_compiler.py",),
    "matplotlib": ("training/curve.py",),
    "msgspec": ("llmserve/runners/rank_messages.py", "server/*"),
    "numpy": (
        "benchmarks/*",
        "export/*",
        "llmserve/adapters.py",
        "llmserve/checkpoint.py",
        "llmserve/engine/*",
        "llmserve/model/*",
        "llmserve/model_folder.py",
        "llmserve/native/*",
        "llmserve/quant/*",
        "llmserve/runners/*",
        "llmserve/tensor_file.py",
        "training/*",
    ),
    "onnx": ("export/onnx_*.py",),
    "onnxruntime": ("llmserve/runners/onnx_session.py",),
    "onnxruntime_genai": ("benchmarks/peer_onnxruntime.py",),
    "openvino": ("benchmarks/peer_openvino.py",),
    "openvino_genai": ("benchmarks/peer_openvino.py",),
    "opentelemetry": ("server/trace_export.py",),
    "orjson": ("benchmarks/*", "server/*"),
    "prometheus_client": ("server/*",),
    "pyarrow": ("training/data_parquet.py",),
    "pydantic": ("server/*",),
    "ray": ("server/ray_app.py",),
    "rich": ("llmserve/console.py", "*/cli_*.py"),
    "safetensors": ("llmserve/tensor_file.py",),
    "starlette": ("server/*",),
    "tokenizers": ("llmserve/text/*",),
    "torch": (
        "benchmarks/peer_transformers.py",
        "benchmarks/train_plain.py",
        "benchmarks/train_transformers.py",
        "export/*",
        "llmserve/model/*",
        "llmserve/quant/bnb.py",
        "llmserve/runners/torch_*.py",
        "training/*",
    ),
    "transformers": ("benchmarks/peer_transformers.py", "benchmarks/train_transformers.py"),
    "triton": ("llmserve/runners/torch_triton_*.py",),
    "uvicorn": ("server/*",),
    "uvloop": ("llmserve/event_loop.py",),
}


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Absolute dotted names that a file imports, with their lines; `from . import x` gives x's."""
    name = relative(path).removesuffix(".py")
    package = (name if name.startswith("llmserve") else f"llmserve/{name}").split("/")[:-1]
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module == "llmserve" or (node.level and not node.module):
                yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield module, node.lineno


def unit_of(name: str) -> tuple[int, frozenset[str]] | None:
    """Layer and unit of a module of the core by its first name after `llmserve`."""
    for index, layer in enumerate(LAYERS):
        for unit in layer:
            if any(fnmatch(name, pattern) for pattern in unit):
                return index, unit
    return None


def arrow_violations(path: Path) -> Iterator[str]:
    own = relative(path).split("/")
    for name, line in imports(path):
        parts = name.split(".")
        if parts[0] != "llmserve" or len(parts) == 1 or parts[1].startswith("__version"):
            continue
        where = f"{relative(path)}:{line} imports {name}"
        if own[0] in FOLDERS:
            if parts[1] in FOLDERS and parts[1] != own[0]:
                yield f"{where}: the four folders do not know each other"
            elif parts[1] not in FOLDERS and unit_of(parts[1]) == unit_of("cli"):
                yield f"{where}: the command line is on top"
            continue
        if parts[1] in FOLDERS:
            yield f"{where}: the core does not know the four folders"
            continue
        yield from core_violations(where, own[1].removesuffix(".py"), parts[1])


def core_violations(where: str, importer: str, imported: str) -> Iterator[str]:
    from_unit, to_unit = unit_of(importer), unit_of(imported)
    if from_unit is None or to_unit is None:
        if importer != "__init__":
            yield f"{where}: give both modules a place in LAYERS"
    elif from_unit[1] != to_unit[1] and from_unit[0] <= to_unit[0]:
        yield f"{where}: against the arrows"


def door_violations(path: Path) -> Iterator[str]:
    for name, line in imports(path):
        package = name.partition(".")[0]
        if package == "llmserve" or package in sys.stdlib_module_names:
            continue
        where, doors = f"{relative(path)}:{line}", DOORS.get(package)
        if doors is None:
            yield f"{where}: {package} has no door; give it one in DOORS"
        elif not any(fnmatch(relative(path), door) for door in doors):
            yield f"{where}: {package} belongs into {' or '.join(doors)}"


def spelling_violations(path: Path) -> Iterator[str]:
    own = relative(path).split("/")
    for node in ast.walk(tree_of(path)):
        if not isinstance(node, ast.ImportFrom):
            continue
        module = node.module or ""
        if own[0] == "llmserve":
            is_wrong = (module.startswith("llmserve") and not node.level) or node.level >= len(own)
        else:
            is_wrong = module.startswith(f"llmserve.{own[0]}") or node.level > 1
        if is_wrong:
            yield f"{relative(path)}:{node.lineno}"


def test_imports_follow_the_arrows() -> None:
    assert [wrong for path in FILES for wrong in arrow_violations(path)] == []


def test_other_packages_come_in_by_their_doors() -> None:
    assert [wrong for path in FILES for wrong in door_violations(path)] == []


def test_own_modules_are_imported_as_the_layout_asks() -> None:
    """Relative inside `llmserve` and inside each folder, absolute from a folder to the core."""
    assert [wrong for path in FILES for wrong in spelling_violations(path)] == []


@pytest.mark.parametrize("path", [p for p in FILES if relative(p).startswith("llmserve/runners/")])
def test_only_the_torch_runner_knows_the_torch_model(path: Path) -> None:
    knows = any(name.startswith("llmserve.model.") for name, _ in imports(path))
    assert not knows or path.name.startswith("torch_")


def test_opening_a_model_folder_imports_no_torch() -> None:
    code = "import sys, llmserve.checkpoint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_door_is_used() -> None:
    used = {name.partition(".")[0] for path in FILES for name, _ in imports(path)}
    assert DOORS.keys() - used == set()


def test_rules_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checker finds an arrow turned round, a sibling folder and the core reaching up."""
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    for name, source in (
        ("llmserve/errors.py", "from .config import ModelConfig"),
        ("llmserve/text/tokenizer.py", "from ..quant import dtypes"),
        ("llmserve/runners/fake.py", "def f():\n    from ..engine.request import Request"),
        ("llmserve/engine/engine.py", "import llmserve.training.trainer"),
        ("llmserve/surprise.py", "from .errors import ConfigError"),
        ("server/app.py", "from llmserve.training import trainer"),
        ("export/quantize.py", "from llmserve.cli import main"),
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
        assert len(list(arrow_violations(path))) == 1, name
    (tmp_path / "llmserve/llm.py").write_text("from .engine.engine import Engine")
    assert list(arrow_violations(tmp_path / "llmserve/llm.py")) == []


@pytest.mark.parametrize("path", sorted((ROOT / "llmserve/engine").glob("*.py")), ids=relative)
def test_engine_has_no_clock_and_no_chance_of_its_own(path: Path) -> None:
    """What it does follows from what it is told: so a recorded run plays again alike."""
    forbidden = {"asyncio", "datetime", "random", "secrets", "time"}
    assert not forbidden & {name.split(".")[0] for name, _ in imports(path)}
