"""`lineage.json`: what a model was made from, stage by stage, as content hashes.

    data → tokenizer → config → run → checkpoint → quantization → export

A run writes the first five (`make_lineage`); each command that makes a folder from another copies
them and adds its own stage, which names its source by the hash of the source's manifest. A hash
says what was there, not where: nothing in it is a path, so a folder may be moved and published.
`lineage_check.py` holds a chain against what is still there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from llmserve.config import ModelConfig
from llmserve.families import render_config

__all__ = ["LINEAGE_FILE", "json_sha256", "make_lineage", "weights_sha256"]

LINEAGE_FILE = "lineage.json"


def make_lineage(
    record: Mapping[str, Any], config: ModelConfig, weights: Mapping[str, npt.NDArray[np.float32]]
) -> dict[str, Any]:
    """The lineage of a finished run's model.

    Args:
        record: `run.json`.
        config: The model.
        weights: Its tensors by canonical name.
    """
    recipe = record["recipe"]
    return {
        "data": {
            "sha256": record["text_sha256"],
            "files": record["files"],
            "cleaning": recipe["cleaning"],
        },
        "tokenizer": {"sha256": record["tokenizer_sha256"]},
        "config": {"sha256": json_sha256(render_config(config))},
        "run": {"sha256": json_sha256(record), "steps": record["planned_steps"]},
        "checkpoint": {"sha256": weights_sha256(weights)},
    }


def json_sha256(value: object) -> str:
    """Digest of a JSON value, whatever the order of its keys and its spaces."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def weights_sha256(weights: Mapping[str, npt.NDArray[np.float32]]) -> str:
    """Digest of tensors by canonical name, whatever layout they are saved in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        digest.update(np.ascontiguousarray(tensor).data)
    return digest.hexdigest()
