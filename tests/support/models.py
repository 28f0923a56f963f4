"""A small model folder with a trained tokenizer and random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from llmserve.checkpoint import save_model
from llmserve.config import Head, ModelConfig
from llmserve.layouts import expected_tensors
from llmserve.text.tokenizer import Tokenizer

TEXT = (
    "Once upon a time there was a little girl named Lily. She loved to play outside in the park. "
    "One day she saw a big dog, and the dog said hello. Ünïcode 日本語 🙂 1234567890"
)
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MAX_SEQ_LEN = 256


def make_model_folder(
    folder: Path, *, seed: int = 0, max_seq_len: int = MAX_SEQ_LEN, head: Head | None = None,
    hidden_size: int = 32, intermediate_size: int = 48, tie_word_embeddings: bool = True,
) -> Path:  # fmt: skip
    """Write the model and return its folder."""
    tokenizer = Tokenizer.train("bpe", [TEXT] * 4, vocab_size=320)
    config = ModelConfig(
        vocab_size=320,
        hidden_size=hidden_size,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        intermediate_size=intermediate_size,
        max_seq_len=max_seq_len,
        bos_token_id=0,
        eos_token_ids=(0,),
        tie_word_embeddings=tie_word_embeddings,
        head=head,
    )
    generator = np.random.default_rng(seed)
    tensors = {
        name: generator.normal(0, 0.3, shape).astype(np.float32)
        for name, shape in expected_tensors(config).items()
    }
    files = {**tokenizer.files(), "chat_template.jinja": TEMPLATE.encode()}
    save_model(folder, config, tensors, extra_files=files)
    return folder
