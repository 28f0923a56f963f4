"""Decode steps of fixed shapes, run without a GPU: a graph that repeats the step stands for CUDA's,
and the Triton kernels are interpreted."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import support.triton_interpreter  # noqa: F401 - before the kernels
from llmserve.checkpoint import Checkpoint, save_model
from llmserve.config import ModelConfig
from llmserve.model.plain import generate_plain
from llmserve.model.transformer import Transformer
from llmserve.model.weights import load_model
from llmserve.runners import torch_runner
from llmserve.runners.cache_groups import group_layers
from llmserve.runners.torch_cache import PagedCache
from llmserve.runners.torch_forward import WholeForward, obstacle_to_graphs
from llmserve.runners.torch_gpu_attention import GpuAttention
from llmserve.runners.torch_gpu_layers import join_operations
from llmserve.runners.torch_graphs import GraphedForward
from llmserve.runners.torch_runner import TorchRunner
from llmserve.runners.torch_static_step import StepShape
from support.batches import Share, make_batch
from support.engines import make_engine, make_request, run, tokens_by_choice
from support.no_waiting import never_waiting
from support.variants import GEMMA2, VARIANTS, random_tensors

BLOCK_SIZE, NUM_BLOCKS = 16, 60
TOLERANCE = 1e-5  # a few roundings of float32 values about 1: products have other shapes


class RepeatedStep:
    """Computes the step again at each replay, where CUDA would start its kernels."""

    def __init__(self) -> None:
        self.num_replays = 0

    def capture(self, step: Callable[[], Tensor]) -> Tensor:
        self._step = step
        self._out = step().clone().fill_(torch.nan)
        return self._out

    def replay(self) -> None:
        self.num_replays += 1
        self._out.copy_(self._step())


class Graphs:
    """Makes graphs and keeps them."""

    def __init__(self) -> None:
        self.made: list[RepeatedStep] = []

    def __call__(self) -> RepeatedStep:
        self.made.append(RepeatedStep())
        return self.made[-1]


class Case:
    """One model twice, with graphs and without, each over a cache of its own."""

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        config = dataclasses.replace(config, max_seq_len=600)
        save_model(folder, config, random_tensors(config))
        # With the layers that a GPU's model has.
        self.model: Transformer = load_model(
            Checkpoint.open(folder), replace_layers=join_operations
        )
        self.model.complete_rotations(600, torch.device("cpu"))
        self.graphs = Graphs()
        self.ordinary = WholeForward(self.model, attention=GpuAttention)
        self.graphed = GraphedForward(self.model, self.ordinary, self.graphs)
        self.caches = [self._cache(config) for _ in range(2)]
        self.num_groups = len(self.caches[0].groups)

    def _cache(self, config: ModelConfig) -> PagedCache:
        cache = PagedCache(
            group_layers(config), num_blocks=(NUM_BLOCKS,) * len(group_layers(config)),
            block_size=BLOCK_SIZE, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim,
            dtype=torch.float32, device=torch.device("cpu"),
        )  # fmt: skip
        generator = torch.Generator().manual_seed(5)
        for pool in (*cache.keys, *cache.values):
            pool[:-2] = torch.randn(pool[:-2].shape, generator=generator)
        return cache

    def step(self, shares: list[Share]) -> None:
        """Take one step both ways; hidden states and caches must come out alike."""
        batch = make_batch(shares, block_size=BLOCK_SIZE)
        with torch.inference_mode():
            wanted = self.ordinary.hidden(batch, self.caches[0])
            found = self.graphed.hidden(batch, self.caches[1])
        torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=0)
        self.check_caches()

    def check_caches(self) -> None:
        for index, group in enumerate(self.caches[0].groups):
            spare, null = self.caches[1].spare_slots[index], self.caches[1].null_slots[index]
            for layer in group.layers:
                for kind in ("keys", "values"):
                    one, two = (getattr(cache, kind)[layer] for cache in self.caches)
                    torch.testing.assert_close(two[:spare], one[:spare], atol=TOLERANCE, rtol=0)
                    assert not two[null].any()

    def decodes(self, lengths: list[int], *, seed: int = 0) -> list[Share]:
        """One token for each context, in scattered blocks of its own."""
        rng = np.random.default_rng(seed + len(lengths))
        free = [rng.permutation(NUM_BLOCKS).tolist() for _ in range(self.num_groups)]
        return [
            Share(
                token_ids=[int(rng.integers(60))],
                first=length - 1,
                tables=[[pool.pop() for _ in range(-(-length // BLOCK_SIZE))] for pool in free],
            )
            for length in lengths
        ]


@pytest.mark.parametrize(
    "config",
    [
        VARIANTS["llama"],
        VARIANTS["gpt2"],
        dataclasses.replace(GEMMA2, sliding_window=10),
    ],
    ids=["llama", "gpt2", "windows"],
)
def test_a_replayed_step_is_the_ordinary_one(tmp_path: Path, config: ModelConfig) -> None:
    case = Case(tmp_path, config)
    case.step(case.decodes([1, 40, 17]))
    case.step(case.decodes([30, 2, 3, 16], seed=1))  # the same bucket, filled
    case.step(case.decodes([5, 6, 7], seed=2))  # and with a row of padding again
    assert [graph.num_replays for graph in case.graphs.made] == [3]
    case.step(case.decodes([300, 12]))  # two spans of context
    assert [graph.num_replays for graph in case.graphs.made] == [3, 1]


def test_other_steps_are_computed_as_they_were(tmp_path: Path) -> None:
    case = Case(tmp_path, VARIANTS["llama"])
    prefill = Share(token_ids=[4, 5, 6], tables=[[7]])
    case.step([*case.decodes([9]), prefill])
    case.step([prefill])
    assert not case.graphs.made


def test_a_capture_touches_no_block(tmp_path: Path) -> None:
    case = Case(tmp_path, VARIANTS["llama"])
    batch = make_batch(case.decodes([20]), block_size=BLOCK_SIZE)
    shape = StepShape.of(batch)
    assert shape is not None
    with torch.inference_mode():
        case.graphed.capture(shape, case.caches[1])
    case.check_caches()


def test_the_host_does_not_wait_in_a_captured_step(tmp_path: Path) -> None:
    """Neither when it is captured, which CUDA would refuse, nor when it is replayed."""
    case = Case(tmp_path, VARIANTS["llama"])
    batch = make_batch(case.decodes([20, 3]), block_size=BLOCK_SIZE)
    case.graphed = GraphedForward(case.model, case.ordinary, Unrun)
    with torch.inference_mode(), never_waiting():
        case.graphed.hidden(batch, case.caches[1])


class Unrun:
    """A graph whose step is looked at without its kernels, which the interpreter would wait for."""

    def capture(self, step: Callable[[], Tensor]) -> Tensor:
        return torch.zeros(8, 4)

    def replay(self) -> None:
        pass


@pytest.mark.parametrize(
    ("count", "longest", "shape"),
    [
        (1, 1, (1, 1)),
        (3, 256, (4, 1)),
        (8, 257, (8, 4)),
        (9, 1024, (16, 4)),
        (33, 1025, (40, 16)),
        (512, 2000, None),
        (512, 1000, (512, 4)),
        (513, 10, None),
        (1, 128_000, (1, 1024)),
    ],
)
def test_buckets(count: int, longest: int, shape: tuple[int, int] | None) -> None:
    share = Share(token_ids=[1], first=longest - 1, tables=[[0] * (-(-longest // 512))])
    batch = make_batch([share] * count, block_size=512)
    found = StepShape.of(batch)
    assert (found and (found.num_rows, found.num_spans)) == shape


def test_steps_with_adapters_are_not_captured() -> None:
    share = Share(token_ids=[1], tables=[[0]], adapter_id=1)
    assert StepShape.of(make_batch([share], block_size=16)) is None


def test_a_capture_that_fails_is_the_last_and_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    case = Case(tmp_path, VARIANTS["llama"])
    tried: list[object] = []

    class NoMemory(RepeatedStep):
        def capture(self, step: Callable[[], Tensor]) -> Tensor:
            tried.append(step)
            raise torch.OutOfMemoryError("CUDA out of memory")

    case.graphed = GraphedForward(case.model, case.ordinary, NoMemory)
    with caplog.at_level(logging.WARNING, logger="llmserve.engine"):
        case.step(case.decodes([5]))
        case.step(case.decodes([5, 9]))
    assert len(tried) == 1
    assert [record.getMessage() for record in caplog.records] == [
        "no more decode steps are captured as CUDA graphs: CUDA out of memory"
    ]


def test_a_new_cache_gets_new_graphs(tmp_path: Path) -> None:
    case = Case(tmp_path, VARIANTS["llama"])
    case.step(case.decodes([5]))
    case.graphed.check()  # what a runner does before it allocates
    case.caches.reverse()
    case.step(case.decodes([5]))
    assert [graph.num_replays for graph in case.graphs.made] == [1, 1]


def test_a_model_answers_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the engine, with everything as it is on a GPU but the GPU."""
    config = dataclasses.replace(VARIANTS["llama"], eos_token_ids=())
    save_model(tmp_path, config, random_tensors(config))
    checkpoint = Checkpoint.open(tmp_path)
    graphs = Graphs()
    monkeypatch.setattr(torch_runner, "attention_for", lambda device: GpuAttention)
    monkeypatch.setattr(torch_runner, "works_ahead", lambda device: True)
    monkeypatch.setattr(
        torch_runner,
        "with_graphs",
        lambda model, forward, device: GraphedForward(model, forward, graphs),
    )
    limits = {"num_blocks": 60, "max_seq_len": 48, "max_batched_tokens": 21, "max_num_seqs": 4}
    engine = make_engine(TorchRunner(checkpoint), **limits)
    prompts = [[3, 5, 9], [(7 * i) % 60 for i in range(28)], [8]]
    for index, prompt in enumerate(prompts):
        engine.add_request(make_request(str(index), prompt, max_tokens=4 + index))
    tokens = tokens_by_choice(run(engine))
    for index, prompt in enumerate(prompts):
        wanted = generate_plain(load_model(checkpoint), prompt, 4 + index)
        assert tokens[str(index), 0] == wanted
    assert sum(graph.num_replays for graph in graphs.made) > 3


def test_obstacles_are_named() -> None:
    cuda = torch.device("cuda")
    assert obstacle_to_graphs(VARIANTS["llama"], cuda) is None
    assert "Triton" in str(obstacle_to_graphs(VARIANTS["llama"], torch.device("cpu")))
    assert "experts" in str(obstacle_to_graphs(VARIANTS["mixtral"], cuda))
