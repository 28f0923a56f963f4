"""A fine-tuning at one step, on disk: what is trained, the optimizer's state, and the place.

    weights.safetensors    the trained weights alone, float32; the rest is in the model's folder
    optimizer.safetensors  AdamW's moments
    state.json             steps done and place among the rows

As in pre-training no random generator has a state to be saved: order and dropout follow from seed
and position.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from llmserve.durable import write_json
from llmserve.errors import CheckpointError
from llmserve.model.weights import to_stored
from llmserve.strict_json import read_json
from llmserve.tensor_file import map_tensors, write_tensors

from .checkpoints import TrainingState
from .optimizer_adamw import AdamW

__all__ = ["load_tuned", "load_tuned_weights", "save_tuned"]

_WEIGHTS, _OPTIMIZER, _STATE = "weights.safetensors", "optimizer.safetensors", "state.json"


def save_tuned(
    folder: Path,
    trainable: Mapping[str, nn.Parameter],
    optimizer: AdamW,
    state: TrainingState,
) -> None:
    """Write everything into the staged `folder`."""
    moments = {
        f"{moment}.{name}": value
        for name, parameter in trainable.items()
        for moment, value in optimizer.state.get(parameter, {}).items()
    }
    for name, tensors in ((_WEIGHTS, trainable), (_OPTIMIZER, moments)):
        write_tensors(folder / name, {key: to_stored(value) for key, value in tensors.items()})
    write_json(folder / _STATE, asdict(state))


def load_tuned(
    folder: Path, trainable: Mapping[str, nn.Parameter], optimizer: AdamW
) -> TrainingState:
    """Put a checkpoint back.

    Raises:
        CheckpointError: a file is malformed or does not fit.
    """
    load_tuned_weights(folder, trainable)
    for key, value in _read(folder / _OPTIMIZER).items():
        moment, _, name = key.partition(".")
        if name not in trainable or value.shape not in (trainable[name].shape, torch.Size([])):
            raise CheckpointError(f"{folder / _OPTIMIZER}: {key} does not fit the model")
        optimizer.state[trainable[name]][moment] = value.to(trainable[name].device)
    try:
        return TrainingState(**read_json(folder / _STATE))
    except TypeError as error:
        raise CheckpointError(f"{folder / _STATE}: {error}") from error


def load_tuned_weights(folder: Path, trainable: Mapping[str, nn.Parameter]) -> None:
    """Put a checkpoint's weights alone back.

    Raises:
        CheckpointError: the file is malformed or does not fit; nothing is copied then.
    """
    weights = _read(folder / _WEIGHTS)
    wrong = weights.keys() ^ trainable.keys()
    wrong |= {
        name for name in weights.keys() - wrong if weights[name].shape != trainable[name].shape
    }
    if wrong:
        raise CheckpointError(f"{folder / _WEIGHTS}: does not fit the model: {sorted(wrong)[:3]}")
    with torch.no_grad():
        for name, value in weights.items():
            trainable[name].copy_(value)


def _read(path: Path) -> dict[str, Tensor]:
    return {name: torch.tensor(array.data) for name, array in map_tensors(path).items()}
