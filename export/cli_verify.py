"""`llmserve verify`: compare what is served of a model with what was trained."""

from __future__ import annotations

import argparse
from pathlib import Path

from llmserve.errors import MissingDependencyError

__all__ = ["add_arguments", "run"]

_DESCRIPTION = """\
Compare every form in which a model folder is served with the original's training forward in torch:
whole prompts through the paged cache, chunks, single tokens, prefix hits and batches, in the
numbers that the folder's weights are executed in. For each: largest and mean logit error, KL
divergence, agreement of the likeliest token, perplexity with its 95 % interval; and the error of
every block's output.

Every export leaves in its folder what this needs: a sha256 for each tensor, and the original's
logits on some texts. So a folder is verified alone, and a tensor or a setting that was changed is
named even if the manifest was rewritten. --against compares with the original's folder instead. A
folder that is not quantized and holds no record is compared with its own training forward.

Of a GGUF file, what its own tensors and header amount to is run in torch; X.certificate.json and
X.reference.logits lie beside X.gguf.

Where nothing is wrong, certificate.json is written into the folder, and the server shows it at
/v1/models. Exit code 1: something is wrong, and is named.
"""

_EXAMPLES = """\
examples:
  llmserve verify run/model-int8
  llmserve verify run/model-int8 run/model-onnx --html report.html
  llmserve verify run/model-q8_0.gguf
  llmserve verify others/model-int4 --against others/model
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's arguments."""
    parser.description = _DESCRIPTION
    parser.epilog = _EXAMPLES
    parser.add_argument(
        "models",
        type=Path,
        nargs="+",
        metavar="MODEL",
        help="model folder, an exported one, or a GGUF file",
    )
    parser.add_argument(
        "--against", type=Path, metavar="FOLDER", help="the original (default: what was recorded)"
    )
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="write a page with plots too; one that exists is "
        "replaced",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Verify each folder or file; 1 if something is wrong with one."""
    from llmserve.console import console
    from llmserve.durable import write_bytes

    try:
        from .gguf_certificate import verify_gguf
        from .report_html import render_report
        from .report_text import format_verification
        from .verify import verify_folder
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            str(error.name), extra="torch", feature="verifying a model"
        ) from error
    results = []
    for model in args.models:
        with console().status("reading") as status:
            verify = verify_gguf if model.is_file() else verify_folder
            found = verify(model, against=args.against, on_stage=lambda stage: status.update(stage))
        print(format_verification(model, found), flush=True)
        results.append((model, found))
    if args.html is not None:
        write_bytes(args.html, render_report(results).encode())
        print(f"report: {args.html}")
    return int(any(found.findings for _, found in results))
