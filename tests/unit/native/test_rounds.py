"""Several tokens in one call of the executor: those of as many calls, bit for bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmserve.checkpoint import Checkpoint, save_model
from llmserve.config import ModelConfig
from llmserve.engine.config import EngineConfig
from llmserve.engine.engine import Engine
from llmserve.native.kernels import available_paths
from llmserve.runners.native_options import NativeOptions
from llmserve.runners.native_runner import NativeRunner
from llmserve.runners.protocol import Batch
from support.adapters import random_adapter
from support.batches import Share, make_batch, make_row
from support.engines import make_request, run, tokens_by_choice
from support.native_models import FORMS, LONG, make_forms
from support.variants import VARIANTS, random_tensors

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(not available_paths(), reason="the kernels are not built here"),
]

NAMES = [name for name, config in VARIANTS.items() if config.head is None]
ALWAYS = 1e9
"""Seconds for rounds: as many as a block has tokens."""


def answers(
    runner: NativeRunner, config: ModelConfig, most_rounds_s: float, **changes: Any
) -> tuple[dict[tuple[str, int], list[int]], int]:
    """What an engine's requests get, and its number of steps."""
    num_groups = len(runner.info.cache_groups)
    length = min(config.max_seq_len, 640)
    engine = Engine(
        runner,
        EngineConfig(
            num_blocks=(4 * length // 16,) * num_groups,
            max_seq_len=length,
            most_rounds_s=most_rounds_s,
        ),
    )
    rng = np.random.default_rng(1)
    adapters = [None, *runner.info.adapters]
    for index, (size, count) in enumerate(((5, 40), (20, 33), (1, 37))):
        engine.add_request(
            make_request(
                str(index),
                rng.integers(3, config.vocab_size, size).tolist(),
                max_tokens=min(count, length - size),
                adapter=adapters[index % len(adapters)],
                seed=index,
                **changes,
            )
        )
    return tokens_by_choice(run(engine)), engine.stats().num_steps


@pytest.mark.parametrize("changes", [{}, {"temperature": 1.0, "top_p": 0.9}], ids=["top", "drawn"])
@pytest.mark.parametrize(
    ("name", "has_adapter"),
    [
        (name, has)
        for name in NAMES
        for has in (False, True)
        if not (has and VARIANTS[name].experts)
    ],
)
def test_every_variant_gives_the_same_ids(
    tmp_path: Path, name: str, has_adapter: bool, changes: dict[str, float]
) -> None:
    config = VARIANTS[name]
    save_model(tmp_path / "model", config, random_tensors(config))
    adapters = [random_adapter(config)] if has_adapter else []
    runner = NativeRunner(Checkpoint.open(tmp_path / "model"), adapters=adapters, threads=2)
    one, num_single = answers(runner, config, 0.0, **changes)
    many, num_steps = answers(runner, config, ALWAYS, **changes)
    assert one == many
    assert num_steps < num_single / 3


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    return make_forms(tmp_path_factory.mktemp("forms"), LONG)


@pytest.mark.parametrize("cache", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_and_cache_gives_the_same_ids_over_a_window(
    forms: dict[str, Checkpoint], form: str, cache: Any
) -> None:
    runner = NativeRunner(forms[form], NativeOptions(cache_dtype=cache), threads=2)
    found = []
    for most_rounds_s in (0.0, ALWAYS):
        engine = Engine(
            runner,
            EngineConfig(num_blocks=(80, 80), max_seq_len=640, most_rounds_s=most_rounds_s),
        )
        for name, size in (("a", 290), ("b", 3)):
            prompt = np.random.default_rng(size).integers(3, 67, size).tolist()
            engine.add_request(make_request(name, prompt, max_tokens=45))
        found.append(tokens_by_choice(run(engine)))
    assert found[0] == found[1]


def decodes(num_rounds: int, **changes: Any) -> Batch:
    """Two sequences that have read nothing, each with blocks for 32 tokens."""
    shares = [
        Share(token_ids=[5], tables=[[1, 2]] * 2, rows=[make_row([5])]),
        Share(token_ids=[9], tables=[[3, 4]] * 2, rows=[make_row([9])]),
    ]
    batch = make_batch(shares, block_size=16)
    batch.num_rounds = num_rounds
    for name, value in changes.items():
        setattr(batch, name, value)
    return batch


@pytest.fixture
def runner(forms: dict[str, Checkpoint]) -> NativeRunner:
    runner = NativeRunner(forms["float32"], threads=1)
    runner.allocate_cache((8, 8), 16)
    return runner


def test_rounds_end_when_every_row_has_ended(runner: NativeRunner) -> None:
    runner.submit(decodes(12))
    first, second = runner.collect().token_ids.reshape(12, 2).T.tolist()
    ends = (first[3], second[7])
    wanted = 1 + max(next(n for n, one in enumerate(ids) if one in ends) for ids in (first, second))
    assert wanted < 12
    batch = decodes(12)
    for row in batch.sampling:
        row.end_token_ids = ends
    runner.submit(batch)
    assert runner.collect().token_ids.reshape(-1, 2).T.tolist() == [first[:wanted], second[:wanted]]


def test_an_unusable_row_is_the_last_round(tmp_path: Path) -> None:
    """The model of one token gives numbers that are not finite."""
    config = dataclasses.replace(LONG, tie_word_embeddings=False)
    tensors = random_tensors(config)
    save_model(tmp_path / "sound", config, tensors)
    sound = NativeRunner(Checkpoint.open(tmp_path / "sound"), threads=1)
    sound.allocate_cache((8, 8), 16)
    sound.submit(decodes(8))
    ids = sound.collect().token_ids.reshape(8, 2)
    seen = {5, 9, *ids[:2].ravel().tolist()}
    bad = int(next(one for one in ids[2:].ravel().tolist() if one not in seen))
    place = next(n for n, row in enumerate(ids.tolist()) if bad in row)
    tensors["model.embed_tokens.weight"][bad] = np.nan
    save_model(tmp_path / "broken", config, tensors)
    broken = NativeRunner(Checkpoint.open(tmp_path / "broken"), threads=1)
    broken.allocate_cache((8, 8), 16)
    broken.submit(decodes(8))
    result = broken.collect()
    assert len(result.token_ids) == 2 * (place + 2)
    assert result.is_finite is not None
    assert result.is_finite[: 2 * (place + 1)].all()
    assert not result.is_finite[2 * (place + 1) :].all()
    assert result.token_ids.reshape(-1, 2)[: place + 1].tolist() == ids[: place + 1].tolist()


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (decodes(33), "no block for a round"),
        (decodes(0), "several rounds are for"),
        (decodes(2, logits_indices=np.array([1])), "several rounds are for"),
    ],
)
def test_what_does_not_fit_is_refused(runner: NativeRunner, batch: Batch, message: str) -> None:
    batch.sampling = batch.sampling[: len(batch.logits_indices)]
    with pytest.raises(ValueError, match=message):
        runner.submit(batch)
