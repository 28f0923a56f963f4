"""Exporting a model folder to ONNX: built by hand, checked step by step, then put in place.

The folder that appears holds `model.onnx` (and `model.onnx.data` where the weights are large),
`config.json` and the tokenizer's files, `genai_config.json` for onnxruntime-genai, `export.json`
with the figures of the check, the certificate with what it is held to (`verify.py`), the lineage
and the manifest. If a check fails, no folder appears.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from llmserve.checkpoint import Checkpoint
from llmserve.durable import StagedFolder, write_bytes, write_json
from llmserve.families import render_config, render_generation_config
from llmserve.lineage import history_files
from llmserve.model.transformer import Transformer
from llmserve.model.weights import load_canonical, load_model
from llmserve.model_folder import TOKENIZER_FILES
from llmserve.runners.onnx_session import EXPORT_FILE

from .onnx_check import KL_TOLERANCE, TOLERANCE, ParityResult, check_parity
from .onnx_decoder import build_decoder
from .onnx_files import check_files, write_graph
from .onnx_genai import GENAI_FILE, render_genai_config
from .onnx_graph import OPSET
from .onnx_head_check import check_head
from .onnx_linear import Scheme
from .onnx_session import OnnxDecoder
from .onnx_weights import GraphWeights
from .target import check_target
from .verify import certify

__all__ = ["EXPORT_FILE", "OnnxExport", "export_onnx"]

_CHECK_ROOM = 96
"""Tokens of a row in the check: its longest prompt and what is generated, with some to spare."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxExport:
    """What was written, and how close it is to the model."""

    num_bytes: int
    """Size of the graph with its weights."""
    form: str
    """The numbers in the graph, for people."""
    float_layers: tuple[str, ...]
    """Quantized layers whose form the graph has no product for; float32 in the graph."""
    parity: ParityResult | None
    """The comparison with torch of a model that writes text."""
    head_error: float | None
    """The largest error of a score of a model with a head."""


def export_onnx(
    path: Path,
    out: Path,
    *,
    scheme: Scheme | None = None,
    overwrite: bool = False,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> OnnxExport:
    """Export the model folder `path` into the folder `out`.

    Args:
        path: any model that llmserve opens.
        out: where the graph goes; the folder appears complete and checked, or not at all.
        scheme: numbers of the linear layers; None: those of the folder.
        overwrite: replace `out` if it is a folder that llmserve wrote.
        on_stage: told what is being done.

    Raises:
        CheckpointError: the model cannot be opened.
        ConfigError: `out` must not be written, the model has a part that the graph has none for,
            or it is quantized in another way than `scheme` says.
        ExportError: the graph does not give what the model gives, or weights are not finite.
    """
    check_target(path, out, overwrite=overwrite)
    source = Checkpoint.open(path)
    weights = GraphWeights(source, scheme)
    with StagedFolder(out, overwrite=overwrite) as staged:
        on_stage("building the graph")
        graph = build_decoder(
            source.config, source.float32, None if weights.is_exact else weights.linear
        )
        write_graph(graph, staged.path)
        num_bytes = sum(file.stat().st_size for file in staged.path.iterdir())
        on_stage("checking its form")
        check_files(staged.path)
        on_stage("comparing it with torch, token by token")
        model = _rounded_model(source, weights)
        parity, head_error = _check(model, weights, staged.path)
        result = OnnxExport(
            num_bytes=num_bytes,
            form=weights.form,
            float_layers=tuple(weights.float_layers),
            parity=parity,
            head_error=head_error,
        )
        _write_companions(source, weights, staged.path, result)
        certify(staged.path, source, weights=weights.float32, on_stage=on_stage)
    return result


def _check(
    model: Transformer, weights: GraphWeights, folder: Path
) -> tuple[ParityResult | None, float | None]:
    config = model.config
    if config.head is not None:
        return None, check_head(model, folder, config, is_exact=weights.is_exact)
    decoder = OnnxDecoder(folder, max_len=min(config.max_seq_len, _CHECK_ROOM))
    return check_parity(model, decoder, config, is_exact=weights.is_exact), None


def _rounded_model(source: Checkpoint, weights: GraphWeights) -> Transformer:
    """The model in torch with the weights that the graph has; a tied head is the embedding."""
    model = load_model(source, dtype=torch.float32)
    if not weights.is_exact:
        tensors = {name: torch.tensor(weights.float32(name)) for name in source.names()}
        load_canonical(model, tensors)
    return model


def _write_companions(
    source: Checkpoint, weights: GraphWeights, folder: Path, result: OnnxExport
) -> None:
    write_json(folder / "config.json", render_config(source.config))
    write_json(folder / "generation_config.json", render_generation_config(source.config))
    for name in TOKENIZER_FILES:
        if (source.path / name).is_file():
            write_bytes(folder / name, (source.path / name).read_bytes())
    if source.config.head is None:
        write_json(folder / GENAI_FILE, render_genai_config(source.config))
    values: dict[str, Any] = {"format": "onnx", "opset": OPSET, "scheme": weights.scheme}
    values |= {"tolerance": TOLERANCE, "kl_tolerance": KL_TOLERANCE}
    write_json(folder / EXPORT_FILE, values | asdict(result))
    stage = {"source": source.fingerprint, "format": "onnx", "scheme": weights.scheme}
    for name, data in history_files(source.path, "export", stage).items():
        write_bytes(folder / name, data)
