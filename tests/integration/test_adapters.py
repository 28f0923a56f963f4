"""Several LoRA adapters over one base in one batch, chosen by request: each as if merged."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from llmserve.adapters import save_adapter
from llmserve.checkpoint import Checkpoint, save_model
from llmserve.engine.engine import Engine
from llmserve.engine.request import RequestOutput
from llmserve.runners.registry import load_runner
from support.adapters import merged_tensors, random_adapter
from support.engines import make_config, make_request, run
from support.variants import VARIANTS, random_tensors

CONFIG = dataclasses.replace(VARIANTS["llama"], eos_token_ids=())
TENSORS = random_tensors(CONFIG)
ADAPTERS = [random_adapter(CONFIG, name, seed=seed) for seed, name in enumerate(("one", "two"))]
PROMPT = [(7 * i) % 60 for i in range(21)]
NAMES = (None, "one", "two")
TOLERANCE = 1e-4
"""Of logprobs in float32, against merged weights."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base model, two adapters, and each adapter merged into the base."""
    folder = tmp_path_factory.mktemp("adapters")
    save_model(folder / "base", CONFIG, TENSORS)
    for adapter in ADAPTERS:
        save_adapter(folder / adapter.name, adapter)
        save_model(folder / f"merged-{adapter.name}", CONFIG, merged_tensors(TENSORS, adapter))
    return folder


def engine_for(root: Path, *, deterministic: bool = False, **changes: object) -> Engine:
    runner = load_runner(
        "torch",
        Checkpoint.open(root / "base"),
        deterministic=deterministic,
        adapters={adapter.name: root / adapter.name for adapter in ADAPTERS},
    )
    return Engine(runner, make_config(**{"max_seq_len": 48, "num_blocks": 60, **changes}))


def ask(engine: Engine, *names: str | None) -> dict[str, list[RequestOutput]]:
    for name in names:
        engine.add_request(
            make_request(str(name), PROMPT, adapter=name, max_tokens=6, logprobs=60, seed=3)
        )
    outputs: dict[str, list[RequestOutput]] = {}
    for output in run(engine):
        outputs.setdefault(output.request_id, []).append(output)
    return outputs


def logprobs_of(outputs: list[RequestOutput]) -> np.ndarray:
    return np.array([[value for _, value in sorted(o.logprobs[0].top)] for o in outputs])


def test_adapters_of_one_batch_equal_merged_weights(root: Path) -> None:
    together = ask(engine_for(root, max_batched_tokens=64), *NAMES)
    for name in NAMES:
        folder = root / ("base" if name is None else f"merged-{name}")
        runner = load_runner("torch", Checkpoint.open(folder))
        alone = Engine(runner, make_config(max_seq_len=48, num_blocks=60))
        alone.add_request(make_request("a", PROMPT, max_tokens=6, logprobs=60, seed=3))
        wanted = run(alone)
        found = together[str(name)]
        assert [o.token_ids for o in found] == [o.token_ids for o in wanted]
        np.testing.assert_allclose(logprobs_of(found), logprobs_of(wanted), atol=TOLERANCE)


def test_prefix_cache_keeps_adapters_apart_and_serves_each(root: Path) -> None:
    engine = engine_for(root)
    first = {name: ask(engine, name)[str(name)] for name in NAMES}
    assert [outputs[0].num_cached_tokens for outputs in first.values()] == [0, 0, 0]
    for name in NAMES:
        again = ask(engine, name)[str(name)]
        assert again[0].num_cached_tokens == len(PROMPT) - 1
        assert [o.token_ids for o in again] == [o.token_ids for o in first[name]]


@pytest.mark.parametrize("budget", [16, 64])
def test_deterministic_mode_gives_adapters_the_same_bits_in_any_company(
    root: Path, budget: int
) -> None:
    engine = engine_for(root, deterministic=True, max_batched_tokens=budget, num_blocks=24)
    together = ask(engine, *NAMES)
    for name in NAMES:
        alone = ask(engine_for(root, deterministic=True, max_batched_tokens=64), name)[str(name)]
        np.testing.assert_array_equal(logprobs_of(together[str(name)]), logprobs_of(alone))
