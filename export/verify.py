"""Comparing a folder's served forms with the original's training forward, and saying so in it.

`certify` is what every export calls before its folder appears; `verify_folder` does it again later,
from what was recorded then or from the original's folder.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import cast

from llmserve.checkpoint import Checkpoint
from llmserve.durable import verify_manifest
from llmserve.errors import CheckpointError, ConfigError, ExportError
from llmserve.model_files import check_model_folder
from llmserve.quant.dtypes import Float32Array
from llmserve.runners.onnx_session import EXPORT_FILE
from llmserve.runners.registry import load_runner
from llmserve.strict_json import read_json

from .block_stream import BlockStream, WeightSource
from .certificate import Certificate, FormResult, LayerError, manifest_sha256, write_certificate
from .verify_figures import FormFigures
from .verify_forms import FORMS, ComparableRunner, prepare, run_form
from .verify_layers import layer_errors
from .verify_reference import (
    REFERENCE_FILE,
    Reference,
    changes,
    make_reference,
    read_reference,
    reference_windows,
    write_reference,
)
from .verify_weights import Meant, beyond_rounding, is_rounding_of, unlike

__all__ = ["ACCEPTED_KL", "Verification", "certify", "training_forward", "verify_folder"]

ACCEPTED_KL = {
    "fp32": 1e-6, "int8": 0.05, "w8a8": 0.05, "int4": 1.0, "nf4": 1.0, "fp4": 1.0, "bnb-int8": 0.05,
}  # fmt: skip
"""Form of the weights → largest mean divergence from the original that is accepted, nats a token,
where nothing proves what the weights were made from. Of several forms the coarsest counts. Of
16-bit weights, which are stored as they were trained, see `_BFLOAT16_KL`."""

_BFLOAT16_KL = 0.01
_EXECUTION_KL = 0.05
"""What integer activations may cost at most, beside weights that are proven."""
_PROVEN_FACTOR = 4.0
"""Of proven weights' own divergence: activations of the same width cost about as much again."""
_TRAINING = "training forward"

OnStage = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What was found of a folder."""

    findings: list[str]
    """What is wrong, in words; empty: nothing."""
    certificate: Certificate | None
    """Figures of all forms; None where the folder could not be executed."""
    notes: list[str] = field(default_factory=list)
    """What was not compared, and why."""


def certify(
    folder: Path,
    source: Checkpoint,
    *,
    weights: WeightSource | None = None,
    meant: Meant | None = None,
    rounded: Collection[str] = (),
    on_stage: OnStage = lambda stage: None,
) -> Certificate:
    """Record what an exported folder is held to, compare it, and write its certificate.

    For exporters: the folder is complete but for its manifest, and has not appeared yet. Blocks of
    the original and of the folder are in memory one at a time.

    Args:
        folder: what was written; gets `reference.json`, `reference.logits` and
            `certificate.json`.
        source: the original.
        weights: gives the folder's tensors in float32; None: they are read from the folder.
        meant: the tensors that were to be written, which the folder must hold.
        rounded: those that were rounded to nearest, whose error half a step bounds, by name.
        on_stage: told what is being done.

    Raises:
        ExportError: a tensor is not what was meant, or a form diverges by more than is accepted.
    """
    written = Checkpoint.open(folder, verify=False)
    if meant is not None:
        on_stage("comparing every weight")
        wrong = [*unlike(written, meant), *beyond_rounding(written, source, rounded)]
        if wrong:
            raise ExportError(f"{wrong[0]}; nothing was written")
    on_stage("asking the original")
    stored_in = written if weights is None else source

    def candidate_of(windows: list[list[int]]) -> BlockStream:
        return BlockStream(stored_in, windows, weights=weights)

    reference, candidate = _ask(
        source, candidate_of, _accepted(written, folder), is_proven=meant is not None
    )
    write_reference(folder, reference)
    certificate = _compare(folder, reference, candidate, on_stage, is_complete=False)
    if certificate.misses:
        raise ExportError(f"{_miss(certificate.misses[0], certificate)}; nothing was written")
    write_certificate(folder, certificate)
    return certificate


def verify_folder(
    path: Path, *, against: Path | None = None, on_stage: OnStage = lambda stage: None
) -> Verification:
    """Verify a model folder and, where nothing is wrong, write its certificate into it.

    Args:
        path: the folder: of weights, quantized or not, or of an ONNX graph.
        against: the folder that it was made from; None: what its export recorded, or, for a folder
            that is not quantized, its own training forward.
        on_stage: told what is being done.

    Raises:
        CheckpointError: the folder, or the original's, cannot be opened at all.
        ConfigError: a quantized folder that nothing was recorded in, and no `against`.
    """
    check_model_folder(path)
    findings = _damage(path)
    if findings:
        return Verification(findings=findings, certificate=None)
    folder = Checkpoint.open(path, verify=False)
    reference, candidate = _reference(folder, against)
    certificate = _compare(path, reference, candidate, on_stage, is_complete=True)
    findings = [_miss(form, certificate) for form in certificate.misses]
    notes = []
    if not (path / REFERENCE_FILE).is_file():
        notes.append(f"no {REFERENCE_FILE}: single tensors were not compared with a record")
    if not findings:
        write_certificate(path, certificate)
    return Verification(findings=findings, certificate=certificate, notes=notes)


def _damage(path: Path) -> list[str]:
    """What the manifest and the record say; the record is read even if the manifest is at odds."""
    findings = []
    try:
        verify_manifest(path)
    except CheckpointError as error:
        findings.append(str(error))
    if (path / REFERENCE_FILE).is_file():
        try:
            findings += changes(path)
        except CheckpointError as error:
            findings.append(str(error))
    return findings


def _reference(folder: Checkpoint, against: Path | None) -> tuple[Reference, BlockStream | None]:
    """What the folder is held to, and its own weights after they read the same texts."""
    candidate_of = partial(BlockStream, folder) if folder.has_weights else None
    if against is not None:
        source = Checkpoint.open(against)
        is_proven = candidate_of is not None and is_rounding_of(folder, source)
        accepted = _accepted(folder, folder.path)
        return _ask(source, candidate_of, accepted, is_proven=is_proven)
    recorded = read_reference(folder.path)
    if recorded is not None:
        if candidate_of is None:
            return recorded, None
        candidate = candidate_of(recorded.windows)
        candidate.finish()
        return recorded, candidate
    if candidate_of is None or folder.quantization is not None:
        raise ConfigError(
            f"{folder.path} holds no {REFERENCE_FILE}, so what it is to be compared with must be "
            "given: --against FOLDER of the original"
        )
    reference, _ = _ask(folder, None, _accepted(folder, folder.path), is_proven=False)
    candidate = candidate_of(reference.windows)
    candidate.finish()
    return reference, candidate


def _ask(
    source: Checkpoint,
    candidate_of: Callable[[list[list[int]]], BlockStream] | None,
    accepted_kl: float,
    *,
    is_proven: bool,
) -> tuple[Reference, BlockStream | None]:
    """Let the original, and beside it the candidate, read.

    What weights that `is_proven` says are the original's, quantized, cost by themselves is honest
    however much it is: a form may cost a multiple of it and what its activations add.
    """
    origin, windows = reference_windows(source)
    original = BlockStream(source, windows)
    candidate: BlockStream | None = None
    layers: tuple[LayerError, ...] = ()
    if candidate_of is None:
        original.finish()
    else:
        candidate = candidate_of(windows)
        layers = layer_errors(original, candidate)
    reference = make_reference(
        source, original, windows, origin, accepted_kl=accepted_kl, layers=layers
    )
    if candidate is not None and windows and is_proven:
        own = training_forward(candidate, reference).mean_kl
        accepted = _PROVEN_FACTOR * own + min(accepted_kl, _EXECUTION_KL)
        reference = replace(reference, accepted_kl=accepted)
    return reference, candidate


def _accepted(written: Checkpoint, folder: Path) -> float:
    """The largest divergence that is accepted of the folder's form."""
    scheme = written.quantization.scheme if written.quantization else None
    if not written.has_weights:
        scheme = read_json(folder / EXPORT_FILE).get("scheme")
    elif scheme is None and written.config.dtype != "float32":
        return _BFLOAT16_KL
    forms = str(scheme or "fp32").removeprefix("gptq-").removeprefix("awq-").split("+")
    if not ACCEPTED_KL.keys() >= set(forms):
        raise CheckpointError(f"{folder}: nothing is stated of weights in the form {scheme!r}")
    return max(ACCEPTED_KL[form] for form in forms)


def _compare(
    path: Path,
    reference: Reference,
    candidate: BlockStream | None,
    on_stage: OnStage,
    *,
    is_complete: bool,
) -> Certificate:
    folder = Checkpoint.open(path, verify=False)
    forms = []
    if reference.windows:
        if candidate is not None:
            on_stage(f"comparing: {_TRAINING}")
            forms.append(training_forward(candidate, reference))
        forms += _served(folder, reference, on_stage)
    return Certificate(
        manifest_sha256=manifest_sha256(path, is_complete=is_complete),
        source=reference.source,
        origin=reference.origin,
        num_tokens=sum(map(len, reference.windows)),
        accepted_kl=reference.accepted_kl,
        weight_bytes=folder.weight_file_bytes(),
        source_weight_bytes=reference.source_weight_bytes,
        source_perplexity=reference.perplexity,
        forms=tuple(forms),
        layers=reference.layers,
    )


def training_forward(candidate: BlockStream, reference: Reference) -> FormResult:
    """What the candidate's weights say in float32, beside the reference; it has run to its end."""
    figures = FormFigures()
    for (window, places, wanted), logits in zip(
        _windows(reference), candidate.logits(), strict=True
    ):
        figures.add(wanted, logits.numpy(), places, window)
    return figures.result(_TRAINING, "float32, in torch")


def _served(folder: Checkpoint, reference: Reference, on_stage: OnStage) -> Iterator[FormResult]:
    """Every form on the runner that would serve the folder."""
    with _quiet(), contextlib.closing(load_runner("auto", folder)) as loaded:
        runner = cast(ComparableRunner, loaded)
        prepare(runner, reference.windows)
        for name in FORMS:
            if name == "prefix hit" and not runner.info.shares_blocks:
                continue
            on_stage(f"comparing: {name}")
            figures = FormFigures()
            found = run_form(name, runner, reference.windows)
            for (window, places, wanted), logits in zip(_windows(reference), found, strict=True):
                figures.add(wanted, logits, places, window)
            form = f"{runner.info.executed_form}, {runner.info.cache_dtype} cache"
            yield figures.result(name, f"{runner.info.runner}: {form}")


def _windows(reference: Reference) -> Iterator[tuple[list[int], list[int], Float32Array]]:
    """Ids, places and the original's logits there, of each text."""
    return zip(reference.windows, reference.places, reference.logits, strict=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the engine's notices about which runner it takes: the certificate says it."""
    logger = logging.getLogger("llmserve.engine")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _miss(form: FormResult, certificate: Certificate) -> str:
    return (
        f"the form {form.name!r} ({form.executed_form}) diverges from the original by "
        f"{form.mean_kl:.3g} nats a token; accepted are {certificate.accepted_kl:g}"
    )
