"""Our engine as a contender: what its seconds cover."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from llmserve import llm as llm_module
from llmserve.benchmarks import offline_engine as module
from llmserve.benchmarks.offline_engine import LlmEngine
from llmserve.errors import EngineError
from support.models import make_model_folder


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlmEngine]:
    folder = make_model_folder(tmp_path_factory.mktemp("run") / "model")
    engine = LlmEngine(str(folder), runner="torch")
    yield engine
    engine.llm.close()


@pytest.fixture
def steps(engine: LlmEngine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return count_steps(engine, monkeypatch)


def count_steps(engine: LlmEngine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens that came in each step; the clock is the number of steps."""
    made: list[int] = []
    step = engine.llm.engine.step

    def counting(now: float) -> list[object]:
        outputs = step(now)
        made.append(sum(len(output.token_ids) for output in outputs))
        return list(outputs)

    monkeypatch.setattr(engine.llm.engine, "step", counting)
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(len(made)))
    return made


def test_description_names_form_and_cache(engine: LlmEngine) -> None:
    description = engine.describe()
    assert description["engine"] == "llmserve torch"
    assert (description["weights"], description["cache"]) == ("float32", "float32")
    assert description["versions"]["llmserve"]


def test_native_runner_tells_what_a_step_reads(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "model")
    native = LlmEngine(str(folder), runner="native")
    described = native.describe()
    info = native.llm.info
    native.llm.close()
    assert described["weight_bytes"] == info.weight_bytes > 0
    assert described["token_bytes"] == info.cache_bytes_per_token > 0


def test_torch_runner_tells_what_a_step_reads(engine: LlmEngine) -> None:
    described, info = engine.describe(), engine.llm.info
    assert engine.config.tie_word_embeddings
    assert described["weight_bytes"] == info.weight_bytes > 0
    assert described["token_bytes"] == info.cache_bytes_per_token


@pytest.mark.parametrize(("dtype", "itemsize"), [(None, 4), ("bfloat16", 2)])
def test_rows_that_are_looked_up_are_not_read_whole(
    tmp_path: Path, dtype: str | None, itemsize: int
) -> None:
    folder = make_model_folder(tmp_path / "model", tie_word_embeddings=False)
    engine = LlmEngine(str(folder), runner="torch", dtype=dtype)
    described, info, config = engine.describe(), engine.llm.info, engine.config
    engine.llm.close()
    looked_up = itemsize * config.vocab_size * config.hidden_size
    assert described["weight_bytes"] == info.weight_bytes - looked_up > 0


def test_prefill_ends_with_the_first_token(engine: LlmEngine, steps: list[int]) -> None:
    assert engine.prefill([3] * 40) == 1.0
    assert steps == [1]
    assert not engine.llm.engine.has_work


def test_decode_covers_steps_with_a_token_for_each(engine: LlmEngine, steps: list[int]) -> None:
    prompts = [[index + 1] * 100 for index in range(12)]  # more than one step's worth
    assert engine.decode(prompts, 6) == 6.0
    first = next(i for i in range(len(steps)) if steps[i : i + 6] == [12] * 6)
    assert first >= 2, "the prompts' own steps do not count"
    assert not engine.llm.engine.has_work


def test_run_that_loses_a_token_is_an_error(
    engine: LlmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [[5] * 8, [6] * 8]
    step, calls = engine.llm.engine.step, 0

    def aborting(now: float) -> list[object]:
        nonlocal calls
        calls += 1
        if calls == 4:
            engine.llm.engine.abort(f"bench-{engine._num_requests}")
        return list(step(now))

    monkeypatch.setattr(engine.llm.engine, "step", aborting)
    with pytest.raises(EngineError, match="a step of 2 brought tokens of 1"):
        engine.decode(prompts, 6)


def test_tokens_that_come_together_take_their_share_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The native runner draws several in a step: of the last one's, those beyond count as more."""
    monkeypatch.setattr(llm_module, "_MOST_ROUNDS_S", 1e9)
    native = LlmEngine(str(make_model_folder(tmp_path / "model")), runner="native")
    made = count_steps(native, monkeypatch)
    seconds = native.decode([[5] * 8, [6] * 8], 20)
    native.llm.close()
    timed = made[1:]  # the first step is the prompts'
    assert max(timed) > 2
    num_steps = next(n for n in range(len(timed) + 1) if sum(timed[:n]) >= 40)
    assert seconds == num_steps * 40 / sum(timed[:num_steps])
