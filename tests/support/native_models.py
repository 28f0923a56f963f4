"""Small models in every form that the native runner executes, and the logits of all tokens."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from llmserve.checkpoint import Checkpoint, save_model
from llmserve.config import ModelConfig
from llmserve.export.quantize import Scheme
from llmserve.runners.cache_groups import group_layers
from llmserve.runners.native_runner import NativeRunner
from support.batches import Share, make_batch
from support.quantized_folders import write_quantized
from support.variants import LLAMA, random_tensors

__all__ = ["FORMS", "LONG", "Chunk", "make_forms", "run_chunks"]

Floats = np.ndarray[Any, np.dtype[np.float32]]

FORMS = ("float32", "bfloat16", "int4", "int8")
BLOCK_SIZE = 16
BLOCKS_PER_SEQUENCE = 40

LONG = dataclasses.replace(
    LLAMA,
    vocab_size=67,
    num_layers=2,
    max_seq_len=BLOCK_SIZE * BLOCKS_PER_SEQUENCE,
    sliding_window=300,
    full_attention_layers=(1,),
)
"""Two groups of cache, and contexts of more than one partition."""


def make_forms(
    root: Path, config: ModelConfig, tensors: dict[str, Floats] | None = None
) -> dict[str, Checkpoint]:
    """The same weights, random unless given, as each of `FORMS`, in new folders below `root`."""
    tensors = tensors or random_tensors(config)
    for dtype in ("float32", "bfloat16"):
        save_model(root / dtype, dataclasses.replace(config, dtype=dtype), tensors)
    schemes: tuple[Scheme, ...] = ("int4", "int8")
    for scheme in schemes:
        write_quantized(root / "float32", root / scheme, scheme, 8)
    return {form: Checkpoint.open(root / form) for form in FORMS}


@dataclasses.dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens first..last-1 of a sequence."""

    sequence: int
    first: int
    last: int


def run_chunks(
    runner: NativeRunner, config: ModelConfig, sequences: list[list[int]],
    steps: list[list[Chunk]], first_blocks: list[int] | None = None,
) -> list[Floats]:  # fmt: skip
    """Logits [tokens, V] of each sequence's computed tokens, step after step.

    Sequence s has the blocks from `first_blocks[s]` on, in every cache group; None: from s * 40.
    """
    firsts = first_blocks or [s * BLOCKS_PER_SEQUENCE for s in range(len(sequences))]
    num_groups = len(group_layers(config))
    found: list[list[Floats]] = [[] for _ in sequences]
    runner.allocate_cache((len(sequences) * BLOCKS_PER_SEQUENCE,) * num_groups, BLOCK_SIZE)
    for chunks in steps:
        shares = [
            _share(chunk, sequences[chunk.sequence], firsts[chunk.sequence], num_groups)
            for chunk in chunks
        ]
        batch = make_batch(shares, block_size=BLOCK_SIZE)
        runner.submit(batch)
        runner.collect()
        logits = runner.logits(range(len(batch.token_ids)))
        for chunk, rows in zip(chunks, np.split(logits, batch.cu_seqlens[1:-1]), strict=True):
            found[chunk.sequence].append(rows)
    return [np.concatenate(rows) if rows else np.zeros((0, 0), np.float32) for rows in found]


def _share(chunk: Chunk, ids: list[int], first_block: int, num_groups: int) -> Share:
    table = list(range(first_block, first_block + -(-chunk.last // BLOCK_SIZE)))
    return Share(
        token_ids=ids[chunk.first : chunk.last], first=chunk.first, tables=[table] * num_groups
    )
