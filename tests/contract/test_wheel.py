"""The wheel holds what the tree holds: every module is in a listed package, every other file in
the package data (`make try-wheel` builds one and uses it)."""

from __future__ import annotations

import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
    "setuptools"
]
FOLDERS = {
    package: ROOT / SETTINGS["package-dir"].get(package, package.replace(".", "/"))
    for package in SETTINGS["packages"]
}


def package_of(path: Path) -> str | None:
    return next((name for name, folder in FOLDERS.items() if folder == path.parent), None)


def files() -> list[Path]:
    tops = [ROOT / name for name in ("llmserve", "training", "export", "server", "benchmarks")]
    return [
        path
        for top in tops
        for path in sorted(top.rglob("*"))
        # The C++ is in the wheel as what it was compiled to.
        if path.is_file() and not {"__pycache__", "csrc"} & {*path.parts} and path.suffix != ".so"
    ]


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_file_is_in_the_wheel(path: Path) -> None:
    if path.suffix == ".py":
        assert package_of(path) is not None, "its folder is not in tool.setuptools.packages"
        return
    data = SETTINGS["package-data"]
    assert any(
        fnmatch(str(path.relative_to(FOLDERS[package])), pattern)
        for package, patterns in data.items()
        for pattern in patterns
        if path.is_relative_to(FOLDERS[package])
    ), "it matches no pattern of tool.setuptools.package-data"


def test_every_listed_package_exists() -> None:
    assert all((folder / "__init__.py").is_file() for folder in FOLDERS.values())


def test_the_extension_lists_all_of_its_sources() -> None:
    (extension,) = SETTINGS["ext-modules"]
    listed = [*extension["sources"], *extension["depends"]]
    found = (ROOT / "llmserve" / "native" / "csrc").iterdir()
    assert listed == [*sorted(extension["sources"]), *sorted(extension["depends"])]
    assert sorted(listed) == sorted(path.relative_to(ROOT).as_posix() for path in found)
