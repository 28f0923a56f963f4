"""Models with random weights in the sizes that speed is compared on, for any program.

What a step costs follows from the shape alone, as long as the weights are not zero, so programs can
be compared without a trained model. A folder made here opens in `transformers`, and `llmserve
export gguf` makes llama.cpp's file of it. Its tokenizer is trained on invented words and has as
many tokens as the model has rows in its embedding.

The shapes are those of published models: S stories15M, M SmolLM2-135M, L Llama-3.2-1B, and for GPUs
XL Llama-3.1-8B; the context is 2,048 tokens for all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from llmserve.checkpoint import save_model
from llmserve.config import ModelConfig
from llmserve.errors import ConfigError
from llmserve.layouts import expected_tensors
from llmserve.quant.dtypes import NUMPY_DTYPES, StoredArray, from_float32
from llmserve.text.tokenizer import Tokenizer

__all__ = ["SHAPES", "make_model", "random_tensor"]

MAX_SEQ_LEN = 2048
WEIGHT_STD = 0.02
_CHUNK = 1 << 24  # values drawn at a time, so that a large tensor is not held as float32
_LETTERS = np.array(list("etaoinshrdlucmfwypvbgkqjxz"))


def _llama(**shape: Any) -> ModelConfig:
    return ModelConfig(
        **shape,
        max_seq_len=MAX_SEQ_LEN,
        bos_token_id=0,
        eos_token_ids=(0,),
        dtype="bfloat16",
    )


SHAPES: Mapping[str, ModelConfig] = MappingProxyType(
    {
        "S": _llama(
            vocab_size=32_000,
            hidden_size=288,
            num_layers=6,
            num_heads=6,
            num_kv_heads=6,
            head_dim=48,
            intermediate_size=768,
        ),
        "M": _llama(
            vocab_size=49_152,
            hidden_size=576,
            num_layers=30,
            num_heads=9,
            num_kv_heads=3,
            head_dim=64,
            intermediate_size=1536,
            rope_theta=100_000.0,
        ),
        "L": _llama(
            vocab_size=128_256,
            hidden_size=2048,
            num_layers=16,
            num_heads=32,
            num_kv_heads=8,
            head_dim=64,
            intermediate_size=8192,
            rope_theta=500_000.0,
        ),
        "XL": _llama(
            vocab_size=128_256,
            hidden_size=4096,
            num_layers=32,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            intermediate_size=14_336,
            rope_theta=500_000.0,
            tie_word_embeddings=False,
        ),
    }
)
"""Name → the model: 15, 135, 1,236 and 8,030 million parameters; tied embeddings but for the last,
bfloat16."""


def make_model(
    config: ModelConfig, folder: Path, *, seed: int = 0, overwrite: bool = False
) -> Tokenizer:
    """Write a model folder with random weights; its tokenizer is returned.

    Weights are normal with a standard deviation of 0.02, norms are 1. Equal configuration and seed
    give equal files. At most the weights themselves and one chunk of drawn values are in memory.

    Raises:
        ConfigError: the folder is not empty and `overwrite` is not given, or the vocabulary is too
            large for the invented words.
    """
    tokenizer = _tokenizer(config.vocab_size, seed)
    tensors = {
        name: random_tensor(shape, config.dtype, np.random.default_rng((seed, index)))
        for index, (name, shape) in enumerate(expected_tensors(config).items())
    }
    files = tokenizer.files(model_max_length=config.max_seq_len)
    save_model(folder, config, tensors, extra_files=files, overwrite=overwrite)
    return tokenizer


def random_tensor(
    shape: tuple[int, ...], dtype: str, generator: np.random.Generator
) -> StoredArray:
    """A weight with normal values, or ones for a vector, which is a norm's."""
    values = np.empty(shape, NUMPY_DTYPES[dtype])
    flat = values.reshape(-1)
    for start in range(0, flat.size, _CHUNK):
        part = flat[start : start + _CHUNK]
        drawn = np.ones(part.size, np.float32)
        if len(shape) > 1:
            drawn = generator.standard_normal(part.size, np.float32)
            drawn *= np.float32(WEIGHT_STD)
        part[:] = from_float32(drawn, dtype).data
    return StoredArray(dtype, values)


def _tokenizer(vocab_size: int, seed: int) -> Tokenizer:
    """A byte-level BPE tokenizer of exactly `vocab_size` tokens."""
    texts = _word_texts(vocab_size, np.random.default_rng(seed))
    tokenizer = Tokenizer.train("bpe", texts, vocab_size=vocab_size)
    if tokenizer.vocab_size != vocab_size:
        raise ConfigError(
            f"the invented words make {tokenizer.vocab_size} tokens, not {vocab_size}; give "
            "another seed or vocabulary"
        )
    return tokenizer


def _word_texts(num_words: int, generator: np.random.Generator) -> Iterator[str]:
    """Invented words of 3 to 8 letters, frequent letters more often, a thousand in each text.

    Each stands there twice: a pair that occurs once makes no token.
    """
    weights = 1 / np.arange(3.0, 3.0 + len(_LETTERS))
    for _ in range(-(-num_words // 1000)):
        letters = generator.choice(_LETTERS, (1000, 8), p=weights / weights.sum())
        lengths = generator.integers(3, 9, 1000)
        words = ("".join(row[:n]) for row, n in zip(letters.tolist(), lengths, strict=True))
        text = " ".join(words)
        yield f"{text} {text}"
