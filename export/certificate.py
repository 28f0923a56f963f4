"""`certificate.json`: how far every served form of a model is from what was trained.

It names the hash of the manifest that it certifies, so that a certificate of other files is known
for one. The manifest does not list it.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmserve.durable import write_json
from llmserve.manifest import CERTIFICATE, MANIFEST, render_manifest

__all__ = [
    "FORMAT",
    "Certificate",
    "FormResult",
    "LayerError",
    "manifest_sha256",
    "write_certificate",
]

FORMAT = "llmserve-certificate-1"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerError:
    """How far the output of one block is from the original's."""

    name: str
    relative_error: float
    """Root of the squared error's sum, relative to the original output's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FormResult:
    """One way of executing the model, beside the training forward of the original."""

    name: str
    """`paged`, `chunked`, `prefix hit`, `decode`, `batched`, or `training forward`."""
    executed_form: str
    """What the arithmetic was."""
    num_rows: int
    """Predictions that were compared."""
    max_logit_error: float
    mean_logit_error: float
    """Absolute, over all logits of those predictions."""
    mean_kl: float
    """Kullback-Leibler divergence from the original's predictions, nats per token."""
    top1_agreement: float
    """Share of predictions with the same likeliest token."""
    perplexity: float
    """On the text that was read."""
    perplexity_low: float
    """Ends of its 95 % interval, from the spread of the losses of single tokens."""
    perplexity_high: float
    scatter: tuple[tuple[float, float], ...]
    """Some logits: the original's, this form's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """Everything that was found of one folder."""

    manifest_sha256: str
    """Of the manifest that is certified; where a single file is, its own."""
    source: str
    """Fingerprint of the original's folder."""
    origin: str
    """What was read: the original's evaluation text, or text that it wrote itself."""
    num_tokens: int
    """Of it."""
    accepted_kl: float
    """Largest mean divergence of a form that is accepted."""
    weight_bytes: int
    """All weights on disk."""
    source_weight_bytes: int
    """The original's."""
    source_perplexity: float
    """Of the original's training forward on the same text."""
    forms: tuple[FormResult, ...]
    layers: tuple[LayerError, ...]

    @property
    def misses(self) -> list[FormResult]:
        """Forms beyond what is accepted; NaN is."""
        return [form for form in self.forms if not form.mean_kl <= self.accepted_kl]

    def as_json(self) -> dict[str, Any]:
        """The certificate as the file holds it."""
        return {"format": FORMAT, **asdict(self)}


def manifest_sha256(folder: Path, *, is_complete: bool) -> str:
    """The hash of the folder's manifest.

    As it is; or as it will be, where the folder is not complete yet or was never given one.
    """
    path = folder / MANIFEST
    is_there = is_complete and path.is_file()
    content = path.read_bytes() if is_there else render_manifest(folder)
    return hashlib.sha256(content).hexdigest()


def write_certificate(folder: Path, certificate: Certificate) -> None:
    """Write `certificate.json` into the folder. Raises `OSError`."""
    write_json(folder / CERTIFICATE, certificate.as_json())
