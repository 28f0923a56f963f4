from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from llmserve.engine.config import SpeculationConfig
from llmserve.errors import ConfigError
from llmserve.limits import Limits
from llmserve.runners import native_runner
from llmserve.runners.native_options import NativeOptions
from llmserve.runners.native_runner import default_threads
from llmserve.server.auth import Key, KeyRing, RouteScope
from llmserve.server.engine_options import add_engine_arguments, engine_settings
from llmserve.server.engine_settings import EngineSettings
from llmserve.server.engine_setup import engine_options, loaded_engine
from llmserve.server.settings import ModelSettings, ServerSettings

ANN = Key.of("a-key-of-ann", {RouteScope.USER}, name="ann")


def settings(*arguments: str, log_format: str = "text") -> EngineSettings:
    parser = argparse.ArgumentParser()
    add_engine_arguments(parser)
    args = parser.parse_args(arguments)
    args.log_format = log_format
    return engine_settings(args, "run/model", KeyRing([ANN]), Limits())


def test_defaults_are_those_of_the_settings() -> None:
    assert settings() == EngineSettings(model="run/model", runner="auto")


def test_every_option_reaches_its_setting() -> None:
    found = settings(
        "--runner", "fake:0.5", "--dtype", "float16", "--device", "cuda", "--threads", "3",
        "--deterministic", "--tensor-parallel-size", "4", "--activations", "float32",
        "--head-weights", "int4",
        "--kv-cache-dtype", "int8", "--instruction-set", "portable", "--max-model-len", "100",
        "--lora-modules", "a=x", "b=y/z", "--kv-cache-memory", "2M", "--block-size", "8",
        "--no-enable-prefix-caching", "--max-num-seqs", "5", "--max-step-ms", "20",
        "--scheduling-policy", "fair", "--tenant-weight", "ann=2.5", "--record", "steps.log",
        "--enforce-eager",
        "--speculative-config", '{"method": "draft", "model": "small", "always": true}',
        log_format="json",
    )  # fmt: skip
    assert found == EngineSettings(
        model="run/model",
        log_format="json",
        runner="fake",
        dtype="float16",
        device="cuda",
        threads=3,
        deterministic=True,
        tensor_parallel_size=4,
        enforce_eager=True,
        native=NativeOptions(
            activations="float32",
            head_weights="int4",
            cache_dtype="int8",
            instruction_set="portable",
        ),
        adapters={"a": "x", "b": "y/z"},
        max_seq_len=100,
        max_num_seqs=5,
        max_step_s=0.02,
        cache_bytes=2 << 20,
        block_size=8,
        has_prefix_cache=False,
        policy="fair",
        tenant_weights={ANN.tenant: 2.5},
        speculation=SpeculationConfig(method="draft", is_always_on=True),
        draft_model="small",
        record="steps.log",
        fake_step_s=0.5,
    )
    assert settings("--max-num-batched-tokens", "64").max_batched_tokens == 64


def test_auto_asks_nothing_of_the_native_runner() -> None:
    arguments = ("--head-weights", "auto", "--kv-cache-dtype", "auto", "--instruction-set", "auto")
    assert settings(*arguments).native is None
    asked = settings(*arguments, "--activations", "integer").native
    assert asked == NativeOptions(activations="integer")


def test_every_engine_option_of_the_settings_reaches_the_engine() -> None:
    asked = EngineSettings(
        model="m",
        runner="fake",
        max_seq_len=100,
        max_num_seqs=5,
        max_batched_tokens=64,
        max_step_s=0.02,
        cache_bytes=2 << 20,
        block_size=8,
        has_prefix_cache=False,
        policy="fair",
        tenant_weights={"t": 2.5},
        speculation=SpeculationConfig(method="ngram"),
    )
    options = engine_options(asked)
    for name in options.__dataclass_fields__.keys() - {"most_rounds_s"}:  # nobody's to choose
        assert getattr(options, name) == getattr(asked, name), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-step-ms", "9", "--max-num-batched-tokens", "64"], "leave one out"),
        (["--max-step-ms", "0"], "above 0"),
        (["--max-step-ms", "inf"], "above 0"),
        (["--max-step-ms", "nan"], "above 0"),
        (["--tenant-weight", "ann=2"], "no effect under the scheduling policy fcfs"),
        (["--scheduling-policy", "fair", "--tenant-weight", "eve=2"], "no key has the name 'eve'"),
        (["--scheduling-policy", "fair", "--tenant-weight", "ann=0"], "above 0, got '0'"),
        (["--scheduling-policy", "fair", "--tenant-weight", "ann=x"], "above 0, got 'x'"),
        (["--scheduling-policy", "fair", "--tenant-weight", "ann"], "NAME=VALUE"),
        (["--lora-modules", "tuned"], "--lora-modules takes NAME=VALUE"),
        (["--lora-modules", "a=x", "a=y"], "'a' twice"),
        (["--speculative-config", "{}"], "needs the method"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(*arguments)


def test_replicas_share_the_cores() -> None:
    assert settings("--replicas", "2", "--threads", "3").threads == 3
    assert settings("--replicas", str(2 * default_threads())).threads == 1
    assert settings("--replicas", "1").threads is None
    assert settings("--prefill-engines", str(2 * default_threads())).threads == 1


def test_replicas_of_several_ranks_share_them_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_runner, "default_threads", lambda: 12)
    assert settings("--replicas", "2", "--tensor-parallel-size", "3").threads == 2
    assert settings("--tensor-parallel-size", "3").threads is None


def test_engines_that_only_read_share_memory_of_a_caches_size() -> None:
    arguments = ("--kv-cache-memory", "3M")
    assert settings(*arguments, "--prefill-engines", "1").handover_bytes == 3 << 20
    assert settings(*arguments).handover_bytes == 0


def test_sharing_a_cache_that_is_off_is_refused() -> None:
    engine = EngineSettings(model="m", runner="fake", has_prefix_cache=False)
    with pytest.raises(ConfigError, match="--share-prefix-cache needs"):
        ServerSettings(models=(ModelSettings(engine=engine),), shares_prefix_cache=True)


def test_a_draft_model_is_loaded_beside_the_model(model_folder: Path) -> None:
    asked = EngineSettings(
        model=str(model_folder),
        runner="fake",
        max_batched_tokens=64,
        cache_bytes=1 << 20,
        speculation=SpeculationConfig(method="draft"),
        draft_model=str(model_folder),
    )
    with loaded_engine(asked) as loaded:
        assert loaded.draft_info is not None
        assert loaded.draft_info.vocab_size == loaded.info.vocab_size
        assert loaded.engine.config.draft_cost is not None


def test_the_size_of_a_step_is_found_where_none_is_given(model_folder: Path) -> None:
    asked = EngineSettings(
        model=str(model_folder), runner="fake", max_num_seqs=4, cache_bytes=1 << 20
    )
    with loaded_engine(asked) as loaded:
        config = loaded.engine.config
        assert config.full_step_s is not None
        assert config.max_batched_tokens >= 16


def test_the_step_log_is_for_its_owner_and_closed_in_the_end(
    model_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "steps.log"
    asked = EngineSettings(
        model=str(model_folder), runner="fake", max_batched_tokens=64, record=str(path)
    )
    with loaded_engine(asked):
        pass
    assert path.read_text().startswith('["engine",')
    assert path.stat().st_mode & 0o777 == 0o600
    no_such = EngineSettings(model=str(model_folder), runner="fake", record=str(tmp_path / "a/b"))
    with (
        pytest.raises(ConfigError, match="the step log cannot be written"),
        loaded_engine(no_such),
    ):
        pass
