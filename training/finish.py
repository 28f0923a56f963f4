"""The end of a run: the last evaluation, the model folder, the picture and the figures."""

from __future__ import annotations

import json
from typing import Any

from llmserve.model.weights import canonical_tensors

from .checkpoints import save_weights
from .curve import draw_loss_curve
from .data_windows import evaluate_text
from .evaluation import HeldOutFigures, unigram_loss
from .lineage import LINEAGE_FILE, make_lineage
from .log import LOG_NAME, read_log
from .prepare import PreparedText
from .recipe import TrainingRecipe
from .report import make_result
from .run_folder import RunFolder
from .trainer import Trainer

__all__ = ["finish_run"]

_MAX_EVALUATION_TOKENS = 1 << 18


def finish_run(
    folder: RunFolder,
    recipe: TrainingRecipe,
    record: dict[str, Any],
    text: PreparedText,
    trainer: Trainer,
) -> dict[str, Any]:
    """Write what a finished run leaves and return its figures; the record of them comes last."""
    loss, num_tokens = evaluate_text(
        trainer.model, text.held_out, recipe, end_id=text.tokenizer.eos_token_id
    )
    figures = HeldOutFigures(
        loss=loss,
        unigram_loss=unigram_loss(
            text.train.ids[:], text.held_out.ids[:], trainer.model.config.vocab_size
        ),
        num_tokens=num_tokens,
        num_bytes=text.held_out.text_bytes,
    )
    tensors = canonical_tensors(trainer.model)
    weights = {name: tensor.numpy() for name, tensor in tensors.items()}
    lineage = make_lineage(record, trainer.model.config, weights)
    save_weights(
        folder.model,
        trainer.model,
        tokenizer=folder.tokenizer,
        extra_files={
            LINEAGE_FILE: f"{json.dumps(lineage, indent=2)}\n".encode(),
            LOG_NAME: folder.log.read_bytes(),
            "evaluation.txt": _evaluation_text(text),
        },
        overwrite=True,
    )
    draw_loss_curve(folder.picture, read_log(folder.log), unigram_loss=figures.unigram_loss)
    result = make_result(figures, trainer)
    folder.write_result(result)
    return result


def _evaluation_text(text: PreparedText) -> bytes:
    """Held-out text that stays with the model, to measure on what is made of it.

    Document separators stand in it as the special token's text, so that the model's tokenizer
    makes the same ids of it again.
    """
    ids = text.held_out.ids[:_MAX_EVALUATION_TOKENS].tolist()
    return text.tokenizer.decode(ids, skip_special_tokens=False).encode()
