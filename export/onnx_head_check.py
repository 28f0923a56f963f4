"""An exported model with a head against the torch model it came from: three texts in one batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from llmserve.config import ModelConfig
from llmserve.errors import ExportError
from llmserve.model.attention import CausalAttention
from llmserve.model.transformer import Transformer
from llmserve.model_files import GRAPH_FILE
from llmserve.quant.dtypes import Float32Array
from llmserve.runners.onnx_session import open_session

from .onnx_check import TOLERANCE

__all__ = ["ROUNDED_SHARE", "check_head"]

ROUNDED_SHARE = 0.1
"""Of the largest score: the error that is accepted where activations are rounded."""

_LENGTHS = (3, 12, 7)
_SEED = 2718


def check_head(
    model: Transformer, folder: Path, config: ModelConfig, *, is_exact: bool = True
) -> float:
    """Compare what the graph in `folder` gives with the model; the largest error of a score.

    Raises `ExportError` beyond `TOLERANCE`, or `ROUNDED_SHARE` where activations are rounded.
    """
    random = np.random.default_rng(_SEED)
    lengths = [min(length, config.max_seq_len) for length in _LENGTHS]
    ids = random.integers(0, config.vocab_size, (len(lengths), max(lengths)))
    mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
    session = open_session(folder / GRAPH_FILE)
    feed = {"input_ids": ids, "attention_mask": mask}
    if config.positions != "none":
        feed["position_ids"] = np.tile(np.arange(max(lengths)), (len(lengths), 1))
    outputs = session.run(None, feed)
    largest = magnitude = 0.0
    for row, length in enumerate(lengths):
        wanted = _wanted(model, ids[row, :length])
        found = _found(config, outputs, row, length)
        largest = float(np.maximum(largest, np.abs(wanted - found).max()))  # NaN stays
        magnitude = max(magnitude, float(np.abs(wanted).max()))
    accepted = TOLERANCE if is_exact else ROUNDED_SHARE * magnitude
    if not largest <= accepted:  # NaN must fail too
        raise ExportError(
            f"the exported graph differs from the model: a score is off by {largest:.3g}, accepted "
            f"are {accepted:.3g}; nothing was written"
        )
    return largest


@torch.inference_mode()
def _wanted(model: Transformer, ids: npt.NDArray[np.int64]) -> Float32Array:
    """Scores of one text, [length, labels]; a classifier's at its end, [1, labels]."""
    attend = CausalAttention(model.config)
    hidden = model.hidden(torch.from_numpy(ids)[None], torch.arange(len(ids)), attend)
    scores: Float32Array = model.scores(hidden)[0].numpy()
    is_sequence = model.config.head is not None and model.config.head.kind == "sequence"
    return scores[-1:] if is_sequence else scores


def _found(config: ModelConfig, outputs: list[Float32Array], row: int, length: int) -> Float32Array:
    assert config.head is not None, "a model without a head has logits"
    if config.head.kind == "sequence":
        return outputs[0][row : row + 1]
    if config.head.kind == "span":
        return np.stack([output[row, :length] for output in outputs], axis=-1)
    return outputs[0][row, :length]
