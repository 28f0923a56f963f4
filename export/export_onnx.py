"""Exporting a model folder to ONNX: built by hand, checked step by step, then put in place.

The folder that appears holds `model.onnx` (and `model.onnx.data` where the weights are large),
`config.json` and the tokenizer's files, `export.json` with the figures of the check, the lineage
and the manifest. If the check fails, no folder appears.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from llmserve.checkpoint import Checkpoint
from llmserve.durable import StagedFolder, write_bytes, write_json
from llmserve.families import render_config, render_generation_config
from llmserve.model.weights import load_model
from llmserve.model_folder import TOKENIZER_FILES

from .lineage import LINEAGE_FILE, extended_lineage
from .onnx_check import TOLERANCE, ParityResult, check_parity
from .onnx_decoder import build_decoder
from .onnx_files import check_files, write_graph
from .onnx_graph import OPSET
from .onnx_session import OnnxDecoder
from .target import check_target

__all__ = ["EXPORT_FILE", "OnnxExport", "export_onnx"]

EXPORT_FILE = "export.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxExport:
    """What was written, and how close it is to the model."""

    num_bytes: int
    """Size of the graph with its weights."""
    parity: ParityResult
    """The comparison with torch."""
    dequantized_from: str | None
    """Form of the weights in the model folder, where they were quantized; the graph's are float32.
    """


def export_onnx(
    path: Path,
    out: Path,
    *,
    overwrite: bool = False,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> OnnxExport:
    """Export the model folder `path` into the folder `out`, as float32.

    Args:
        path: any model that llmserve opens.
        out: where the graph goes; the folder appears complete and checked, or not at all.
        overwrite: replace `out` if it is a folder that llmserve wrote.
        on_stage: told what is being done.

    Raises:
        CheckpointError: the model cannot be opened.
        ConfigError: `out` must not be written.
        ExportError: the graph does not give what the model gives.
    """
    check_target(path, out, overwrite=overwrite)
    source = Checkpoint.open(path)
    with StagedFolder(out, overwrite=overwrite) as staged:
        on_stage("building the graph")
        write_graph(build_decoder(source.config, source.float32), staged.path)
        num_bytes = sum(file.stat().st_size for file in staged.path.iterdir())
        on_stage("checking its form")
        check_files(staged.path)
        on_stage("comparing it with torch, token by token")
        model = load_model(source, dtype=torch.float32)
        parity = check_parity(model, OnnxDecoder(staged.path, source.config), source.config)
        result = OnnxExport(
            num_bytes=num_bytes,
            parity=parity,
            dequantized_from=source.quantization.scheme if source.quantization else None,
        )
        _write_companions(source, staged.path, result)
    return result


def _write_companions(source: Checkpoint, folder: Path, result: OnnxExport) -> None:
    write_json(folder / "config.json", render_config(source.config))
    write_json(folder / "generation_config.json", render_generation_config(source.config))
    for name in TOKENIZER_FILES:
        if (source.path / name).is_file():
            write_bytes(folder / name, (source.path / name).read_bytes())
    values = {"format": "onnx", "opset": OPSET, "dtype": "float32", "tolerance": TOLERANCE}
    write_json(folder / EXPORT_FILE, values | asdict(result))
    stage = {"source": source.fingerprint, "format": "onnx"}
    write_bytes(folder / LINEAGE_FILE, extended_lineage(source.path, "export", stage))
