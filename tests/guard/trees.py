"""The two trees that are compared, each with its compiled kernels.

The base is unpacked into `.guard/COMMIT` and stays there for the next time. Where its C++ is the
same as the checkout's, it gets the checkout's extension, which takes a minute less.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

__all__ = ["ROOT", "GuardError", "base_tree", "check_kernels", "resolve"]

ROOT = Path(__file__).parents[2]
KEPT = ROOT / ".guard"
EXTENSION = Path("llmserve/native/_kernels.abi3.so")
NATIVE_SOURCES = "llmserve/native/csrc"
BUILD = "from setuptools import setup; setup()"


class GuardError(Exception):
    """The comparison cannot be made; the message says what to do."""


def resolve(commit: str) -> str:
    """The full id of `commit`. Raises `GuardError` where the checkout has no such one."""
    found = _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{commit}^{{commit}}")
    if found.returncode:
        raise GuardError(f"{ROOT} has no commit {commit!r}: give one that `git log` shows")
    return found.stdout.decode().strip()


def check_kernels() -> None:
    """Raise `GuardError` unless the checkout's extension is newer than its C++."""
    extension = ROOT / EXTENSION
    newest = max(path.stat().st_mtime for path in (ROOT / NATIVE_SOURCES).iterdir())
    if not extension.exists() or extension.stat().st_mtime < newest:
        raise GuardError(f"{EXTENSION} is missing or older than its C++: build it, `make setup`")


def base_tree(commit: str) -> Path:
    """The tree of `commit`, a full id, ready to run. Raises `GuardError` if it does not build."""
    tree = KEPT / commit
    if (tree / EXTENSION).exists():
        return tree
    shutil.rmtree(KEPT, ignore_errors=True)  # earlier bases
    tree.mkdir(parents=True)
    packed = _git("archive", commit)
    if packed.returncode:
        raise GuardError(f"git archive {commit} failed: {packed.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
        archive.extractall(tree, filter="data")
    if _has_same_kernels(commit, tree):
        shutil.copy2(ROOT / EXTENSION, tree / EXTENSION)
    else:
        _build(tree)
    return tree


def _has_same_kernels(commit: str, tree: Path) -> bool:
    """Whether the checkout compiles the same sources with the same settings."""
    is_equal = _git("diff", "--quiet", commit, "--", NATIVE_SOURCES).returncode == 0
    return is_equal and _extension(tree) == _extension(ROOT)


def _extension(tree: Path) -> object:
    project = tomllib.loads((tree / "pyproject.toml").read_text())
    return project["tool"]["setuptools"]["ext-modules"]


def _build(tree: Path) -> None:
    print("building the base's kernels", file=sys.stderr)
    command = [sys.executable, "-c", BUILD, "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    if done.returncode or not (tree / EXTENSION).exists():
        raise GuardError(f"the base's kernels did not build:\n{done.stderr[-2000:]}")


def _git(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=False)
