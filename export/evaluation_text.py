"""The texts that a quantization reads, as windows of token ids.

Measured is `--text FILE`, or else `evaluation.txt` in the model folder: the held-out part that
training left there. Calibrated is `--calibration FILE`, or else `calibration.txt`: a part of what
the model was trained on.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from llmserve.config import ModelConfig
from llmserve.errors import ConfigError, DataError
from llmserve.text.tokenizer import Tokenizer

from .measure import text_windows

__all__ = ["EVALUATION_FILE", "EvaluationText", "read_calibration_text", "read_evaluation_text"]

EVALUATION_FILE = "evaluation.txt"
"""Held-out text in a model folder."""

_CALIBRATION_FILE = "calibration.txt"

_MAX_WINDOW = 512  # tokens; longer contexts cost memory and tell little more
_CHARS_PER_TOKEN = 16  # read no more text than the tokens asked for can need


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationText:
    """A text, cut into windows that the model can read."""

    windows: list[list[int]]
    """Token ids; each begins with BOS where the tokenizer puts one."""
    sha256: str
    """Of the file."""


def read_evaluation_text(
    model: Path, config: ModelConfig, text: Path | None, *, max_tokens: int
) -> EvaluationText:
    """Read and tokenize the evaluation text: its first `max_tokens` tokens.

    Args:
        model: the model folder, which has the tokenizer.
        config: the model's.
        text: the file; None: `evaluation.txt` in the model folder.
        max_tokens: most tokens that are measured.

    Raises:
        ConfigError: no text was given and the folder has none.
        DataError: a file that cannot be read, is no UTF-8, or is too short; ids beyond the model's
            vocabulary.
        CheckpointError: the tokenizer cannot be read.
    """
    path = text if text is not None else model / EVALUATION_FILE
    if text is None and not path.is_file():
        raise ConfigError(
            f"{model} has no {EVALUATION_FILE} to measure on: give a text with --text FILE "
            "(one that the model was not trained on), or skip the measurement with --no-measure"
        )
    return _read(model, config, path, max_tokens)


def read_calibration_text(
    model: Path, config: ModelConfig, text: Path | None, *, max_tokens: int
) -> EvaluationText:
    """Read and tokenize the calibration text; arguments and errors as above."""
    path = text if text is not None else model / _CALIBRATION_FILE
    if text is None and not path.is_file():
        raise ConfigError(
            f"{model} has no {_CALIBRATION_FILE} to calibrate on: give a text like those the model "
            "was trained on with --calibration FILE, or use --method rtn, which reads none"
        )
    return _read(model, config, path, max_tokens)


def _read(model: Path, config: ModelConfig, path: Path, max_tokens: int) -> EvaluationText:
    try:
        content = path.read_bytes()
        decoded = content.decode("utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is no UTF-8 text: {error}") from error
    tokenizer = Tokenizer.load(model)
    excerpt = decoded[: max_tokens * _CHARS_PER_TOKEN]
    ids = tokenizer.encode(excerpt, add_special_tokens=False)[:max_tokens]
    if max(ids, default=0) >= config.vocab_size:
        raise DataError(
            f"{path}: the tokenizer of {model} makes ids beyond the model's vocabulary of "
            f"{config.vocab_size}"
        )
    windows = text_windows(
        ids, length=min(config.max_seq_len, _MAX_WINDOW), bos_token_id=_bos(tokenizer)
    )
    return EvaluationText(windows=windows, sha256=hashlib.sha256(content).hexdigest())


def _bos(tokenizer: Tokenizer) -> int | None:
    """The id that the tokenizer puts before a text, if it does."""
    before = tokenizer.encode("", add_special_tokens=True)
    return before[0] if before and before[0] == tokenizer.bos_token_id else None
