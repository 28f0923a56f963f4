"""A run at one step, on disk: everything that the next step depends on.

    model/                 the weights, as a model folder that can be served
    optimizer.safetensors  AdamW's moments
    state.json             steps done, place in the text, planned steps

There is no state of a random generator to save: the order of the text and each step's dropout
follow from (seed, position), so that the position is the whole state. A checkpoint lies between
two optimizer steps; micro-batches of an unfinished step are computed again.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from llmserve.checkpoint import Checkpoint
from llmserve.config import ModelConfig
from llmserve.durable import write_json
from llmserve.errors import CheckpointError
from llmserve.model.transformer import Transformer
from llmserve.model.weights import canonical_tensors, load_canonical, to_stored
from llmserve.model_folder import save_model
from llmserve.strict_json import read_json
from llmserve.tensor_file import map_tensors, write_tensors

from .optimizer import load_optimizer_tensors, optimizer_tensors

__all__ = ["TrainingState", "load_checkpoint", "save_checkpoint", "save_weights"]


@dataclass(slots=True, kw_only=True)
class TrainingState:
    """Where a run is."""

    step: int = 0
    """Optimizer steps done, skipped ones too."""
    position: int = 0
    """Windows of text read."""
    planned_steps: int | None = None
    """Steps of the whole run; None while the first ones are being timed."""
    skipped_in_row: int = 0
    """Steps skipped since the last one that was not."""
    seconds: float = 0.0
    """Time spent in optimizer steps."""


def save_checkpoint(
    folder: Path,
    model: Transformer,
    optimizer: torch.optim.AdamW,
    state: TrainingState,
    *,
    tokenizer: Path,
) -> None:
    """Write everything into the staged `folder`."""
    save_weights(folder / "model", model, tokenizer=tokenizer)
    tensors = optimizer_tensors(optimizer, model)
    write_tensors(
        folder / "optimizer.safetensors",
        {name: to_stored(tensor) for name, tensor in tensors.items()},
    )
    write_json(folder / "state.json", asdict(state))


def save_weights(
    folder: Path,
    model: Transformer,
    *,
    tokenizer: Path,
    extra_files: dict[str, bytes] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a model folder with the tokenizer of the folder `tokenizer`."""
    tensors = {name: to_stored(tensor) for name, tensor in canonical_tensors(model).items()}
    save_model(
        folder,
        model.config,
        tensors,
        copy_from=tokenizer,
        extra_files=extra_files or {},
        overwrite=overwrite,
    )


def load_checkpoint(
    folder: Path, model: Transformer, optimizer: torch.optim.AdamW
) -> TrainingState:
    """Put the checkpoint back into `model` and `optimizer`.

    Raises:
        CheckpointError: a file is malformed or does not fit the model.
    """
    checkpoint = Checkpoint.open(folder / "model", verify=False)  # the whole folder was, just now
    _check_config(folder, checkpoint.config, model.config)
    weights = {name: torch.tensor(checkpoint.float32(name)) for name in checkpoint.names()}
    load_canonical(model, weights)
    arrays = map_tensors(folder / "optimizer.safetensors")
    load_optimizer_tensors(
        optimizer, model, {name: torch.tensor(array.data) for name, array in arrays.items()}
    )
    try:
        return TrainingState(**read_json(folder / "state.json"))
    except TypeError as error:
        raise CheckpointError(f"{folder / 'state.json'}: {error}") from error


def _check_config(folder: Path, found: ModelConfig, expected: ModelConfig) -> None:
    if found != expected:
        raise CheckpointError(f"{folder}: holds a model of another shape than the recipe's")
