"""What a form of a model weighs and how fast it decodes: the other side of what it costs.

Each form runs in a process of its own, as it would be served, and they take turns.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llmserve.checkpoint import Checkpoint

from .offline_contenders import Contender
from .peer_process import EngineProcess

__all__ = ["ROWS", "decode_rates", "form_bytes"]

ROWS = (1, 8)
"""Sequences decoded together."""
INPUT_LEN, OUTPUT_LEN = 32, 64
_WEIGHTS = ("model*.safetensors", "model*.onnx", "model*.onnx.data", "model*.onnx_data")


def form_bytes(folder: Path) -> int:
    """Of the files that hold weights or a graph."""
    return sum(path.stat().st_size for ending in _WEIGHTS for path in folder.glob(ending))


def decode_rates(
    folders: Sequence[Path], *, repeats: int, seed: int = 0
) -> dict[Path, dict[int, list[float]]]:
    """Folder → sequences together → tokens per second of all of them, for each repeat.

    Raises:
        EngineError: a form could not be loaded or failed.
    """
    rates: dict[Path, dict[int, list[float]]] = {
        folder: {count: [] for count in ROWS} for folder in folders
    }
    vocab_size = Checkpoint.open(folders[0], verify=False).config.vocab_size
    rng = np.random.default_rng(seed)
    with contextlib.ExitStack() as stack:
        engines: dict[Path, Contender] = {
            folder: stack.enter_context(EngineProcess.of_ours("offline_engine", str(folder)))
            for folder in folders
        }
        for _ in range(repeats):
            for count in ROWS:
                prompts: list[list[int]] = rng.integers(
                    vocab_size, size=(count, INPUT_LEN)
                ).tolist()
                for folder, engine in engines.items():
                    rates[folder][count].append(engine.decode(prompts, OUTPUT_LEN))
    return rates
