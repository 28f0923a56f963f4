"""The certificate of a GGUF file: two files beside it, written before it appears.

`X.certificate.json` beside `X.gguf` has the figures of every certificate, and in `record` what the
file is held to: a sha256 for each tensor, the header's values, the original's configuration and the
ids of some texts; `X.reference.logits` has the original's logits on them. The file's own
tensors, decoded, in the shape that its own header describes, are run in torch. They are what
llama.cpp executes, up to its rounding of activations.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llmserve.checkpoint import Checkpoint
from llmserve.config import ModelConfig
from llmserve.durable import remove, write_json
from llmserve.errors import CheckpointError, ConfigError, ExportError
from llmserve.families import parse_config, render_config
from llmserve.layouts import expected_tensors
from llmserve.quant.dtypes import Float32Array
from llmserve.strict_json import read_json

from .block_stream import BlockStream
from .certificate import Certificate
from .gguf_layout import ROPE_FACTORS, described_config, gguf_name, rope_factors, row_order
from .gguf_reader import GgufFile
from .verify import Verification, training_forward
from .verify_layers import layer_errors
from .verify_reference import (
    Reference,
    as_reference,
    changed_tensors,
    make_reference,
    reference_values,
    reference_windows,
    write_logits,
)

__all__ = ["certificate_path", "certify_gguf", "verify_gguf", "without_orphans"]

OnStage = Callable[[str], None]
_LONGEST_SHOWN = 60  # characters of a value that changed


class GgufModel:
    """The model that an open file describes, under canonical names."""

    def __init__(self, file: GgufFile, original: ModelConfig) -> None:
        """`original` has what no header says. Raises `CheckpointError` for what is no model."""
        self.file = file
        try:
            self.config = described_config(file.metadata, file.names(), original)
        except ConfigError as error:
            raise CheckpointError(f"the header describes no model: {error}") from error

    def float32(self, name: str) -> Float32Array:
        """A tensor by canonical name, in the original's order of rows."""
        return self._ordered(name, self.file.float32(_name(name)))

    def beyond(self, name: str, original: Float32Array) -> int:
        """How many numbers are further from the original's than their type rounds them.

        Raises `CheckpointError` for another shape.
        """
        values, error = self.file.with_error(_name(name))
        if values.shape != original.shape:
            raise CheckpointError(
                f"tensor {_name(name)} is {list(values.shape)}, the original's is "
                f"{list(original.shape)}"
            )
        distance = np.abs(self._ordered(name, values).astype(np.float64) - original)
        return int((~(distance <= self._ordered(name, error))).sum())  # NaN is beyond

    def has_rope_factors(self, config: ModelConfig) -> bool:
        """Whether the factors of rotary frequencies are those of `config`."""
        wanted = rope_factors(config)
        if wanted is None or ROPE_FACTORS not in self.file.names():
            return (wanted is None) == (ROPE_FACTORS not in self.file.names())
        return np.array_equal(self.file.float32(ROPE_FACTORS), wanted)

    def _ordered(self, name: str, values: Float32Array) -> Float32Array:
        order = row_order(name, len(values), self.config)
        return values if order is None else values[np.argsort(order)]


def certificate_path(path: Path) -> Path:
    """The certificate of the file `path`."""
    return path.with_name(f"{path.name.removesuffix('.gguf')}.certificate.json")


@contextlib.contextmanager
def without_orphans(path: Path) -> Iterator[None]:
    """Remove the certificate of a file that did not appear, if the block ends by an exception."""
    try:
        yield
    except BaseException:
        if not path.exists():
            remove(certificate_path(path))
            remove(_logits_path(path))
        raise


def certify_gguf(
    staged: Path, out: Path, source: Checkpoint, config: ModelConfig,
    *,
    on_stage: OnStage = lambda stage: None,
) -> Certificate:  # fmt: skip
    """Compare a file with the model that it was made from, and write its certificate.

    Args:
        staged: the file, which has not appeared yet.
        out: the name under which it will.
        source: the model.
        config: its configuration, as the file was to have it.
        on_stage: told what is being done.

    Raises:
        ExportError: a tensor is further from the model's than its type rounds it, or the model in
            the file does not give numbers.
    """
    file = GgufFile(staged)
    on_stage("comparing every weight with the original's")
    findings = _deviations(file, source, config)
    if findings:
        raise ExportError(f"{findings[0]}; nothing was written")
    on_stage("asking the original and the file")
    reference, certificate = _compared(staged, file, source, config)
    if certificate.misses:
        raise ExportError("the model in the file gives no numbers; nothing was written")
    _write(out, file, config, reference, certificate)
    return certificate


def verify_gguf(
    path: Path, *, against: Path | None = None, on_stage: OnStage = lambda stage: None
) -> Verification:
    """Verify a GGUF file and, where nothing is wrong, write its certificate beside it.

    Args:
        path: the file.
        against: the folder that it was made from; None: what its export recorded.
        on_stage: told what is being done.

    Raises:
        CheckpointError: the file, its record or the original's folder cannot be read.
        ConfigError: nothing was recorded beside it, and no `against`.
    """
    file = GgufFile(path)
    record = _record(path)
    if record is None and against is None:
        raise ConfigError(
            f"beside {path} there is no {certificate_path(path).name}, so what it is to be "
            "compared with must be given: --against FOLDER of the original"
        )
    if record is not None and (findings := _changes(path, file, record)):
        return Verification(findings=findings, certificate=None)
    on_stage("running the file's weights")
    if against is not None:
        source = Checkpoint.open(against)
        config = source.config
        if findings := _deviations(file, source, config):
            return Verification(findings=findings, certificate=None)
        reference, certificate = _compared(path, file, source, config)
    else:
        assert record is not None
        config = parse_config(record["config"])
        reference = as_reference(record, certificate_path(path), _logits_path(path))
        model = GgufModel(file, config)
        candidate = BlockStream(model, reference.windows, weights=model.float32)
        candidate.finish()
        certificate = _certificate(path, reference, candidate)
    misses = [
        f"diverges from the original by {form.mean_kl:.3g} nats a token; its export recorded "
        f"{certificate.accepted_kl:.3g} at most"
        for form in certificate.misses
    ]
    if not misses:
        _write(path, file, config, reference, certificate)
    return Verification(findings=misses, certificate=certificate)


def _compared(
    path: Path, file: GgufFile, source: Checkpoint, config: ModelConfig
) -> tuple[Reference, Certificate]:
    """What the original says, and what the file's model says beside it."""
    origin, windows = reference_windows(source)
    original = BlockStream(source, windows)
    model = GgufModel(file, config)
    candidate = BlockStream(model, windows, weights=model.float32)
    layers = layer_errors(original, candidate)
    reference = make_reference(source, original, windows, origin, accepted_kl=0.0, layers=layers)
    # The weights are proven to be the original's, rounded: what that costs is what is accepted.
    accepted = 1.1 * training_forward(candidate, reference).mean_kl + 1e-6
    reference = replace(reference, accepted_kl=accepted)
    return reference, _certificate(path, reference, candidate)


def _certificate(path: Path, reference: Reference, candidate: BlockStream) -> Certificate:
    return Certificate(
        manifest_sha256=_sha256(path),
        source=reference.source,
        origin=reference.origin,
        num_tokens=sum(map(len, reference.windows)),
        accepted_kl=reference.accepted_kl,
        weight_bytes=path.stat().st_size,
        source_weight_bytes=reference.source_weight_bytes,
        source_perplexity=reference.perplexity,
        forms=(training_forward(candidate, reference),),
        layers=reference.layers,
    )


def _deviations(file: GgufFile, source: Checkpoint, config: ModelConfig) -> list[str]:
    """What the file has otherwise than the original, by name."""
    model = GgufModel(file, config)
    found, wanted = model.config, replace(config, dtype="float32")
    lines = [
        f"{key} is {getattr(found, key)}, the original's {getattr(wanted, key)}"
        for key in type(config).__dataclass_fields__
        if not _is_close(getattr(found, key), getattr(wanted, key))
    ]
    if lines:
        return lines
    if not model.has_rope_factors(config):
        lines = [f"tensor {ROPE_FACTORS} is not what the original's stretch gives"]
    counts = {name: model.beyond(name, source.float32(name)) for name in expected_tensors(config)}
    return lines + [
        f"tensor {_name(name)}: {count} weights are not the original's, rounded"
        for name, count in counts.items()
        if count
    ]


def _is_close(found: Any, wanted: Any) -> bool:
    """Equal, as far as a float32 can be: the header has no wider type."""
    if isinstance(wanted, float):
        return bool(np.float32(found) == np.float32(wanted))
    if hasattr(wanted, "__dataclass_fields__"):
        return all(
            _is_close(getattr(found, key), getattr(wanted, key))
            for key in wanted.__dataclass_fields__
        )
    return bool(found == wanted)


def _changes(path: Path, file: GgufFile, record: dict[str, Any]) -> list[str]:
    """What is not as the export left it: tensors by name, values of the header by key."""
    try:
        now, before = _values(file), record["metadata"]
        lines = changed_tensors(record["tensors"], file.hashes())
    except KeyError as error:
        raise CheckpointError(f"{certificate_path(path)}: has no {error}") from error
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            lines.append(f"header: {key} was {_shown(before.get(key))}, is {_shown(now.get(key))}")
    if not lines and record["file_sha256"] != _sha256(path):
        lines.append("bytes of the file changed, but no tensor and no value of the header")
    return lines


def _values(file: GgufFile) -> dict[str, Any]:
    """The header's values as the record has them: of a list, such as the tokens, a hash."""
    return {
        key: _list_hash(value) if isinstance(value, list) else value
        for key, value in file.metadata.items()
    }


def _list_hash(values: list[Any]) -> str:
    content = json.dumps(values).encode()
    return f"{len(values)} items, sha256 {hashlib.sha256(content).hexdigest()}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"


def _record(path: Path) -> dict[str, Any] | None:
    beside = certificate_path(path)
    if not beside.is_file():
        return None
    try:
        record: dict[str, Any] = read_json(beside)["record"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{beside}: has no record of the file") from error
    return record


def _write(
    out: Path, file: GgufFile, config: ModelConfig, reference: Reference, certificate: Certificate
) -> None:
    write_logits(_logits_path(out), reference)
    record = {
        **reference_values(reference),
        "config": render_config(config),
        "metadata": _values(file),
        "tensors": file.hashes(),
        "file_sha256": certificate.manifest_sha256,
    }
    write_json(certificate_path(out), {**certificate.as_json(), "record": record})


def _logits_path(path: Path) -> Path:
    return path.with_name(f"{path.name.removesuffix('.gguf')}.reference.logits")


def _name(name: str) -> str:
    layer, _, part = name.rpartition(".")
    return f"{gguf_name(layer)}.{part}"


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
