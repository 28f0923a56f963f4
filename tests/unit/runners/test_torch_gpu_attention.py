"""The Triton kernel, interpreted on the CPU, against torch's operations over the same cache."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import support.triton_interpreter  # noqa: F401 - before the kernels
from llmserve.checkpoint import Checkpoint, save_model
from llmserve.engine.engine import Engine
from llmserve.model.plain import generate_plain
from llmserve.model.scores import Scores
from llmserve.model.weights import load_model
from llmserve.runners import torch_runner
from llmserve.runners.cache_groups import LayerGroup
from llmserve.runners.protocol import Batch
from llmserve.runners.torch_attention import PagedAttention
from llmserve.runners.torch_cache import PagedCache
from llmserve.runners.torch_cache_form import CACHE_FORMS
from llmserve.runners.torch_gpu_attention import GpuAttention
from llmserve.runners.torch_runner import TorchRunner
from support.batches import Share, make_batch
from support.engines import make_config, make_request, run, tokens_by_choice
from support.variants import GEMMA2, random_tensors

BLOCK_SIZE = 16
NUM_BLOCKS = 64
TOLERANCE = {
    torch.float32: 2e-6,  # a few roundings of sums of values near 1
    torch.bfloat16: 2e-2,  # two roundings of a result below 4
    torch.float16: 2e-3,
}


class Case:
    """Sequences in scattered blocks: (tokens before the step, new tokens) of each."""

    def __init__(
        self, spans: list[tuple[int, int]], *, heads: tuple[int, int], head_dim: int,
        window: int | None = None, dtype: torch.dtype = torch.float32, form: str | None = None,
    ) -> None:  # fmt: skip
        rng = np.random.default_rng(len(spans) + head_dim)
        self.free = rng.permutation(NUM_BLOCKS).tolist()
        self.shares = [self._share(first, count, window) for first, count in spans]
        self.window, self.dtype = window, dtype
        self.form = None if form is None else CACHE_FORMS[form]
        num_tokens = sum(count for _, count in spans)
        generator = torch.Generator().manual_seed(head_dim)
        self.q = torch.randn(num_tokens, heads[0], head_dim, generator=generator).to(dtype)
        shape = (num_tokens, heads[1], head_dim)
        self.k = torch.randn(shape, generator=generator).to(dtype)
        self.v = torch.randn(shape, generator=generator).to(dtype)
        pool = (NUM_BLOCKS * BLOCK_SIZE, *shape[1:])
        self.keys = torch.randn(pool, generator=generator).to(dtype)
        self.values = torch.randn(pool, generator=generator).to(dtype)

    def _share(self, first: int, count: int, window: int | None) -> Share:
        blocks = [self.free.pop() for _ in range(-(-(first + count) // BLOCK_SIZE))]
        if window is not None:  # what nobody sees was given back: its place leads to another's
            hidden = max(0, first + 1 - window) // BLOCK_SIZE
            blocks[:hidden] = [NUM_BLOCKS - 1] * hidden
        return Share(token_ids=[0] * count, first=first, tables=[blocks])

    def attend(
        self, kind: type, shares: list[int] | None = None, cap: float | None = None
    ) -> Tensor:
        """The result of all sequences, or of some in the order of `shares`."""
        chosen = range(len(self.shares)) if shares is None else shares
        batch = make_batch([self.shares[i] for i in chosen], block_size=BLOCK_SIZE)
        tokens = np.concatenate([self.tokens(i) for i in chosen])
        cache = self._cache(batch)
        scores = Scores(scale=0.2, cap=cap)
        out: Tensor = kind(batch, cache, scores)(0, self.q[tokens], self.k[tokens], self.v[tokens])
        return out

    def tokens(self, index: int) -> np.ndarray:
        starts = np.cumsum([0, *(len(share.token_ids) for share in self.shares)])
        return np.arange(starts[index], starts[index + 1])

    def _cache(self, batch: Batch) -> PagedCache:
        cache = PagedCache(
            [LayerGroup(window=self.window, layers=(0,))], num_blocks=(NUM_BLOCKS,),
            block_size=BLOCK_SIZE, num_kv_heads=self.k.shape[1], head_dim=self.k.shape[2],
            dtype=self.dtype, device=torch.device("cpu"), form=self.form,
        )  # fmt: skip
        written = {
            table[place // BLOCK_SIZE] * BLOCK_SIZE + place % BLOCK_SIZE
            for share in self.shares
            for table in share.tables
            for place in range(max(0, share.first + 1 - (self.window or 10**9)), share.stop)
        }
        slots = torch.tensor(sorted(written))
        for pool in filter(lambda pool: pool is not None, cache.layers[0]):
            # What former owners left must never count.
            pool[:-1] = torch.nan if pool.is_floating_point() else 100
        cache.write(0, slots, self.keys[slots], self.values[slots])
        return cache


MIXED = [(0, 1), (270, 1), (255, 2), (0, 40), (245, 17)]
"""Decodes over one and two spans, drafts over their border, a whole prompt and a later chunk."""


@pytest.mark.parametrize(
    ("heads", "head_dim", "window", "cap", "dtype"),
    [
        ((4, 2), 64, None, None, torch.float32),
        ((3, 1), 80, 33, None, torch.float32),
        ((6, 1), 256, 265, 3.0, torch.float32),
        ((4, 1), 8, 1, None, torch.float32),
        ((2, 1), 128, None, None, torch.bfloat16),
        ((2, 1), 96, 50, None, torch.float16),
    ],
)
def test_equals_torchs_operations(
    heads: tuple[int, int], head_dim: int, window: int | None, cap: float | None, dtype: torch.dtype
) -> None:
    case = Case(MIXED, heads=heads, head_dim=head_dim, window=window, dtype=dtype)
    out, wanted = case.attend(GpuAttention, cap=cap), case.attend(PagedAttention, cap=cap)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), wanted.float(), atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize(
    ("form", "window", "cap", "dtype"),
    [
        ("int8", None, None, torch.float32),
        ("fp8", 50, 3.0, torch.float32),
        ("int8", None, None, torch.float16),
        ("fp8", None, None, torch.bfloat16),
    ],
)
def test_eight_bits_are_read_as_they_stand(
    form: str, window: int | None, cap: float | None, dtype: torch.dtype
) -> None:
    case = Case(MIXED, heads=(4, 2), head_dim=40, window=window, dtype=dtype, form=form)
    case.values *= 0.01  # float16 would lose weights as small as their scales
    case.v *= 0.01
    out, wanted = case.attend(GpuAttention, cap=cap), case.attend(PagedAttention, cap=cap)
    assert out.dtype == dtype
    # torch's operations read numbers rounded to the type: two roundings more.
    atol = 0.01 * 3 * TOLERANCE[dtype]
    torch.testing.assert_close(out.float(), wanted.float(), atol=atol, rtol=0)


@pytest.mark.parametrize("form", [None, "int8"])
def test_a_row_has_the_same_bits_in_every_batch(form: str | None) -> None:
    case = Case(MIXED, heads=(2, 1), head_dim=64, window=200, form=form)
    together = case.attend(GpuAttention)
    for order in ([1], [4], [3, 2, 0]):
        moved = np.concatenate([case.tokens(index) for index in order])
        assert torch.equal(case.attend(GpuAttention, order), together[moved])


def test_a_model_answers_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cache groups, a capped model, chunks and decodes in one step."""
    config = dataclasses.replace(GEMMA2, sliding_window=10, eos_token_ids=())
    save_model(tmp_path, config, random_tensors(config))
    checkpoint = Checkpoint.open(tmp_path)
    monkeypatch.setattr(torch_runner, "attention_for", lambda device: GpuAttention)
    limits = {"max_seq_len": 48, "max_batched_tokens": 21, "max_num_seqs": 4}
    engine = Engine(TorchRunner(checkpoint), make_config(num_blocks=(60, 60), **limits))
    prompts = [[3, 5, 9], [(7 * i) % 60 for i in range(28)]]
    for index, prompt in enumerate(prompts):
        engine.add_request(make_request(str(index), prompt, max_tokens=2))
    tokens = tokens_by_choice(run(engine))
    for index, prompt in enumerate(prompts):
        assert tokens[str(index), 0] == generate_plain(load_model(checkpoint), prompt, 2)
