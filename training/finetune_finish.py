"""The end of a fine-tuning: figures, the model folder, the adapter, the picture."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from llmserve.adapters import save_adapter
from llmserve.checkpoint import save_model
from llmserve.families import family_of
from llmserve.lineage import LINEAGE_FILE, TRAINING_LOG, extended_lineage
from llmserve.model.weights import to_stored
from llmserve.model_folder import WeightValue
from llmserve.quant.dtypes import to_float32

from .curve import draw_loss_curve
from .finetune_checkpoints import load_tuned_weights
from .finetune_data import Examples
from .finetune_prepare import Prepared
from .finetune_trainer import FinetuneTrainer
from .lineage import finetune_stage
from .log import read_log
from .run_folder import RunFolder
from .run_loop import Reporter

__all__ = ["finish_finetuning"]


def finish_finetuning(
    folder: RunFolder,
    prepared: Prepared,
    record: dict[str, Any],
    trainer: FinetuneTrainer,
    reporter: Reporter,
) -> dict[str, Any]:
    """Write what a finished run leaves and return its figures; the record of them comes last.

    The weights of the best checkpoint, if they are to be kept, are put into the model first.
    """
    recipe, examples = prepared.recipe, prepared.examples
    best = folder.best_checkpoint() if recipe.keep == "best" else None
    kept_step = trainer.state.step
    if best is not None:
        load_tuned_weights(best, trainer.trainable)
        kept_step = int(best.name.removeprefix("step-"))
    after = _figures(trainer, examples)
    tensors = trainer.tuned.tensors()
    _save_model(folder, prepared, record, tensors, reporter)
    _save_adapter(folder, prepared)
    draw_loss_curve(folder.picture, read_log(folder.log))
    result = {
        "task": recipe.task,
        "method": recipe.method,
        "before": record.get("before"),
        "after": after,
        **examples.counts,
        "steps": trainer.state.step,
        "kept_step": kept_step,
        "passes": trainer.state.step / trainer.steps_per_epoch,
        "seconds": trainer.state.seconds,
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "trained_parameters": sum(p.numel() for p in trainer.trainable.values()),
    }
    folder.write_result(result)
    return result


def _figures(trainer: FinetuneTrainer, examples: Examples) -> dict[str, float] | None:
    if not examples.held_out:
        return None
    loss = trainer.held_out_loss(examples.held_out)
    return {"held_out_loss": loss, **trainer.figures(examples.held_out)}


def _save_model(
    folder: RunFolder,
    prepared: Prepared,
    record: dict[str, Any],
    tensors: dict[str, Tensor],
    reporter: Reporter,
) -> None:
    """The whole model, in the type and, where it can be, the family of the base."""
    config, base, task = prepared.tuned.config, prepared.checkpoint, prepared.task
    ids = tuple(dict.fromkeys((*task.end_ids(), *config.eos_token_ids)))
    config = dataclasses.replace(config, eos_token_ids=ids)
    family, before = family_of(config), family_of(base.config)
    if family != before:
        reporter.note(f"no class of {before} has this head: the folder is of model_type {family}")
    dtype = getattr(torch, config.dtype)
    stored = {name: to_stored(tensor.to(dtype)) for name, tensor in tensors.items()}
    stage = finetune_stage(record, ((name, to_float32(stored[name])) for name in sorted(stored)))
    save_model(
        folder.model,
        config,
        stored,
        copy_from=base.path,
        extra_files={
            LINEAGE_FILE: extended_lineage(base.path, "finetune", stage),
            TRAINING_LOG: folder.log.read_bytes(),
            **task.special_files(),
        },
        overwrite=True,
    )


def _save_adapter(folder: RunFolder, prepared: Prepared) -> None:
    """LoRA's matrices, unless a new head belongs to them, and what they fit."""
    tuned, base = prepared.tuned, prepared.checkpoint
    adapter = tuned.adapter()
    if adapter is None or tuned.config.head is not None:
        return
    save_adapter(folder.adapter, adapter, overwrite=True)
    if tuned.frozen and base.quantization is None:
        values: dict[str, WeightValue] = {
            name: tuned.frozen[layer] if layer in tuned.frozen else base.stored(name)
            for name in base.names()
            for layer in (name.removesuffix(".weight"),)
        }
        save_model(folder.base, base.config, values, copy_from=base.path, overwrite=True)
