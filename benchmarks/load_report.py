"""The end of a load test: figures printed, results and pages saved, the exit code.

Order: the table and the JSON go to stdout before any file is written, so that a full disk costs
nothing that was measured.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path

import orjson

from llmserve.durable import write_bytes
from llmserve.errors import LLMServeError

from .intervals import load_intervals
from .load_markdown import load_markdown
from .load_table import load_table
from .metrics import compute_metrics
from .noise import warnings_of
from .options import ServeOptions
from .page import load_page
from .record import RequestRecord
from .result import detailed_result, result_filename, serve_result

__all__ = ["report_load"]


def report_load(
    options: ServeOptions,
    model: str,
    records: Sequence[RequestRecord],
    noise: dict[str, object],
    server_metrics: Mapping[str, object] | None,
    *,
    start_s: float,
    end_s: float,
    is_interrupted: bool,
) -> int:
    """Print and save what a run found; 0: every request succeeded, 1: some failed.

    Raises:
        LLMServeError: a file cannot be written; the figures were printed before.
    """
    duration_s, now = end_s - start_s, datetime.now()
    percentiles, slos_ms = options.percentiles, options.slos_ms
    metrics = compute_metrics(
        records, duration_s=duration_s, percentiles=percentiles, slos_ms=slos_ms
    )
    intervals = load_intervals(
        records, start_s=start_s, duration_s=duration_s, percentiles=percentiles, slos_ms=slos_ms
    )
    result = serve_result(
        options, model, metrics, records, intervals, noise, server_metrics,
        now=now, is_interrupted=is_interrupted,
    )  # fmt: skip
    print(load_table(options, model, metrics, intervals, result))
    print(orjson.dumps(result).decode(), flush=True)
    warnings = list(warnings_of(noise))
    for warning in warnings:
        _announce(f"warning: {warning}")
    for kind, number in metrics.errors_by_kind.items():
        example = next(r.error for r in records if r.error_kind == kind)
        _announce(f"{number} requests failed ({kind}), the first so: {example}")
    files = dict(_files(options, result, records, warnings, now, start_s=start_s))
    problems = [problem for path, data in files.items() if (problem := _save(path, data))]
    if problems:
        raise LLMServeError("; ".join(problems))
    return 1 if metrics.failed else 0


def _files(
    options: ServeOptions,
    result: dict[str, object],
    records: Sequence[RequestRecord],
    warnings: Sequence[str],
    now: datetime,
    *,
    start_s: float,
) -> Iterator[tuple[Path, bytes]]:
    """What is to be written where."""
    if options.save_result:
        details = detailed_result(records, start_s=start_s) if options.save_detailed else {}
        name = result_filename(options, str(result["model_id"]), now)
        data = orjson.dumps(result | details, option=orjson.OPT_INDENT_2)
        yield (options.result_dir or Path()) / name, data
    if options.html is not None:
        yield options.html, load_page(result, records, warnings, start_s=start_s).encode()
    if options.markdown is not None:
        yield options.markdown, load_markdown(result, warnings).encode()


def _save(path: Path, data: bytes) -> str:
    """Write a file; what hindered it, for a file that fails need not keep the next from its try."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, data)
    except OSError as error:
        return f"cannot save the result as {path}: {error}"
    _announce(f"saved as {path}")
    return ""


def _announce(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
