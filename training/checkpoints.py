"""A run at one step, on disk: everything that the next step depends on.

    model/                 the weights, as a model folder that can be served
    optimizer.safetensors  the optimizer's state
    average.safetensors    the averaged weights, if the run keeps them
    state.json             steps done, place in the text, planned steps, scale of the loss

Where several processes share the weights themselves, their shards stand in the place of the first
three (`distributed_checkpoint.py`). There is no state of a random generator to save: the order of
the text and each step's dropout follow from (seed, position), so that the position is the whole
state. A checkpoint lies between two optimizer steps; micro-batches of an unfinished step are
computed again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from llmserve.checkpoint import Checkpoint
from llmserve.config import ModelConfig
from llmserve.durable import write_json
from llmserve.errors import CheckpointError
from llmserve.model.transformer import Transformer
from llmserve.model.weights import canonical_tensors, load_canonical, to_stored
from llmserve.model_folder import save_model
from llmserve.strict_json import read_json
from llmserve.tensor_file import map_tensors, write_tensors

from .distributed import ALONE, Processes
from .distributed_checkpoint import INDEX_NAME, ShardedTensors, write_shards
from .distributed_weights import is_sharded
from .optimizer import Optimizer, load_optimizer_tensors, optimizer_tensors
from .weight_average import WeightAverage

__all__ = [
    "TrainingState",
    "load_checkpoint",
    "load_final_weights",
    "save_checkpoint",
    "save_weights",
]

_AVERAGE = "average.safetensors"


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
    loss_scale: float = 1.0
    """What the loss is multiplied with before the backward pass; a power of two."""
    steps_at_scale: int = 0
    """Steps since the scale last changed."""
    best_held_out_loss: float | None = None
    """The lowest held-out loss so far."""
    evaluations_since_best: int = 0
    """Evaluations since that one."""


def save_checkpoint(
    folder: Path,
    model: Transformer,
    optimizer: Optimizer,
    state: TrainingState,
    *,
    tokenizer: Path,
    average: WeightAverage | None = None,
    processes: Processes = ALONE,
) -> None:
    """Write everything into the staged `folder`; the first process alone, unless it is sharded."""
    if is_sharded(model):
        weights = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
        averaged = {} if average is None else average.tensors
        weights |= {f"average.{name}": tensor for name, tensor in averaged.items()}
        write_shards(folder, weights | optimizer_tensors(optimizer, model), processes)
    elif processes.is_first:
        save_weights(folder / "model", model, tokenizer=tokenizer)
        _write(folder / "optimizer.safetensors", optimizer_tensors(optimizer, model))
        if average is not None:
            _write(folder / _AVERAGE, average.tensors)
    if processes.is_first:
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
    folder: Path,
    model: Transformer,
    optimizer: Optimizer,
    *,
    average: WeightAverage | None = None,
    processes: Processes = ALONE,
) -> TrainingState:
    """Put the checkpoint back into `model`, `optimizer` and `average`.

    Raises:
        CheckpointError: a file is malformed or does not fit the model.
    """
    if (folder / INDEX_NAME).is_file():
        _load_shards(ShardedTensors(folder), model, optimizer, average, processes)
    elif is_sharded(model):
        raise CheckpointError(
            f"{folder}: one process wrote it, and several cannot share what it holds; go on with "
            "one process, or begin anew"
        )
    else:
        _load_model(folder, model)
        load_optimizer_tensors(optimizer, model, _read(folder / "optimizer.safetensors"))
        if average is not None:
            average.load(_read(folder / _AVERAGE))
    try:
        return TrainingState(**read_json(folder / "state.json"))
    except TypeError as error:
        raise CheckpointError(f"{folder / 'state.json'}: {error}") from error


def load_final_weights(folder: Path, model: Transformer) -> None:
    """Put a checkpoint's weights into a whole `model`: the averaged ones where there are any.

    Raises:
        CheckpointError: a file is malformed or does not fit the model.
    """
    if (folder / INDEX_NAME).is_file():
        shards = ShardedTensors(folder)
        is_averaged = any(name.startswith("average.") for name in shards.names())
        kind = "average" if is_averaged else "model"
        weights = {n: shards.whole(f"{kind}.{n}") for n, _ in model.named_parameters()}
    elif (folder / _AVERAGE).is_file():
        weights = _read(folder / _AVERAGE)
    else:
        _load_model(folder, model)
        return
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    if shapes != {name: tensor.shape for name, tensor in weights.items()}:
        raise CheckpointError(f"{folder}: its weights do not fit the recipe's model")
    model.load_state_dict(weights)


def _load_model(folder: Path, model: Transformer) -> None:
    checkpoint = Checkpoint.open(folder / "model", verify=False)  # the whole folder was, just now
    _check_config(folder, checkpoint.config, model.config)
    weights = {name: torch.tensor(checkpoint.float32(name)) for name in checkpoint.names()}
    load_canonical(model, weights)


def _load_shards(
    shards: ShardedTensors,
    model: Transformer,
    optimizer: Optimizer,
    average: WeightAverage | None,
    processes: Processes,
) -> None:
    parameters = dict(model.named_parameters())
    averaged = {} if average is None else average.tensors
    for kind, tensors in (("model", parameters), ("average", averaged)):
        for name, tensor in tensors.items():
            shards.fill(f"{kind}.{name}", tensor.detach(), processes)
    state = {}
    for name in shards.names():
        part, _, parameter = name.partition(".")
        if part not in ("model", "average"):
            is_count = part == "step"
            state[name] = torch.zeros(()) if is_count else torch.zeros_like(parameters[parameter])
            shards.fill(name, state[name].detach(), processes)
    load_optimizer_tensors(optimizer, model, state)


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    write_tensors(path, {name: to_stored(tensor) for name, tensor in tensors.items()})


def _read(path: Path) -> dict[str, Tensor]:
    return {name: torch.tensor(array.data) for name, array in map_tensors(path).items()}


def _check_config(folder: Path, found: ModelConfig, expected: ModelConfig) -> None:
    if found != expected:
        raise CheckpointError(f"{folder}: holds a model of another shape than the recipe's")
