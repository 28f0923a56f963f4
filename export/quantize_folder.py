"""From a model folder to a quantized one beside it: quantize, measure, report, write.

Nothing appears under the target's name before everything is done. Blocks that are finished lie in
a hidden folder beside it, from which an interrupted quantization goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from llmserve import __version__, failpoints
from llmserve.checkpoint import Checkpoint, save_model
from llmserve.lineage import history_files

from .evaluation_text import EvaluationText, read_calibration_text, read_evaluation_text
from .measure import Comparison
from .quant_measure import Progress, measure_model
from .quant_options import QuantizationOptions
from .quant_plan import HEAD
from .quant_report import REPORT_FILE, QuantizationReport, make_report
from .quant_store import BlockStore
from .quantize import QuantizedModel, quantize_model
from .search_contract import search_contract
from .target import check_target
from .verify import certify

__all__ = ["Progress", "quantize_folder"]


def quantize_folder(
    path: Path,
    out: Path,
    options: QuantizationOptions,
    *,
    overwrite: bool = False,
    on_progress: Progress = lambda stage, done, total: None,
    on_line: Callable[[str], None] = lambda line: None,
) -> QuantizationReport:
    """Quantize the model folder `path` into the folder `out` and say what that cost.

    Args:
        path: a model that is not quantized.
        out: where the quantized model goes; it appears complete or not at all.
        options: what was asked for.
        overwrite: replace `out` if it is a folder that llmserve wrote.
        on_progress: told of every layer and window.
        on_line: told what a search found, line by line.

    Raises `LLMServeError` for whatever the caller can do something about, `OSError` for the disk.
    """
    check_target(path, out, overwrite=overwrite)
    source = Checkpoint.open(path)
    chosen = calibration = None
    if options.measure:
        chosen = read_evaluation_text(
            path, source.config, options.text, max_tokens=options.max_tokens
        )
    if options.is_calibrated:
        calibration = read_calibration_text(
            path, source.config, options.calibration, max_tokens=options.calibration_tokens
        )
    store = _store(out, source, options, calibration, chosen)
    if options.contract is not None and chosen is not None and calibration is not None:
        model = search_contract(source, options, calibration, chosen, on_progress, on_line, store)
    else:
        model = _quantize(source, options, calibration, store, on_progress)
    comparison, cache_comparison = _measure(source, model, options, chosen, on_progress)
    report = make_report(
        source,
        model,
        comparison=comparison,
        cache_comparison=cache_comparison,
        text_sha256=None if chosen is None else chosen.sha256,
        calibration_sha256=None if calibration is None else calibration.sha256,
    )
    _write(source, model, report, out, options, on_progress, overwrite=overwrite)
    if store is not None:
        store.discard()
    return report


def _measure(
    source: Checkpoint, model: QuantizedModel, options: QuantizationOptions,
    text: EvaluationText | None, on_progress: Progress,
) -> tuple[Comparison | None, Comparison | None]:  # fmt: skip
    """What the weights cost, and what they cost with the int8 cache that was asked for."""
    if text is None:
        return None, None
    plain = measure_model(source, model, text.windows, on_progress)
    if not options.has_int8_cache:
        return plain, None
    return plain, measure_model(source, model, text.windows, on_progress, has_int8_cache=True)


def _store(
    out: Path, source: Checkpoint, options: QuantizationOptions, text: EvaluationText | None,
    evaluation: EvaluationText | None,
) -> BlockStore | None:  # fmt: skip
    """Where finished blocks, or what a search measured, are kept meanwhile.

    A search measures the same for all bounds, so these are no part of its plan: where none of the
    points kept the bounds, the next bounds are tried at once.
    """
    if text is None:
        return None
    plan = {
        "version": __version__,
        "source": source.fingerprint,
        "calibration": text.sha256,
        "tokens": sum(map(len, text.windows)),
        **options.plan(),
    }
    if options.contract is not None and evaluation is not None:
        plan |= {"contract": True, "evaluation": evaluation.sha256}
        plan["evaluation_tokens"] = sum(map(len, evaluation.windows))
    return BlockStore(out, plan)


def _quantize(
    source: Checkpoint, options: QuantizationOptions, calibration: EvaluationText | None,
    store: BlockStore | None, on_progress: Progress,
) -> QuantizedModel:  # fmt: skip
    total = sum(
        name.endswith("_proj.weight") and not name.startswith(HEAD) for name in source.names()
    )
    done = 0

    def count(name: str) -> None:
        nonlocal done
        on_progress("quantizing", done, total)
        done += 1

    model = quantize_model(
        source, options.scheme, options.group_size,
        method=options.method, is_symmetric=options.is_symmetric, overrides=options.overrides,
        double_quant=options.double_quant, store=store, on_layer=count,
        windows=() if calibration is None else calibration.windows,
    )  # fmt: skip
    on_progress("quantizing", total, total)
    return model


def _write(
    source: Checkpoint,
    model: QuantizedModel,
    report: QuantizationReport,
    out: Path,
    options: QuantizationOptions,
    on_progress: Progress,
    *,
    overwrite: bool,
) -> None:
    failpoints.hit("quant.write")
    stage = {
        "source": source.fingerprint,
        **options.plan(),
        "scheme": model.scheme,
        "method": model.method,
        "calibration_sha256": report.calibration_sha256,
        "text_sha256": report.text_sha256,
    }
    save_model(
        out,
        source.config,
        model.tensors(source),
        copy_from=source.path,
        extra_files={
            REPORT_FILE: f"{json.dumps(report.as_json(), indent=2)}\n".encode(),
            **history_files(source.path, "quantization", stage),
        },
        has_int8_activations=model.scheme == "w8a8",
        has_int8_cache=options.has_int8_cache,
        overwrite=overwrite,
        on_written=partial(_certify, source, model, on_progress),
    )


def _certify(
    source: Checkpoint, model: QuantizedModel, on_progress: Progress, folder: Path
) -> None:
    on_progress("verifying", 0, 1)
    rounded = [
        f"{name}.weight"
        for name, method in model.methods.items()
        if method == "rtn" and model.method == "rtn"  # nothing was scaled before
    ]
    certify(folder, source, meant=model.tensors(source), rounded=rounded)
    on_progress("verifying", 1, 1)
