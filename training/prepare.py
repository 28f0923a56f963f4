"""From text to what a run trains on: a tokenizer and two token files, in the run's folder.

What is already there is checked and used again, so that a resumed run needs the text no more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

import numpy as np
import numpy.typing as npt

from llmserve.errors import ConfigError, DataError
from llmserve.text.tokenizer import Tokenizer
from llmserve.text.tokenizer_folder import CHAT_TEMPLATE

from .corpus import Corpus, documents_sha256
from .recipe import TrainingRecipe
from .token_file import TokenFile, write_token_file
from .tokenizer_folder import write_tokenizer

__all__ = ["PreparedText", "open_prepared", "prepare_text", "tokenizer_sha256"]

_Kind = Literal["bpe", "word", "char"]
_CHARS_AT_ONCE = 1 << 20
"""Characters encoded together; a token's record takes some 100 bytes."""
_FILES = {"train": "train.json", "held_out": "held_out.json"}


@dataclass(frozen=True, slots=True)
class PreparedText:
    """What a run reads."""

    tokenizer: Tokenizer
    train: TokenFile
    """Tokens to train on."""
    held_out: TokenFile
    """Tokens to evaluate on."""


def prepare_text(
    corpus: Corpus, recipe: TrainingRecipe, *, tokenizer_folder: Path, tokens_folder: Path
) -> PreparedText:
    """Train or load the tokenizer, and write the token files.

    Raises:
        ConfigError, DataError: the tokenizer or the text cannot be used.
        CheckpointError: the tokenizer's folder is damaged.
    """
    tokenizer = _make_tokenizer(corpus, recipe)
    write_tokenizer(tokenizer_folder, tokenizer, overwrite=True)
    digest = tokenizer_sha256(tokenizer)
    tokens_folder.mkdir(exist_ok=True)
    for half, documents in (("train", corpus.train), ("held_out", corpus.held_out)):
        write_token_file(
            tokens_folder / _FILES[half],
            _encode(tokenizer, documents),
            vocab_size=tokenizer.vocab_size,
            tokenizer_sha256=digest,
            text_sha256=documents_sha256(documents),
            text_bytes=sum(len(document.encode()) for document in documents),
        )
    return open_prepared(tokenizer_folder, tokens_folder)


def open_prepared(tokenizer_folder: Path, tokens_folder: Path) -> PreparedText:
    """Open what `prepare_text` wrote, checked.

    Raises:
        CheckpointError, DataError: a file is missing, damaged, or of another tokenizer.
    """
    tokenizer = Tokenizer.load(tokenizer_folder)
    digest = tokenizer_sha256(tokenizer)
    train, held_out = (TokenFile.open(tokens_folder / name) for name in _FILES.values())
    for half in (train, held_out):
        if half.tokenizer_sha256 != digest:
            raise DataError(f"{tokens_folder}: tokens of another tokenizer than {tokenizer_folder}")
    return PreparedText(tokenizer, train, held_out)


def tokenizer_sha256(tokenizer: Tokenizer) -> str:
    """Digest of the files that turn text into ids.

    The chat template is not among them: instruction tuning gives the same tokenizer another one.
    """
    files = tokenizer.files()
    files.pop(CHAT_TEMPLATE, None)
    digest = hashlib.sha256()
    for name, data in sorted(files.items()):
        digest.update(name.encode() + b"\0" + hashlib.sha256(data).digest())
    return digest.hexdigest()


def _make_tokenizer(corpus: Corpus, recipe: TrainingRecipe) -> Tokenizer:
    """Trained on the part that the model is trained on, so that held-out text stays unseen."""
    if recipe.tokenizer in get_args(_Kind):
        kind = cast(_Kind, recipe.tokenizer)
        return Tokenizer.train(kind, corpus.train, vocab_size=recipe.vocab_size)
    folder = Path(recipe.tokenizer)
    if not (folder / "tokenizer.json").is_file():
        raise ConfigError(
            f"tokenizer {recipe.tokenizer!r} is neither one of {', '.join(get_args(_Kind))} "
            "nor a folder with a tokenizer.json"
        )
    return Tokenizer.load(folder)


def _encode(tokenizer: Tokenizer, documents: Iterable[str]) -> Iterator[npt.NDArray[np.int64]]:
    """The ids of each document, as the tokenizer begins a text."""
    for batch in _batches(documents):
        yield from (np.asarray(ids, dtype=np.int64) for ids in tokenizer.encode_batch(batch))


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    chars = 0
    for document in documents:
        batch.append(document)
        chars += len(document)
        if chars >= _CHARS_AT_ONCE:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch
