"""The end of a run: the last evaluation, the model folder, the picture and the figures."""

from __future__ import annotations

import json
from typing import Any

from llmserve.lineage import LINEAGE_FILE, TRAINING_LOG
from llmserve.model.transformer import Transformer
from llmserve.model.weights import canonical_tensors
from llmserve.runners.freed_memory import give_back_freed_memory

from .checkpoints import load_final_weights, save_weights
from .curve import draw_loss_curve
from .data_windows import evaluate_text
from .devices import device_of
from .evaluation import HeldOutFigures, unigram_loss
from .lineage import make_lineage
from .log import read_log
from .prepare import PreparedText
from .recipe import TrainingRecipe
from .report import make_result
from .run_folder import RunFolder
from .token_file import TokenFile
from .trainer import Trainer

__all__ = ["finish_run"]

_MAX_EVALUATION_TOKENS = 1 << 18
_MAX_CALIBRATION_TOKENS = 1 << 16


def finish_run(
    folder: RunFolder,
    recipe: TrainingRecipe,
    record: dict[str, Any],
    text: PreparedText,
    trainer: Trainer,
) -> dict[str, Any]:
    """Write what a finished run leaves and return its figures; the record of them comes last.

    The model is that of the last checkpoint, or of the best where the recipe may stop early; its
    weights are the averaged ones where the recipe averages.
    """
    path = folder.best_checkpoint() if recipe.early_stop is not None else None
    path = path or folder.last_checkpoint()
    assert path is not None, "a run ends with a checkpoint"
    give_back_freed_memory()  # each of the threads that trained has kept some of its own
    model = Transformer(trainer.model.config)
    load_final_weights(path, model)
    figures = _evaluate(model.to(device_of(trainer.model)), text, recipe)
    model.cpu()
    tensors = sorted(canonical_tensors(model).items())
    lineage = make_lineage(
        record, model.config, ((name, tensor.numpy()) for name, tensor in tensors)
    )
    save_weights(
        folder.model,
        model,
        tokenizer=folder.tokenizer,
        extra_files={
            LINEAGE_FILE: f"{json.dumps(lineage, indent=2)}\n".encode(),
            TRAINING_LOG: folder.log.read_bytes(),
            "evaluation.txt": _excerpt(text, text.held_out, _MAX_EVALUATION_TOKENS),
            "calibration.txt": _excerpt(text, text.train, _MAX_CALIBRATION_TOKENS),
        },
        overwrite=True,
    )
    draw_loss_curve(folder.picture, read_log(folder.log), unigram_loss=figures.unigram_loss)
    result = make_result(figures, trainer)
    folder.write_result(result)
    return result


def _evaluate(model: Transformer, text: PreparedText, recipe: TrainingRecipe) -> HeldOutFigures:
    """The figures of the whole held-out text, in float32."""
    loss, num_tokens = evaluate_text(
        model, text.held_out, recipe, end_id=text.tokenizer.eos_token_id
    )
    return HeldOutFigures(
        loss=loss,
        unigram_loss=unigram_loss(text.train.ids, text.held_out.ids, model.config.vocab_size),
        num_tokens=num_tokens,
        num_bytes=text.held_out.text_bytes,
    )


def _excerpt(text: PreparedText, half: TokenFile, max_tokens: int) -> bytes:
    """Text that stays with the model: held-out, to measure on what is made of it; trained on, to
    calibrate that.

    Document separators stand in it as the special token's text, so that the model's tokenizer
    makes the same ids of it again.
    """
    ids = half.ids[:max_tokens].tolist()
    return text.tokenizer.decode(ids, skip_special_tokens=False).encode()
