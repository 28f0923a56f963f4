"""A verification on the terminal: what is wrong first, then one line for each form."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from .certificate import Certificate
from .verify import Verification

__all__ = ["format_verification"]


def format_verification(path: Path, found: Verification) -> str:
    """The text, without a newline at its end."""
    return "\n".join(_lines(path, found))


def _lines(path: Path, found: Verification) -> Iterator[str]:
    yield f"{path}: {'FAILED' if found.findings else 'verified'}"
    for finding in found.findings:
        yield f"  {finding}"
    for note in found.notes:
        yield f"  note: {note}"
    if found.certificate is not None:
        yield from _figures(found.certificate)


def _figures(certificate: Certificate) -> Iterator[str]:
    yield (
        f"  {certificate.weight_bytes / 1e6:.2f} MB of weights, the original's are "
        f"{certificate.source_weight_bytes / 1e6:.2f} MB; sha256 "
        f"{certificate.manifest_sha256[:12]}"
    )
    if not certificate.forms:
        yield "  the model writes no text: its tensors were compared with their record"
        return
    yield (
        f"  read: {certificate.origin}, {certificate.num_tokens} tokens; the original's perplexity "
        f"is {certificate.source_perplexity:.4f}"
    )
    yield f"  accepted divergence: {certificate.accepted_kl:g} nats a token"
    yield (
        f"  {'form':<16} {'max error':>9} {'mean':>9} {'KL':>9} {'top-1':>8}  "
        f"{'perplexity, 95 %':<26} executed as"
    )
    for form in certificate.forms:
        interval = f"{form.perplexity:.3f} [{form.perplexity_low:.3f}, {form.perplexity_high:.3f}]"
        yield (
            f"  {form.name:<16} {form.max_logit_error:>9.2e} {form.mean_logit_error:>9.2e} "
            f"{form.mean_kl:>9.2e} {100 * form.top1_agreement:>6.2f} %  {interval:<26} "
            f"{form.executed_form}"
        )
    if certificate.layers:
        worst = max(certificate.layers, key=lambda layer: layer.relative_error)
        yield (
            f"  error of the blocks' outputs, weights alone: {worst.relative_error:.2e} at most, "
            f"after {worst.name}"
        )
