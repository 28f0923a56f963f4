"""Deterministic mode: the same bits for a token, however its work is split into steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from llmserve.checkpoint import Checkpoint, save_model
from llmserve.config import ModelConfig
from llmserve.errors import ConfigError
from llmserve.model.transformer import Transformer
from llmserve.runners.cache_groups import group_layers
from llmserve.runners.torch_cache import PagedCache
from llmserve.runners.torch_exact import padded_length
from llmserve.runners.torch_forward import TiledForward, WholeForward
from llmserve.runners.torch_runner import TorchRunner
from support.batches import Share, make_batch
from support.variants import GEMMA2, GEMMA3, GPT2, LLAMA, OLMO2, QWEN2_MOE, QWEN3, random_tensors

BLOCK_SIZE = 4
NUM_BLOCKS = 160
LENGTHS = (1, 3, 9, 37, 64, 90)
SHARED = 24
"""Tokens that the last two sequences have in common."""

_SIZES = {"vocab_size": 101, "max_seq_len": 96, "num_layers": 2}
MODELS = {
    "llama": dataclasses.replace(
        LLAMA, **_SIZES, hidden_size=48, head_dim=8, num_heads=6, intermediate_size=172
    ),
    "odd-mqa": dataclasses.replace(
        LLAMA, **_SIZES, hidden_size=60, head_dim=8, num_heads=5, num_kv_heads=1,
        intermediate_size=75,
    ),
    "gpt2": dataclasses.replace(GPT2, **_SIZES, hidden_size=60, intermediate_size=75),
    "windows": dataclasses.replace(
        LLAMA, **_SIZES, hidden_size=48, head_dim=8, sliding_window=10,
        full_attention_layers=(1,), tie_word_embeddings=False,
    ),
    "capped": dataclasses.replace(
        GEMMA2, **_SIZES, hidden_size=48, head_dim=10, num_heads=6, embedding_scale=48**0.5,
        sliding_window=10,
    ),
    "normed-partial": dataclasses.replace(
        QWEN3, **_SIZES, hidden_size=60, head_dim=12, num_heads=5, num_kv_heads=5, rotary_dim=6,
        intermediate_size=75,
    ),
    "two-bases": dataclasses.replace(GEMMA3, **_SIZES, hidden_size=48, sliding_window=10),
    "post-full": dataclasses.replace(OLMO2, **_SIZES, hidden_size=60, head_dim=10),
    "experts": dataclasses.replace(QWEN2_MOE, **_SIZES, hidden_size=60),
}  # fmt: skip


def make_forward(config: ModelConfig, folder: Path, dtype: str) -> TiledForward:
    """The forward of a deterministic runner, on its checked weights."""
    save_model(folder / "model", config, random_tensors(config, scale=0.15))
    runner = TorchRunner(Checkpoint.open(folder / "model"), dtype=dtype, deterministic=True)
    runner.allocate_cache((1,) * len(group_layers(config)), BLOCK_SIZE)
    assert isinstance(runner._forward, TiledForward)
    return runner._forward


class Story:
    """Sequences, and one way of computing all their tokens over a fresh cache of garbage."""

    def __init__(self, forward: TiledForward | WholeForward, config: ModelConfig) -> None:
        self.forward, self.config = forward, config
        rng = np.random.default_rng(5)
        self.sequences = [rng.integers(0, config.vocab_size, n).tolist() for n in LENGTHS]
        self.sequences[-1][:SHARED] = self.sequences[-2][:SHARED]

    def run(self, steps: list[list[tuple[int, int, int]]], *, seed: int) -> list[Tensor]:
        """Hidden states and logits of every token, [length, E + V] of each sequence.

        A step is a list of (sequence, new tokens, wrong drafts behind them).
        """
        rng = np.random.default_rng(seed)
        groups = group_layers(self.config)
        dtype = next(self.forward._model.parameters()).dtype
        cache = PagedCache(
            groups, num_blocks=(NUM_BLOCKS,) * len(groups), block_size=BLOCK_SIZE,
            num_kv_heads=self.config.num_kv_heads, head_dim=self.config.head_dim, dtype=dtype,
            device=torch.device("cpu"),
        )  # fmt: skip
        for layer, group in cache.group_of.items():
            for pool in (cache.keys[layer], cache.values[layer]):
                pool[: cache.null_slots[group]] = float("nan")
        tables = self._tables(rng, len(groups))
        done = [0] * len(self.sequences)
        found: list[list[Tensor]] = [[] for _ in self.sequences]
        for step in steps:
            shares = []
            for index, count, num_drafts in step:
                first = done[index]
                ids = self.sequences[index][first : first + count]
                ids = ids + rng.integers(0, self.config.vocab_size, num_drafts).tolist()
                shares.append(Share(token_ids=ids, first=first, tables=tables[index]))
            batch = make_batch(shares, block_size=BLOCK_SIZE)
            with torch.inference_mode():
                hidden = self.forward.hidden(batch, cache)
                rows = torch.cat((hidden.float(), self.forward.logits(hidden)), dim=1)
            for (index, count, _), start in zip(step, batch.cu_seqlens.tolist(), strict=False):
                found[index].append(rows[start : start + count])
                done[index] += count
        return [torch.cat(parts) for parts in found]

    def _tables(self, rng: np.random.Generator, num_groups: int) -> list[list[list[int]]]:
        """Scattered blocks with room for drafts; the last two sequences share their first ones."""
        tables: list[list[list[int]]] = [[] for _ in self.sequences]
        for _ in range(num_groups):
            free = rng.permutation(NUM_BLOCKS).tolist()
            for index, ids in enumerate(self.sequences):
                tables[index].append([free.pop() for _ in range(len(ids) // BLOCK_SIZE + 2)])
        return tables

    def whole(self) -> list[list[tuple[int, int, int]]]:
        """One sequence after the other, each in one step."""
        return [[(index, len(ids), 0)] for index, ids in enumerate(self.sequences)]

    def split(self, seed: int) -> list[list[tuple[int, int, int]]]:
        """Random steps of random chunks, some with drafts that turn out wrong."""
        rng = np.random.default_rng(seed)
        left = [len(ids) for ids in self.sequences]
        steps = []
        while any(left):
            step = []
            for index in rng.permutation(len(left)).tolist():
                if not left[index] or rng.random() < 0.3:
                    continue
                count = int(rng.integers(1, left[index] + 1)) if rng.random() < 0.3 else 1
                left[index] -= count
                is_last = not left[index]
                step.append((index, count, 0 if is_last else int(rng.integers(0, 4))))
            if step:
                steps.append(sorted(step, key=lambda share: share[1] + share[2]))
        return steps


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bits_do_not_depend_on_steps_neighbours_or_drafts(
    name: str, dtype: str, threads: int, tmp_path: Path
) -> None:
    config = MODELS[name]
    story = Story(make_forward(config, tmp_path, dtype), config)
    wanted = story.run(story.whole(), seed=0)
    assert all(rows.isfinite().all() for rows in wanted)
    for seed in range(1, 4 if threads == 1 else 2):
        found = story.run(story.split(seed), seed=seed)
        for rows, reference in zip(found, wanted, strict=True):
            assert torch.equal(rows, reference)
    assert torch.equal(wanted[-1][:SHARED], wanted[-2][:SHARED])


def test_the_splits_of_this_test_change_the_bits_of_the_default_mode(tmp_path: Path) -> None:
    config = MODELS["llama"]
    exact = make_forward(config, tmp_path, "float32")
    story = Story(WholeForward(exact._model), config)
    whole, split = story.run(story.whole(), seed=0), story.run(story.split(1), seed=1)
    assert any(not torch.equal(a, b) for a, b in zip(whole, split, strict=True))
    for fast, reference in zip(whole, Story(exact, config).run(story.whole(), seed=0), strict=True):
        torch.testing.assert_close(fast, reference, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("reader_first", [False, True])
def test_prefix_computed_in_the_same_step_is_read(tmp_path: Path, reader_first: bool) -> None:
    """A sequence may take blocks that another one fills in the same step, wherever it stands."""
    config = MODELS["llama"]
    forward = make_forward(config, tmp_path, "float32")
    story = Story(forward, config)
    writer, reader = story.sequences[-2], story.sequences[-1][: SHARED + 1]
    cache = PagedCache(
        group_layers(config), num_blocks=(NUM_BLOCKS,), block_size=BLOCK_SIZE,
        num_kv_heads=config.num_kv_heads, head_dim=config.head_dim, dtype=torch.float32,
        device=torch.device("cpu"),
    )  # fmt: skip
    blocks = list(range(40))
    own = [*blocks[: SHARED // BLOCK_SIZE], 50]
    shares = [
        Share(token_ids=writer, tables=[blocks]),
        Share(token_ids=reader[-1:], first=SHARED, tables=[own]),
    ]
    order = [1, 0] if reader_first else [0, 1]
    batch = make_batch([shares[index] for index in order], block_size=BLOCK_SIZE)
    with torch.inference_mode():
        hidden = forward.hidden(batch, cache)
    row = hidden[0 if reader_first else -1]
    alone = make_batch([Share(token_ids=reader, tables=[list(range(60, 70))])], block_size=4)
    with torch.inference_mode():
        assert torch.equal(row, forward.hidden(alone, cache)[-1])


class _UnevenNorm(nn.Module):
    """Rounds one row of a tile otherwise than the rest."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x).clone()
        out[5] *= 1 + 2**-23
        return out


def test_machine_that_rounds_rows_differently_is_refused(tmp_path: Path) -> None:
    forward = make_forward(MODELS["llama"], tmp_path, "float32")
    model: Transformer = forward._model
    model.norm = _UnevenNorm(model.norm)  # type: ignore[assignment]
    with torch.inference_mode(), pytest.raises(ConfigError, match="try 1 thread"):
        forward.check()


def test_padded_length_covers_the_context_with_few_places_more() -> None:
    lengths = range(1, 5000)
    padded = [padded_length(length) for length in lengths]
    pairs = list(zip(lengths, padded, strict=True))
    assert padded == sorted(padded)
    assert all(more >= length and more % 32 == 0 for length, more in pairs)
    assert all(more <= 1.25 * length for length, more in pairs if length >= 128)
