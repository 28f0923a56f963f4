"""A model folder's tokenizer as the values that llama.cpp reads from a GGUF file.

Two of its tokenizers are known here. `gpt2` is byte-level BPE: tokens, merges, and the name of the
rule that splits a text into words, which must be one that llama.cpp has under that name. `llama` is
SentencePiece's BPE with byte tokens: it has no merges and joins whatever neighbours make the token
with the best score, so a token's score is the rank of the merge that makes it, negated, and a
tokenizer whose merges leave out a pair that makes a token cannot be written. Any other tokenizer is
refused: a file that splits texts otherwise than the model was trained on would only look right.

Source: llama.cpp's own converter and vocabulary (github.com/ggml-org/llama.cpp, docs/development).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmserve.config import ModelConfig
from llmserve.errors import ExportError
from llmserve.strict_json import parse_json
from llmserve.text.tokenizer import Tokenizer

from .gguf_file import GgufValue

__all__ = ["tokenizer_metadata"]

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # token types
_SPACE = "\u2581"  # SentencePiece's mark for a space
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2_WORDS = ("ByteLevel", False, True)
# What splits a text into words, and whether whole words are looked up first → llama.cpp's name.
_WORD_RULES: dict[tuple[tuple[object, ...], bool], str] = {
    ((_GPT2_WORDS,), False): "gpt-2",
    ((("Digits", True), _GPT2_WORDS), False): "smollm",
    ((("Split", _LLAMA3_WORDS, "Isolated"), ("ByteLevel", False, False)), True): "llama-bpe",
}
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")

Values = dict[str, GgufValue]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tokens:
    """The vocabulary, by id."""

    texts: list[str]
    types: list[int]


def tokenizer_metadata(folder: Path, config: ModelConfig) -> Values:
    """The values under `tokenizer.` for the model in `folder`.

    Raises:
        CheckpointError: the tokenizer cannot be read.
        ExportError: llama.cpp has no tokenizer like it; the message says what differs.
    """
    tokenizer = Tokenizer.load(folder)
    content = parse_json(tokenizer.files()["tokenizer.json"], folder / "tokenizer.json")
    model = content["model"]
    if model.get("type") != "BPE":
        raise _no_such(f"its model is {model.get('type')!r}, not 'BPE'")
    tokens = _tokens(content, config.vocab_size)
    is_byte_level = (content.get("decoder") or {}).get("type") == "ByteLevel"
    values = _byte_level(content, tokens) if is_byte_level else _sentencepiece(content, tokens)
    values |= {"tokens": tokens.texts, "token_type": tokens.types, **_ids(tokenizer, config)}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    if tokenizer.chat_template is not None:
        metadata["tokenizer.chat_template"] = tokenizer.chat_template
    return metadata


def _tokens(content: Mapping[str, Any], vocab_size: int) -> _Tokens:
    """A text and a type for every row of the embedding."""
    tokens = _Tokens(
        texts=[f"[PAD{index}]" for index in range(vocab_size)], types=[_UNUSED] * vocab_size
    )
    for text, index in content["model"]["vocab"].items():
        tokens.texts[index], tokens.types[index] = text, _NORMAL
    for added in content.get("added_tokens", []):
        index = added["id"]
        tokens.texts[index] = added["content"]
        tokens.types[index] = _CONTROL if added.get("special") else _USER_DEFINED
    unknown = content["model"].get("unk_token")
    if unknown in tokens.texts:
        tokens.types[tokens.texts.index(unknown)] = _UNKNOWN
    return tokens


def _byte_level(content: Mapping[str, Any], tokens: _Tokens) -> Values:
    if content.get("normalizer") is not None:
        raise _no_such("it normalizes texts")
    parts = tuple(map(_word_rule, _parts(content.get("pre_tokenizer"), "pretokenizers")))
    ignores_merges = bool(content["model"].get("ignore_merges"))
    name = _WORD_RULES.get((parts, ignores_merges))
    if name is None:
        raise _no_such(f"its rule for splitting a text into words is none of {_known_rules()}")
    return {"model": "gpt2", "pre": name, "merges": [" ".join(pair) for pair in _merges(content)]}


def _word_rule(part: Mapping[str, Any]) -> tuple[object, ...]:
    """What of a pre-tokenizer decides where it splits."""
    kind = part["type"]
    if kind == "ByteLevel":
        return kind, part.get("add_prefix_space"), part.get("use_regex", True)
    if kind == "Digits":
        return kind, part.get("individual_digits")
    if kind == "Split" and not part.get("invert"):
        return kind, part.get("pattern", {}).get("Regex"), part.get("behavior")
    return (kind,)


def _sentencepiece(content: Mapping[str, Any], tokens: _Tokens) -> Values:
    if not content["model"].get("byte_fallback") or content["model"].get("ignore_merges"):
        raise _no_such("it is neither byte-level BPE nor SentencePiece's with byte tokens")
    has_prefix, has_marks = _spaces(content)
    scores = _scores(tokens.texts, _merges(content))
    for index, text in enumerate(tokens.texts):
        if tokens.types[index] != _NORMAL:
            continue
        if _BYTE_TOKEN.fullmatch(text):
            tokens.types[index] = _BYTE
        elif not has_marks:
            tokens.texts[index] = text.replace(" ", _SPACE)
    return {"model": "llama", "scores": scores, "add_space_prefix": has_prefix}


def _spaces(content: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether a space is put before a text, and whether tokens have a mark for spaces."""
    normalizer = [_space_rule(part) for part in _parts(content.get("normalizer"), "normalizers")]
    words = [_space_rule(part) for part in _parts(content.get("pre_tokenizer"), "pretokenizers")]
    if normalizer in (["prepend", "mark"], ["mark"]) and not words:
        return len(normalizer) == 2, True
    if not normalizer and words in (["first"], ["always"], ["never"]):
        return words != ["never"], True
    if not normalizer and not words and _SPACE not in content["model"]["vocab"]:
        return False, False
    raise _no_such("it treats spaces otherwise than SentencePiece does")


def _space_rule(part: Mapping[str, Any]) -> object:
    kind = part["type"]
    if kind == "Prepend" and part.get("prepend") == _SPACE:
        return "prepend"
    is_space = part.get("pattern") == {"String": " "} and part.get("content") == _SPACE
    if kind == "Replace" and is_space:
        return "mark"
    if kind == "Metaspace" and part.get("replacement") == _SPACE and part.get("split") is False:
        return part.get("prepend_scheme")
    return kind


def _scores(texts: Sequence[str], merges: Sequence[tuple[str, str]]) -> list[float]:
    """Of each token, minus the rank of the first merge that makes it; 0 where none does.

    Raises `ExportError` for a pair that makes a token but is no merge: llama.cpp would join it.
    """
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    known, pairs = set(texts), set(merges)
    for text in texts:
        if _BYTE_TOKEN.fullmatch(text):
            continue
        for cut in range(1, len(text)):
            pair = text[:cut], text[cut:]
            if pair not in pairs and known.issuperset(pair):
                raise _no_such(f"its merges leave out {pair[0]!r} and {pair[1]!r}, a token")
    return [-float(ranks.get(text, 0)) for text in texts]


def _ids(tokenizer: Tokenizer, config: ModelConfig) -> Values:
    # An id that begins texts, too, comes last: llama.cpp shows the first one's name as the end.
    ends = sorted(config.eos_token_ids, key=lambda end: end == tokenizer.bos_token_id)
    if not ends:
        raise _no_such("the model names no id that ends a text")
    bare = tokenizer.encode("a", add_special_tokens=False)
    added = tokenizer.encode("a")
    bos, eos = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    frames = {(False, False): bare, (True, False): bos + bare, (True, True): bos + bare + eos,
              (False, True): bare + eos}  # fmt: skip
    frame = next((frame for frame, ids in frames.items() if ids == added), None)
    if frame is None:
        raise _no_such("it adds other tokens to a text than one that begins and one that ends it")
    named = {"bos_token_id": tokenizer.bos_token_id, "padding_token_id": tokenizer.pad_token_id}
    values: Values = {key: value for key, value in named.items() if value is not None}
    values |= dict(zip(_END_KEYS, ends, strict=False))
    return values | {"add_bos_token": frame[0], "add_eos_token": frame[1]}


def _parts(part: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """A normalizer or pre-tokenizer as the list of its steps."""
    if part is None:
        return []
    return list(part[key]) if part.get("type") == "Sequence" else [part]


def _merges(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The merges, which a file may spell as two words or as a pair."""
    merges = content["model"].get("merges", [])
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
    return [(left, right) for left, right in pairs]


def _known_rules() -> str:
    return ", ".join(_WORD_RULES.values())


def _no_such(reason: str) -> ExportError:
    return ExportError(f"llama.cpp has no tokenizer like this model's: {reason}")
