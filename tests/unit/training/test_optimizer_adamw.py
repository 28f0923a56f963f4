"""AdamW against torch's own, and what it spares a run."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from llmserve.training.optimizer_adamw import AdamW

SHAPES = ((7, 5), (33,), (4, 3))


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(*shape, generator=generator)) for shape in SHAPES]


def test_it_makes_the_bits_of_torchs_fused_adamw() -> None:
    ours, theirs = parameters(), parameters()
    groups = [[0, 1], [2]]
    mine = AdamW(
        [
            {"params": [ours[i] for i in group], "weight_decay": 0.1 * len(group)}
            for group in groups
        ],
        lr=1e-2,
        betas=(0.9, 0.95),
    )
    oracle = torch.optim.AdamW(
        [
            {"params": [theirs[i] for i in group], "weight_decay": 0.1 * len(group)}
            for group in groups
        ],
        lr=1e-2,
        betas=(0.9, 0.95),
        fused=True,
    )
    generator = torch.Generator().manual_seed(1)
    for step in range(5):
        for mine_group, oracle_group in zip(mine.param_groups, oracle.param_groups, strict=True):
            mine_group["lr"] = oracle_group["lr"] = 1e-2 / (step + 1)
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        mine.step()
        oracle.step()
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)
        for name, value in oracle.state[other].items():
            assert torch.equal(mine.state[one][name], value), name


def test_a_parameter_without_a_gradient_stays_and_has_no_state() -> None:
    with_grad, without, _ = parameters()
    before = without.detach().clone()
    optimizer = AdamW(
        [{"params": [with_grad, without], "weight_decay": 0.5}], lr=0.1, betas=(0.9, 0.999)
    )
    with_grad.grad = torch.ones_like(with_grad)
    optimizer.step()
    assert torch.equal(without, before)
    assert not optimizer.state[without]
    optimizer.zero_grad(set_to_none=False)
    assert with_grad.grad is not None
    assert not with_grad.grad.any()
    optimizer.zero_grad()
    assert with_grad.grad is None


_STEP = """
import sys, torch
from llmserve.model.transformer import Transformer
from llmserve.training.trainer import Trainer
from llmserve.training.batches import StreamWindows
from support.training_runs import tiny_config, tiny_recipe
import numpy
recipe = tiny_recipe()
windows = StreamWindows(numpy.zeros(4096, dtype=numpy.uint16), context=recipe.max_seq_len, seed=0)
model = Transformer(tiny_config())
Trainer(model, recipe, windows, precision="float32", threads=1).run_step()
print(sorted({"sympy", "torch._dynamo", "torch.distributed.tensor"} & sys.modules.keys()))
"""


@pytest.mark.slow
def test_a_step_of_one_process_loads_neither_compiler_nor_sharding() -> None:
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{_STEP}"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert found.stdout.strip() == "[]", found.stderr
