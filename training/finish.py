"""The end of a run: the last evaluation, the model folder, the picture and the figures."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from llmserve.model.weights import canonical_tensors

from .checkpoints import save_weights
from .curve import draw_loss_curve
from .evaluation import HeldOutFigures, held_out_loss, unigram_loss
from .log import LOG_NAME, read_log
from .prepare import PreparedText
from .recipe import TrainingRecipe
from .report import make_lineage, make_result
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
    """Write what a finished run leaves and return its figures; the record of them comes last."""
    figures = HeldOutFigures(
        loss=held_out_loss(trainer.model, text.held_out.ids, context=recipe.max_seq_len),
        unigram_loss=unigram_loss(
            text.train.ids, text.held_out.ids, trainer.model.config.vocab_size
        ),
        num_tokens=len(text.held_out.ids) - 1,
        num_bytes=text.held_out.text_bytes,
    )
    lineage = make_lineage(record, trainer.model.config, weights_sha256=_weights_sha256(trainer))
    save_weights(
        folder.model,
        trainer.model,
        tokenizer=folder.tokenizer,
        extra_files={
            "lineage.json": f"{json.dumps(lineage, indent=2)}\n".encode(),
            LOG_NAME: folder.log.read_bytes(),
            "evaluation.txt": _excerpt(text, text.held_out, _MAX_EVALUATION_TOKENS),
            "calibration.txt": _excerpt(text, text.train, _MAX_CALIBRATION_TOKENS),
        },
        overwrite=True,
    )
    draw_loss_curve(folder.picture, read_log(folder.log), unigram_loss=figures.unigram_loss)
    result = make_result(figures, trainer)
    folder.write_result(result)
    return result


def _excerpt(text: PreparedText, half: TokenFile, max_tokens: int) -> bytes:
    """Text that stays with the model: held-out, to measure on what is made of it; trained on, to
    calibrate that.

    Document separators stand in it as the special token's text, so that the model's tokenizer
    makes the same ids of it again.
    """
    ids = half.ids[:max_tokens].tolist()
    return text.tokenizer.decode(ids, skip_special_tokens=False).encode()


def _weights_sha256(trainer: Trainer) -> str:
    """Digest of the canonical tensors, whatever file layout they are saved in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(canonical_tensors(trainer.model).items()):
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()
