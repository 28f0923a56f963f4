"""`manifest.json`: the size and sha256 of every file of a model folder, written last.

A folder that has one is checked against it before anything in it is believed: a flipped bit in a
safetensors file loads without any error otherwise. It guards against damage, not against somebody
who rewrites a file and the manifest together.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import CheckpointError
from .strict_json import parse_json, read_json

__all__ = ["CERTIFICATE", "MANIFEST", "read_certificate", "render_manifest", "verify_manifest"]

MANIFEST = "manifest.json"
"""Name of the file."""

CERTIFICATE = "certificate.json"
"""Name of the file that says how far the served forms are from the original."""

_UNLISTED = {MANIFEST, CERTIFICATE}  # the certificate names the manifest's own hash
_FORMAT = "llmserve-manifest-1"
_MAX_BYTES = 16 << 20

_log = logging.getLogger("llmserve")


def render_manifest(folder: Path) -> bytes:
    """The manifest of `folder` as it is now. Reads every file."""
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in _UNLISTED:
            files[name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    return _render({"format": _FORMAT, "files": files})


def verify_manifest(folder: Path) -> None:
    """Compare every listed file with `manifest.json`; files that are not listed are ignored.

    A folder without a manifest passes, with one warning in the log.

    Raises:
        CheckpointError: a listed file is missing, torn or changed, or the manifest itself is.
    """
    path = folder / MANIFEST
    if not path.is_file():
        _log.warning("%s has no %s: its files cannot be checked for damage", folder, MANIFEST)
        return
    for name, recorded in _read_files(path).items():
        _verify_file(folder, name, recorded)


def read_certificate(folder: Path) -> dict[str, Any] | None:
    """The folder's certificate; None where there is none, or it certifies another manifest.

    One that cannot be used is said in the log and is no error: nothing is executed by it.
    """
    path, manifest = folder / CERTIFICATE, folder / MANIFEST
    if not path.is_file() or not manifest.is_file():
        return None
    try:
        certificate = read_json(path)
    except CheckpointError as error:
        _log.warning("%s", error)
        return None
    if certificate.get("manifest_sha256") == hashlib.sha256(manifest.read_bytes()).hexdigest():
        return certificate
    _log.warning("%s certifies other files than those of its folder", path)
    return None


def _render(manifest: dict[str, Any]) -> bytes:
    return f"{json.dumps(manifest, indent=2)}\n".encode()


def _read_files(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _MAX_BYTES:
        raise CheckpointError(f"{path}: larger than {_MAX_BYTES} bytes")
    data = path.read_bytes()
    manifest = parse_json(data, path)
    # Any damage that still parses shows as another rendering or as a value that does not match.
    if manifest.get("format") != _FORMAT or _render(manifest) != data:
        raise CheckpointError(f"{path}: damaged, or not written by llmserve")
    files = manifest.get("files")
    if not isinstance(files, dict) or manifest.keys() != {"format", "files"}:
        raise CheckpointError(f"{path}: damaged, or not written by llmserve")
    return files


def _verify_file(folder: Path, name: str, recorded: object) -> None:
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts or "\0" in name:
        raise CheckpointError(f"{folder / MANIFEST}: lists {name!r}, which is outside the folder")
    path = folder / relative
    if not path.is_file():
        raise CheckpointError(f"{path}: missing, though {MANIFEST} lists it")
    size = path.stat().st_size
    expected = recorded.get("bytes") if isinstance(recorded, dict) else None
    if size != expected:
        raise CheckpointError(
            f"{path}: has {size} bytes, {MANIFEST} says {expected}: torn or changed"
        )
    if {"bytes": size, "sha256": _sha256(path)} != recorded:
        raise CheckpointError(f"{path}: its sha256 differs from {MANIFEST}: damaged or changed")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
