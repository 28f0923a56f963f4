"""From a model folder to a quantized one beside it: quantize, measure, report, write.

Nothing appears under the target's name before everything is done.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import torch

from llmserve import failpoints
from llmserve.checkpoint import Checkpoint, save_model
from llmserve.durable import StagedFolder
from llmserve.model.weights import load_canonical, load_model

from .evaluation_text import EvaluationText, read_evaluation_text
from .lineage import LINEAGE_FILE, extended_lineage
from .measure import Comparison, compare_models
from .quant_report import REPORT_FILE, QuantizationReport, make_report
from .quantize import QuantizedModel, Scheme, quantize_model
from .target import check_target
from .verify import certify

__all__ = ["Progress", "quantize_folder"]

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, how much of it is done and how much there is."""


def quantize_folder(
    path: Path,
    out: Path,
    *,
    scheme: Scheme,
    group_size: int | None = None,
    measure: bool = True,
    text: Path | None = None,
    max_tokens: int = 16_384,
    overwrite: bool = False,
    on_progress: Progress = lambda stage, done, total: None,
) -> QuantizationReport:
    """Quantize the model folder `path` into the folder `out` and say what that cost.

    Args:
        path: a model that is not quantized.
        out: where the quantized model goes; it appears complete or not at all.
        scheme: int8, int4, nf4 or bnb-int8.
        group_size: int8 and int4: weights that share a scale; None: a whole row.
        measure: run both models over a text and compare them.
        text: the text; None: `evaluation.txt` in `path`.
        max_tokens: most tokens of it.
        overwrite: replace `out` if it is a folder that llmserve wrote.
        on_progress: told of every layer and window.

    Raises `LLMServeError` for whatever the caller can do something about, `OSError` for the disk.
    """
    check_target(path, out, overwrite=overwrite)
    source = Checkpoint.open(path)
    chosen = None
    if measure:
        chosen = read_evaluation_text(path, source.config, text, max_tokens=max_tokens)
    model = _quantize(source, scheme, group_size, on_progress)
    comparison = None if chosen is None else _measure(source, model, chosen, on_progress)
    report = make_report(
        source, model, comparison=comparison, text_sha256=None if chosen is None else chosen.sha256
    )
    _write(source, model, report, out, on_progress, overwrite=overwrite)
    return report


def _quantize(
    source: Checkpoint, scheme: Scheme, group_size: int | None, on_progress: Progress
) -> QuantizedModel:
    total = sum(name.endswith("_proj.weight") for name in source.names())
    done = 0

    def count(name: str) -> None:
        nonlocal done
        on_progress("quantizing", done, total)
        done += 1

    model = quantize_model(source, scheme, group_size, on_layer=count)
    on_progress("quantizing", total, total)
    return model


def _measure(
    source: Checkpoint, model: QuantizedModel, text: EvaluationText, on_progress: Progress
) -> Comparison:
    reference = load_model(source, dtype=torch.float32)
    candidate = copy.deepcopy(reference)
    weights = {name: torch.tensor(model.float32(source, name)) for name in source.names()}
    load_canonical(candidate, weights)
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        on_progress("measuring", done, len(text.windows))

    on_progress("measuring", 0, len(text.windows))
    return compare_models(reference, candidate, text.windows, on_window=count)


def _write(
    source: Checkpoint,
    model: QuantizedModel,
    report: QuantizationReport,
    out: Path,
    on_progress: Progress,
    *,
    overwrite: bool,
) -> None:
    failpoints.hit("quant.write")
    stage = {
        "source": source.fingerprint,
        "scheme": model.scheme,
        "group_size": model.group_size,
        "text_sha256": report.text_sha256,
    }
    with StagedFolder(out, overwrite=overwrite) as staged:
        save_model(
            staged.path,
            source.config,
            model.tensors(source),
            copy_from=source.path,
            extra_files={
                REPORT_FILE: f"{json.dumps(report.as_json(), indent=2)}\n".encode(),
                LINEAGE_FILE: extended_lineage(source.path, "quantization", stage),
            },
        )
        certify(staged.path, source, on_stage=lambda name: on_progress(name, 1, 1))
