"""What training adds to a model's lineage: the stages of a run, and of a fine-tuning.

    data → tokenizer → config → run → checkpoint → finetune → merge → quantization → export

A run writes the first five (`make_lineage`), every other command that makes a folder from another
adds one (`llmserve.lineage`). A hash says what was there, not where: nothing in it is a path, so a
folder may be moved and published. `lineage_check.py` holds a chain against what is still there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from llmserve.config import ModelConfig
from llmserve.families import render_config

__all__ = ["finetune_stage", "json_sha256", "make_lineage", "weights_sha256"]


NamedTensor = tuple[str, npt.NDArray[np.float32]]


def make_lineage(
    record: Mapping[str, Any], config: ModelConfig, weights: Iterable[NamedTensor]
) -> dict[str, Any]:
    """The lineage of a finished run's model.

    Args:
        record: `run.json`.
        config: The model.
        weights: Its tensors, in the order of their canonical names.
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


def finetune_stage(record: Mapping[str, Any], weights: Iterable[NamedTensor]) -> dict[str, str]:
    """What the lineage of a fine-tuned model says of its run.

    Args:
        record: The run's `run.json`.
        weights: The model's tensors as they are stored, in the order of their canonical names.
    """
    return {
        "source": record["model_fingerprint"],
        "sha256": weights_sha256(weights),
        "data": record["train_rows_sha256"],
        "run": json_sha256(record),
    }


def json_sha256(value: object) -> str:
    """Digest of a JSON value, whatever the order of its keys and its spaces."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def weights_sha256(weights: Iterable[NamedTensor]) -> str:
    """Digest of tensors by canonical name, in the order of names, whatever layout they lie in."""
    digest = hashlib.sha256()
    for name, tensor in weights:
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        digest.update(np.ascontiguousarray(tensor).data)
    return digest.hexdigest()
