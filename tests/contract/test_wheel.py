"""The wheel holds what the tree holds: every module is in a listed package, every other file in
the package data (`make try-wheel` builds one and uses it)."""

from __future__ import annotations

import tomllib
from fnmatch import fnmatch
from pathlib import Path

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


def is_in_the_wheel(path: Path) -> bool:
    """By `packages` where it is a module, else by a pattern of `package-data`."""
    if path.suffix == ".py":
        return package_of(path) is not None
    return any(
        fnmatch(str(path.relative_to(FOLDERS[package])), pattern)
        for package, patterns in SETTINGS["package-data"].items()
        for pattern in patterns
        if path.is_relative_to(FOLDERS[package])
    )


def test_every_file_is_in_the_wheel() -> None:
    assert [str(path.relative_to(ROOT)) for path in files() if not is_in_the_wheel(path)] == []


def test_what_no_setting_names_would_not_be() -> None:
    assert not is_in_the_wheel(ROOT / "server" / "notes.txt")
    assert not is_in_the_wheel(ROOT / "server" / "new" / "module.py")


def test_every_listed_package_exists() -> None:
    assert all((folder / "__init__.py").is_file() for folder in FOLDERS.values())


def test_the_extension_lists_all_of_its_sources() -> None:
    (extension,) = SETTINGS["ext-modules"]
    listed = [*extension["sources"], *extension["depends"]]
    found = (ROOT / "llmserve" / "native" / "csrc").iterdir()
    assert listed == [*sorted(extension["sources"]), *sorted(extension["depends"])]
    assert sorted(listed) == sorted(path.relative_to(ROOT).as_posix() for path in found)
