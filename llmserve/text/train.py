"""Making a tokenizer from a text: byte-level BPE, words, or characters.

All three kinds are written as a BPE model of the `tokenizers` library, so that one decoder and one
promise hold for them: every text comes back exactly. Byte-level BPE needs no more for that; words
and characters outside the vocabulary are spelled in the 256 byte tokens `<0x00>` to `<0xFF>`
instead of an unknown token, which would lose them and flatter the perplexity of a model.

- `bpe`: GPT-2's split into words (its regular expression is known to other programs), then merges.
- `word`: a word with the space before it, a punctuation mark, or a run of white space is one token.
- `char`: every character is one token.

One special token, `<|endoftext|>`, has id 0. It begins every encoded text, as it separates the
documents of packed training data: a prompt looks like the beginning of a document. It is the id
that ends a text, too. Sources: Sennrich et al., arXiv:1508.07909, section 3; GPT-2's byte alphabet.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer, WordLevelTrainer

from ..errors import ConfigError, DataError

__all__ = ["END_OF_TEXT", "TokenizerKind", "train_tokenizer"]

TokenizerKind = Literal["bpe", "word", "char"]

END_OF_TEXT = "<|endoftext|>"
MIN_VOCAB_SIZE = 257  # the 256 bytes and END_OF_TEXT
MAX_VOCAB_SIZE = 1 << 20
MAX_TOKEN_CHARS = 64  # rules of dashes and the like make poor tokens
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
# A space belongs to the word or mark after it; a run of white space leaves its last one to it.
_WORDS = Regex(rf" ?\w{{1,{MAX_TOKEN_CHARS}}}| ?[^\w\s]|\s{{1,16}}(?!\S)|\s")


def train_tokenizer(kind: TokenizerKind, texts: Iterable[str], *, vocab_size: int) -> bytes:
    """Train a tokenizer on `texts` and return its tokenizer.json.

    `vocab_size` bounds the vocabulary; a small corpus may give fewer tokens. The same texts give
    the same bytes. `texts` are read once and not kept.

    Raises:
        ConfigError: an unknown kind, or a vocabulary that cannot hold the bytes.
        DataError: no text at all, or one with surrogates, which UTF-8 cannot hold.
    """
    if kind not in _TRAINERS:
        raise ConfigError(f"tokenizer must be one of {', '.join(_TRAINERS)}, got {kind!r}")
    if not MIN_VOCAB_SIZE <= vocab_size <= MAX_VOCAB_SIZE:
        raise ConfigError(
            f"vocab_size must be from {MIN_VOCAB_SIZE} (every byte and {END_OF_TEXT}) "
            f"to {MAX_VOCAB_SIZE}, got {vocab_size}"
        )
    tokenizer = _TRAINERS[kind](_checked(texts), vocab_size)
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False, special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 0)]
    )
    return tokenizer.to_str(pretty=False).encode()


def _train_bpe(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=MAX_TOKEN_CHARS,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _train_words(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    split = pre_tokenizers.Split(_WORDS, behavior="isolated")
    counter = Tokenizer(models.WordLevel())
    counter.pre_tokenizer = split
    trainer = WordLevelTrainer(vocab_size=vocab_size - MIN_VOCAB_SIZE, show_progress=False)
    counter.train_from_iterator(texts, trainer)
    words = counter.get_vocab()
    # The split keeps a piece from being the spelling of a byte token, so a whole look-up is safe.
    tokenizer = _with_byte_fallback(sorted(words, key=words.__getitem__), takes_whole_pieces=True)
    tokenizer.pre_tokenizer = split
    return tokenizer


def _train_chars(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    by_frequency = sorted(counts, key=lambda char: (-counts[char], char))
    tokens = by_frequency[: vocab_size - MIN_VOCAB_SIZE]
    return _with_byte_fallback(tokens, takes_whole_pieces=False)


def _with_byte_fallback(tokens: list[str], *, takes_whole_pieces: bool) -> Tokenizer:
    """A tokenizer with a token for each of `tokens`, which spells everything else in bytes."""
    vocab = {token: index for index, token in enumerate([END_OF_TEXT, *_BYTES, *tokens])}
    model = models.BPE(vocab, [], byte_fallback=True, ignore_merges=takes_whole_pieces)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _checked(texts: Iterable[str]) -> Iterator[str]:
    is_empty = True
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"a training text holds the surrogate {text[error.start]!a} at character "
                f"{error.start}: decode it as UTF-8 first"
            ) from error
        is_empty = is_empty and not text
        yield text
    if is_empty:
        raise DataError("there is no text to train a tokenizer on")


_TRAINERS: dict[str, Callable[[Iterator[str], int], Tokenizer]] = {
    "bpe": _train_bpe,
    "word": _train_words,
    "char": _train_chars,
}
