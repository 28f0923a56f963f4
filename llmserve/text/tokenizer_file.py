"""Checks of a tokenizer.json before the `tokenizers` library sees it.

The file may come from a stranger. The library parses it safely, but believes what it says: huge
tables, settings under which a few characters grow to gigabytes, dropout that makes encoding
random. Everything is bounded here first; what cannot be checked from outside (a post-processor
that names unknown tokens, say) shows in the trial encoding that `Tokenizer` makes on loading.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

__all__ = ["check_tokenizer_json", "read_bounded"]

MAX_FILE_BYTES = 64 << 20
MAX_TOKENS = 1 << 20
MAX_TOKEN_BYTES = 512
MAX_STRING_CHARS = 4096
MAX_PARTS = 4096
MAX_GROWTH = 64
_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")


def read_bounded(path: Path) -> bytes:
    """The bytes of a regular file of at most `MAX_FILE_BYTES`.

    Raises:
        CheckpointError: missing, not a regular file, unreadable or too large.
    """
    try:
        if not path.is_file():
            raise CheckpointError(f"{path}: {'not a regular file' if path.exists() else 'missing'}")
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if len(data) > MAX_FILE_BYTES:
        raise CheckpointError(f"{path}: larger than the {MAX_FILE_BYTES} bytes allowed")
    return data


def check_tokenizer_json(content: Mapping[str, Any]) -> int:
    """Check the tables and settings of a parsed tokenizer.json.

    Returns:
        The number of ids: one more than the highest.

    Raises:
        CheckpointError: a table or setting is malformed or beyond its bound.
    """
    model = content.get("model")
    if not isinstance(model, dict):
        raise CheckpointError("model must be an object")
    if model.get("dropout"):
        raise CheckpointError("model.dropout makes encoding random: set it to null")
    ids = _check_vocab(model.get("vocab"))
    _check_merges(model.get("merges", []))
    ids |= _check_added_tokens(content.get("added_tokens", []))
    for name in _PARTS:
        _check_part(name, content.get(name))
    _check_growth(content.get("normalizer"))
    if not ids:
        raise CheckpointError("model.vocab is empty")
    return max(ids) + 1


def _check_vocab(vocab: object) -> set[int]:
    """Ids of a table token → id (BPE, WordLevel, WordPiece) or list of [token, score] (Unigram)."""
    if isinstance(vocab, list):
        if any(not isinstance(entry, list) or len(entry) != 2 for entry in vocab):
            raise CheckpointError("model.vocab: a list must hold pairs of token and score")
        vocab = {entry[0]: index for index, entry in enumerate(vocab) if _is_token(entry[0])}
    if not isinstance(vocab, dict):
        raise CheckpointError("model.vocab must be an object or a list")
    if len(vocab) > MAX_TOKENS:
        raise CheckpointError(f"model.vocab has {len(vocab)} tokens; at most {MAX_TOKENS}")
    ids: set[int] = set()
    for token, token_id in vocab.items():
        if not _is_token(token):
            raise CheckpointError(f"model.vocab: a token is longer than {MAX_TOKEN_BYTES} bytes")
        if not _is_id(token_id):
            raise CheckpointError(f"model.vocab: {token!r} has the id {token_id!r}")
        ids.add(token_id)
    if len(ids) != len(vocab):
        raise CheckpointError("model.vocab: two tokens share one id")
    return ids


def _check_merges(merges: object) -> None:
    if not isinstance(merges, list) or len(merges) > MAX_TOKENS:
        raise CheckpointError(f"model.merges must be a list of at most {MAX_TOKENS} pairs")
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        is_pair = isinstance(pair, list) and len(pair) == 2
        if not (is_pair and _is_token(pair[0]) and _is_token(pair[1])):
            raise CheckpointError("model.merges: every merge must be a pair of tokens")


def _check_added_tokens(tokens: object) -> set[int]:
    if not isinstance(tokens, list) or len(tokens) > MAX_TOKENS:
        raise CheckpointError(f"added_tokens must be a list of at most {MAX_TOKENS} tokens")
    ids: set[int] = set()
    for token in tokens:
        if not isinstance(token, dict) or not _is_token(token.get("content")):
            raise CheckpointError("added_tokens: every entry needs its content, a short string")
        if not token["content"] or not _is_id(token.get("id")) or token["id"] in ids:
            raise CheckpointError(f"added_tokens: {token['content']!r} needs an id of its own")
        ids.add(token["id"])
    return ids


def _check_part(name: str, part: object) -> None:
    """Bound the strings, and the number of values, of a normalizer, decoder and the like."""
    for count, (key, value) in enumerate(_walk("", part)):
        if count > MAX_PARTS:
            raise CheckpointError(f"{name} holds more than {MAX_PARTS} values")
        is_table = key == "precompiled_charsmap"
        if isinstance(value, str) and len(value) > MAX_STRING_CHARS and not is_table:
            raise CheckpointError(f"{name}.{key} is longer than {MAX_STRING_CHARS} characters")


def _check_growth(normalizer: object) -> None:
    """Refuse normalizers that multiply the length of a text, one after another."""
    growth = 1
    for _, value in _walk("", normalizer):
        if isinstance(value, dict) and value.get("type") == "Replace":
            pattern, content = value.get("pattern"), value.get("content")
            old = pattern.get("String", "?") if isinstance(pattern, dict) else "?"
            if not isinstance(old, str) or not old or not isinstance(content, str):
                raise CheckpointError("normalizer: Replace needs a pattern and a content")
            growth *= max(1, -(-len(content) // len(old)))
    if growth > MAX_GROWTH:
        raise CheckpointError(f"normalizer could make a text more than {MAX_GROWTH} times longer")


def _walk(key: str, value: object) -> Iterator[tuple[str, object]]:
    """Every value inside `value`, itself first, with the key it stands under."""
    yield key, value
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _walk(name, inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _walk(key, inner)


def _is_token(value: object) -> bool:
    if not isinstance(value, str):
        return False
    is_short = len(value) <= MAX_TOKEN_BYTES // 4  # a character has 4 bytes at most
    return is_short or len(value.encode("utf-8", "replace")) <= MAX_TOKEN_BYTES


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_TOKENS
