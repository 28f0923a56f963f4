from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from llmserve.errors import ConfigError
from llmserve.limits import Limits
from llmserve.server.engine_settings import EngineSettings
from llmserve.server.model_memory import (
    PROCESS_BYTES,
    check_fits_beside,
    check_start,
    needed_bytes,
)
from llmserve.server.served_model import Model, open_model
from llmserve.server.settings import ModelSettings
from llmserve.server.swap_gate import SwapRefusedError

MIB = 1 << 20


@pytest.fixture
def opened(model_folder: Path) -> tuple[ModelSettings, Model]:
    engine = EngineSettings(model=str(model_folder), runner="fake", cache_bytes=300 * MIB)
    settings = ModelSettings(engine=engine, num_replicas=2)
    return settings, open_model(settings, Limits())


def test_a_model_that_does_not_fit_beside_is_refused_with_both_numbers(
    opened: tuple[ModelSettings, Model],
) -> None:
    settings, model = opened
    needed = needed_bytes(model.checkpoint, settings)
    assert needed > 600 * MIB + model.checkpoint.stored_bytes()
    check_fits_beside(model.checkpoint, settings, needed)
    check_fits_beside(model.checkpoint, settings, None)
    with pytest.raises(SwapRefusedError, match=r"about \d+ MiB beside .* \d+ MiB are available"):
        check_fits_beside(model.checkpoint, settings, needed - 1)


def test_engines_that_only_read_have_caches_and_share_one_more(
    opened: tuple[ModelSettings, Model],
) -> None:
    settings, model = opened
    plain = needed_bytes(model.checkpoint, settings)
    engine = msgspec.structs.replace(settings.engine, handover_bytes=300 * MIB)
    more = replace(settings, engine=engine, num_prefill_engines=2)
    assert needed_bytes(model.checkpoint, more) == plain + 3 * 300 * MIB


def test_each_rank_is_a_process_more(opened: tuple[ModelSettings, Model]) -> None:
    settings, model = opened
    engine = msgspec.structs.replace(settings.engine, tensor_parallel_size=3)
    more = needed_bytes(model.checkpoint, replace(settings, engine=engine))
    assert more == needed_bytes(model.checkpoint, settings) + 2 * PROCESS_BYTES


def test_models_are_counted_together(opened: tuple[ModelSettings, Model]) -> None:
    settings, model = opened
    needed = needed_bytes(model.checkpoint, settings)
    check_start([opened, opened], 2 * needed)
    check_start([opened, opened], None)
    with pytest.raises(
        ConfigError, match=rf"need about {2 * needed // MIB} MiB .*tiny about .* are available"
    ):
        check_start([opened, opened], 2 * needed - 1)
